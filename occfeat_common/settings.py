"""Settings: nested frozen dataclasses, read from YAML and ``key=value`` overrides.

Strict about names and types: an unknown key is an error that names the nearest known one.
"""

from __future__ import annotations

import dataclasses
import difflib
import types
import typing
from contextlib import suppress
from pathlib import Path

import yaml

Settings = typing.TypeVar("Settings")


class ConfigError(ValueError):
    """A setting is unknown or impossible; the message names it."""


def load_settings(
    cls: type[Settings], path: Path | None, overrides: typing.Sequence[str] = ()
) -> Settings:
    """Settings from a YAML file (or the defaults) with ``section.key=value`` overrides on top.

    Raises:
        ConfigError: on unreadable YAML, an unknown key or an impossible value.
    """
    return from_plain(cls, override(read_yaml(path) if path else {}, overrides))


def read_yaml(path: Path) -> dict:
    """The mapping a YAML file holds.

    Raises:
        ConfigError: the file can't be read or holds something else.
    """
    try:
        values = _parse_yaml(path.read_text(), str(path)) or {}
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{path} must hold a mapping of settings")
    return values


def override(values: dict, overrides: typing.Sequence[str]) -> dict:
    """Nested settings with ``section.key=value`` texts laid over them, in place.

    Values are YAML, so ``teacher.input_size=[252,448]`` works.

    Raises:
        ConfigError: a text is not of that form.
    """
    for text in overrides:
        key, equals, value = text.partition("=")
        if not equals:
            raise ConfigError(f"--set wants section.key=value, got {text!r}")
        *sections, leaf = key.strip().split(".")
        target = values
        for section in sections:
            target = target.setdefault(section, {})
            if not isinstance(target, dict):
                raise ConfigError(f"--set {text}: {section} is not a section")
        target[leaf] = _parse_yaml(value, f"--set {text}")
    return values


def to_plain(settings: object) -> typing.Any:
    """A settings object as nested dicts of lists and scalars, as written to YAML or JSON."""
    if dataclasses.is_dataclass(settings):
        names = [f.name for f in dataclasses.fields(settings)]
        return {name: to_plain(getattr(settings, name)) for name in names}
    return [to_plain(v) for v in settings] if isinstance(settings, tuple) else settings


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


def require(condition: bool, name: str, rule: str, value: object) -> None:
    """Raise :class:`ConfigError` ``NAME RULE, got VALUE`` unless the condition holds."""
    if not condition:
        raise ConfigError(f"{name} {rule}, got {value}")


def from_plain(cls: type[Settings], values: object, prefix: str = "") -> Settings:
    """Inverse of :func:`to_plain`; missing keys keep their defaults.

    Raises:
        ConfigError: naming the key, on an unknown key, a value of the wrong type, or one out
            of range.
    """
    if not isinstance(values, dict):
        raise ConfigError(f"{prefix.rstrip('.') or 'config'} must be a mapping, got {values!r}")
    hints = typing.get_type_hints(cls)
    names = [f.name for f in dataclasses.fields(cls)]
    arguments = {}
    for key, value in values.items():
        if key not in names:
            near = difflib.get_close_matches(str(key), names, n=1)
            hint = f"; did you mean {prefix}{near[0]}?" if near else f"; known: {', '.join(names)}"
            raise ConfigError(f"unknown setting {prefix}{key}{hint}")
        arguments[key] = _convert(hints[key], value, f"{prefix}{key}")
    try:
        return cls(**arguments)
    except ConfigError:
        raise
    except ValueError as error:  # a class that knows nothing of settings
        raise ConfigError(str(error)) from error


def _convert(hint: typing.Any, value: object, name: str) -> object:
    """``value`` as the annotated type: numbers pass for floats, lists for tuples, nothing else."""
    if dataclasses.is_dataclass(hint):
        return from_plain(hint, value, f"{name}.")
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is types.UnionType:
        return None if value is None else _convert(arguments[0], value, name)
    if origin is tuple:
        if not isinstance(value, list | tuple):
            raise ConfigError(f"{name} must be a list, got {value!r}")
        if arguments[-1] is Ellipsis:
            arguments = arguments[:1] * len(value)
        if len(arguments) != len(value):
            raise ConfigError(f"{name} must have {len(arguments)} entries, got {value!r}")
        return tuple(_convert(a, v, name) for a, v in zip(arguments, value, strict=True))
    if hint is float and not isinstance(value, bool):
        with suppress(ValueError, TypeError):
            value = float(value)  # whole numbers, and 1e-4, which YAML 1.1 takes for text
    if not isinstance(value, hint) or (isinstance(value, bool) and hint is not bool):
        raise ConfigError(f"{name} must be {hint.__name__}, got {value!r}")
    return value


def _parse_yaml(text: str, where: str) -> object:
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"{where}: not valid YAML: {error}") from error
