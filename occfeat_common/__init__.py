"""What targets and trainer share: settings from YAML. Imports neither of them."""
