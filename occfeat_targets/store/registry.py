"""Things of one kind by name, each in a module of its own that is imported when first asked for."""

import importlib
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from occfeat_targets.store.settings import ConfigError, did_you_mean

_only: ContextVar[tuple[str, Collection[str]] | None] = ContextVar("only", default=None)


@contextmanager
def only_plugins(place: str, names: Collection[str]) -> Iterator[None]:
    """Around what follows the settings of a store or run at ``place``. That may be another
    person's, and a plug-in's name in it would run whatever can be imported: a :class:`Registry`
    loads none but those ``names``, which the user gave anew, and raises ConfigError."""
    before = _only.set((place, names))
    try:
        yield
    finally:
        _only.reset(before)


class Registry:
    """Names of one kind of thing (``kind``, such as ``teacher``, for messages), and where each is
    defined: ``places``, name to ``module:attribute``. A plug-in's name is such a place itself."""

    def __init__(self, kind: str, places: dict[str, str]):
        self.kind, self.places = kind, places
        self.names = tuple(places)
        """Those that come with the package."""

    def __call__(self, name: str) -> Any:
        """The thing of a name. Raises ConfigError: there is none, or it can't be imported, or may
        not (:func:`only_plugins`)."""
        place = self.places.get(name, name)
        if ":" not in place:
            known = did_you_mean(name, self.names)
            raise ConfigError(
                f"no {self.kind} {name!r:.200} ({known}); a plug-in is named package.module:name"
            )
        where, allowed = _only.get() or ("", (name,))
        if name not in self.places and name not in allowed:
            raise ConfigError(
                f"{where} was made with the plug-in {name:.200} ({self.kind}), whose code this "
                f"would run: name it again, --plugin {name:.200}, if you trust it"
            )
        module_name, _, attribute = place.partition(":")
        try:
            return getattr(importlib.import_module(module_name), attribute)
        except (ImportError, AttributeError) as error:
            if name in self.places and not isinstance(error, ModuleNotFoundError):
                raise  # a fault of ours
            raise ConfigError(
                f"cannot load the {self.kind} {name!r:.200}: {error}. A plug-in must be importable "
                "as package.module:name, with its folder on PYTHONPATH"
            ) from error
