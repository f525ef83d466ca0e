"""Things of one kind by name, each in a module of its own that is imported when first asked for."""

import importlib
from typing import Any

from occfeat_targets.store.settings import ConfigError, did_you_mean


class Registry:
    """Names of one kind of thing (``kind``, such as ``teacher``, for messages), and where each is
    defined: ``places``, name to ``module:attribute``. A plug-in's name is such a place itself."""

    def __init__(self, kind: str, places: dict[str, str]):
        self.kind, self.places = kind, places
        self.names = tuple(places)
        """Those that come with the package."""

    def __call__(self, name: str) -> Any:
        """The thing of a name. Raises ConfigError: there is none, or it can't be imported."""
        place = self.places.get(name, name)
        if ":" not in place:
            known = did_you_mean(name, self.names)
            raise ConfigError(
                f"no {self.kind} {name!r:.200} ({known}); a plug-in is named package.module:name"
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
