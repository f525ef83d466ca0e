"""Runs: their directories, what they were asked to do, their networks, and which one is meant."""
