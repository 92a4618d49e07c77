"""Model: a Module built from a config of plain values, as the published `config.json` files have them."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any, Self

import numpy as np

from tinydiff import io
from tinydiff.names import suggestion
from tinydiff.nn import Module


class Model(Module):
    """A module that knows the config it was built from.

    Attributes:
        config: every argument of `__init__` by name, defaults included; `from_config(config)` builds the same again.
    """

    config: dict[str, Any]

    def __new__(cls, *args: Any, **kwargs: Any) -> Self:
        """Note the arguments, defaults included."""
        model = super().__new__(cls)
        bound = inspect.signature(cls.__init__).bind(model, *args, **kwargs)
        bound.apply_defaults()
        model.config = dict(list(bound.arguments.items())[1:])
        return model

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Self:
        """Build the model. Names that start with "_" are passed over, and what is missing takes its default.

        Raises ValueError for an unknown name, with the nearest known one.
        """
        defaults = {name: p.default for name, p in inspect.signature(cls.__init__).parameters.items() if name != "self"}
        given = {name: value for name, value in config.items() if not name.startswith("_")}
        for name in given:
            if name not in defaults:
                raise ValueError(f"{cls.__name__} has no config entry {name!r}: {suggestion(name, defaults)}")
        missing = [name for name, default in defaults.items() if default is inspect.Parameter.empty and name not in given]
        if missing:
            raise ValueError(f"{cls.__name__} needs the config entry {missing[0]!r}")
        return cls(**given)

    @staticmethod
    def published_name(name: str) -> str | None:
        """What a weight of a published file is called here; None for one that isn't needed."""
        return name

    def load_published(self, weights: Mapping[str, np.ndarray]) -> None:
        """Copy in weights in the published layout (convolutions OIHW, linear [out, in]) and names, older ones too.

        Raises ValueError, with nothing changed, listing all that doesn't fit.
        """
        layouts = {name: parameter.layout for name, parameter in self.named_parameters()}
        state = {}
        for published, array in weights.items():
            name = self.published_name(published)
            if name is not None:
                state[name] = io.from_disk(name, array, layouts.get(name, "other"))
        self.load_state_dict(state)


def supported(model: str, **values: tuple[Any, Any]) -> None:
    """Refuse config entries whose value is not the only one implemented. Raises ValueError naming entry and value."""
    for name, (value, only) in values.items():
        if value != only:
            raise ValueError(f"{model}: {name}={value!r} is not supported; use {only!r}")
