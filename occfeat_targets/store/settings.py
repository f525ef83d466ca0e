"""Settings: nested frozen pydantic models, read from YAML and ``section.key=value`` overrides.
Strict about names and types: an unknown key is an error that names the nearest known one."""

import difflib
import importlib.resources
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

import yaml
from pydantic import BaseModel, ConfigDict, PositiveInt, ValidationError


class ConfigError(ValueError):
    """A setting is unknown or impossible; the message names it."""


Size = tuple[PositiveInt, PositiveInt]
"""(height, width)."""


class Settings(BaseModel):
    """Base of every section of settings; a string below a field is its documentation."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, use_attribute_docstrings=True
    )

    @classmethod
    def of(cls, values: object, section: str = "") -> Self:
        """From plain values (nested dicts of lists and scalars), as YAML and JSON hold them;
        missing keys keep their defaults. ``section`` is the name of theirs, for messages. Raises
        ConfigError, naming the key: unknown, or its value is of the wrong type or out of range."""
        try:  # as JSON, where a list may become a tuple but nothing else changes its type
            return cls.model_validate_json(json.dumps(values, default=str))
        except ValidationError as error:
            raise ConfigError(f"{_message(cls, error, section):.1500}") from None
        except ValueError as error:  # of numbers with thousands of digits
            raise ConfigError(f"settings: {error}") from None

    @classmethod
    def load(cls, path: Path | None, overrides: Sequence[str] = ()) -> Self:
        """From a YAML file (or the defaults) with ``section.key=value`` overrides on top. Raises
        ConfigError for unreadable YAML, an unknown key or an impossible value."""
        return cls.of(override(read_yaml(path) if path else {}, overrides))

    def plain(self) -> dict[str, Any]:
        """Inverse of :meth:`of`: nested dicts of lists and scalars."""
        return self.model_dump(mode="json")

    def with_(self, **changes: Any) -> Self:
        """A copy with other values, which are taken as valid."""
        return self.model_copy(update=changes)


def settings_file(config: str, package: str) -> Path:
    """The file that ``--config`` names: one that ends in .yaml or .yml, or by its name a preset in
    a package's folder ``presets``. Raises ConfigError if there is no such preset."""
    if config.endswith((".yaml", ".yml")):
        return Path(config)
    if config not in (known := presets(package)):
        found = ", ".join(known)
        raise ConfigError(f"there is no preset {config!r}; there are {found}, or give a .yaml file")
    return known[config]


def presets(package: str) -> dict[str, Path]:
    """The files in a package's folder ``presets``, by name."""
    folder = Path(str(importlib.resources.files(package))) / "presets"
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def read_yaml(path: Path) -> dict:
    """The mapping a YAML file holds. Raises ConfigError if it can't be read or is none."""
    try:
        values = _parse_yaml(path.read_text(encoding="utf-8"), str(path)) or {}
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not a text file: {error.reason}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{path} must hold a mapping of settings")
    return values


def override(values: dict, overrides: Sequence[str]) -> dict:
    """Nested settings with ``section.key=value`` texts laid over them, in place. Values are YAML,
    so ``teacher.input_size=[252,448]`` works. A name that has dots itself, as a plug-in's may, is
    quoted: ``tasks."toys.one:Task".weight=2``. Raises ConfigError if a text is not of that form."""
    for text in overrides:
        key, equals, value = text.partition("=")
        if not equals:
            raise ConfigError(f"--set wants section.key=value, got {text!r:.200}")
        parts = re.findall(r'"[^"]*"|[^."]+', key.strip()) or [""]
        *sections, leaf = [part.strip('"') for part in parts]
        target = values
        for section in sections:
            target = target.setdefault(section, {})
            if not isinstance(target, dict):
                raise ConfigError(f"--set {text:.200}: {section} is not a section")
        target[leaf] = _parse_yaml(value, f"--set {text:.200}")
    return values


def differences(stored: dict, wanted: dict, prefix: str = "") -> list[str]:
    """Lines ``key: stored -> wanted`` for every leaf that differs between two plain dicts."""
    lines = []
    for key in sorted(stored.keys() | wanted.keys()):
        a, b, name = stored.get(key), wanted.get(key), f"{prefix}{key}"
        if isinstance(a, dict) and isinstance(b, dict):
            lines += differences(a, b, f"{name}.")
        elif a != b:
            lines.append(f"{name}: {a} -> {b}")
    return lines


def did_you_mean(name: str, known: Sequence[str], prefix: str = "") -> str:
    """The end of a message about an unknown name: the nearest known one, else all of them."""
    near = difflib.get_close_matches(name, known, n=1)
    return f"did you mean {prefix}{near[0]}?" if near else f"known: {', '.join(known)}"


class _Loader(yaml.SafeLoader):  # not CSafeLoader, which deep nesting makes overflow its stack
    """YAML 1.1, but 1e-4 is a number, as in YAML 1.2."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d+(\.\d*)?|\.\d+)([eE][-+]?\d+)$"),
    list("-+0123456789."),
)


def _parse_yaml(text: str, where: str) -> Any:
    try:
        return yaml.load(text, _Loader)
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        raise ConfigError(f"{where}: not valid YAML: {error!s:.500}") from error


def _message(cls: type[BaseModel], error: ValidationError, section: str) -> str:
    """One line for the first thing that is wrong."""
    first = error.errors(include_url=False)[0]
    *parents, leaf = path = [str(part) for part in first["loc"]] or [""]
    prefix = "".join(f"{part}." for part in ([section] if section else []) + parents)
    name = (prefix + leaf).rstrip(".") or "config"
    if first["type"] in ("extra_forbidden", "unexpected_keyword_argument"):
        return f"unknown setting {name}; {did_you_mean(leaf, _known(cls, path), prefix)}"
    if first["type"] == "value_error":
        raised = first.get("ctx", {}).get("error")
        text = str(raised)
        if isinstance(raised, ConfigError):  # of settings within settings: it names its key
            return text
        return text if not leaf or name in text else f"{name} {text}"
    rule = first["msg"].replace("Input should be", "must be")
    if first["type"] in ("model_type", "dataclass_type", "dict_type"):
        rule = "must be a mapping"
    return f"{name} {rule[0].lower()}{rule[1:]}, got {first['input']!r:.200}"


def _known(cls: Any, path: Sequence[str]) -> list[str]:
    """Names of the settings beside the one at a path."""
    for part in path[:-1]:
        cls = cls.model_fields[part].annotation if hasattr(cls, "model_fields") else cls
    return list(getattr(cls, "model_fields", None) or cls.__dataclass_fields__)
