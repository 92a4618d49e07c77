"""Module: a tree of named parameters with a forward function."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Generic, TypeVar

import numpy as np

from tinydiff import autograd, backend
from tinydiff.tensor import Tensor, as_tensor

M = TypeVar("M", bound="Module")


class Parameter(Tensor):
    """A leaf tensor that a Module trains.

    Attributes:
        layout: how files store it: "conv" (HWIO in memory, OIHW in files), "linear" ([in, out], [out, in]) or "other" (the same).
    """

    __slots__ = ("layout",)

    def __init__(self, data: np.ndarray, layout: str = "other", requires_grad: bool = True) -> None:
        super().__init__(data if data.flags.owndata else data.copy(), requires_grad, version=[0])
        self.layout = layout


class Module:
    """A tree of parameters and sub-modules, found among the attributes, and `forward`, run by calling the module."""

    training = True
    changes = 0  # how many attributes of modules were ever set

    def __setattr__(self, name: str, value: Any) -> None:
        Module.changes += 1
        super().__setattr__(name, value)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the module computes."""
        raise TypeError(f"{type(self).__name__} defines no forward()")

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.forward(*args, **kwargs)

    # The tree.

    def children(self) -> Iterator[tuple[str, Module]]:
        """The direct sub-modules, with their names, in the order they were set."""
        return ((name, value) for name, value in vars(self).items() if isinstance(value, Module))

    def named_modules(self, prefix: str = "") -> Iterator[tuple[str, Module]]:
        """This module and all below it, with dotted names."""
        yield prefix, self
        for name, child in self.children():
            yield from child.named_modules(f"{prefix}.{name}" if prefix else name)

    def named_parameters(self) -> Iterator[tuple[str, Parameter]]:
        """All parameters, with dotted names."""
        for prefix, module in self.named_modules():
            for name, value in vars(module).items():
                if isinstance(value, Parameter):
                    yield (f"{prefix}.{name}" if prefix else name), value

    def parameters(self) -> list[Parameter]:
        """All parameters, each once."""
        return list({id(p): p for _, p in self.named_parameters()}.values())

    def num_parameters(self) -> int:
        """How many numbers are trained."""
        return sum(p.size for p in self.parameters())

    # Modes.

    def train(self, mode: bool = True) -> Module:
        """Switch dropout on (or off); returns the module."""
        for _, module in self.named_modules():
            module.training = mode
        return self

    def eval(self) -> Module:
        """Switch dropout off; returns the module."""
        return self.train(False)

    def requires_grad_(self, requires_grad: bool = True) -> Module:
        """Train the parameters, or freeze them; returns the module."""
        for parameter in self.parameters():
            parameter.requires_grad_(requires_grad)
        return self

    def zero_grad(self) -> None:
        """Forget the accumulated gradients."""
        for parameter in self.parameters():
            parameter.grad = None

    # Devices.

    @property
    def device(self) -> str:
        """Where the parameters live; "cpu" for a module without any."""
        return next((parameter.device for _, parameter in self.named_parameters()), "cpu")

    def to(self, device: str) -> Any:
        """Move all parameters, and their gradients, to `device`; returns the module. Do it before an optimiser is made.

        Raises ValueError for an unknown device, RuntimeError for one that is not available.
        """
        device = backend.check_device(device)
        for parameter in self.parameters():
            parameter.data = backend.to_device(parameter.data, device)
            if parameter.grad is not None:
                parameter.grad = parameter.grad.detach().to(device)
        return self

    # State.

    def state_dict(self) -> dict[str, Tensor]:
        """The parameters by name, in memory's layout (see `tinydiff.io` for files); they share memory with the module's."""
        return {name: parameter.detach() for name, parameter in self.named_parameters()}

    def load_state_dict(self, state: Mapping[str, Any], strict: bool = True) -> None:
        """Copy values in by name. Raises ValueError listing all missing, unexpected and mis-shaped names together.

        With `strict=False`, missing and unexpected names are let pass. Nothing is changed unless all of it fits.
        """
        own = dict(self.named_parameters())
        problems = []
        if strict:
            problems += [f"missing: {name}" for name in own if name not in state]
            problems += [f"unexpected: {name}" for name in state if name not in own]
        for name, parameter in own.items():
            if name in state and tuple(state[name].shape) != parameter.shape:
                problems.append(f"shape: {name} is {parameter.shape} here but {tuple(state[name].shape)} there")
        if problems:
            shown = "; ".join(problems[:20]) + (f"; and {len(problems) - 20} more" if len(problems) > 20 else "")
            raise ValueError(f"the weights don't fit {type(self).__name__}: {shown}")
        with autograd.no_grad():
            for name, parameter in own.items():
                if name in state:
                    parameter.assign_(as_tensor(state[name]))

    def __repr__(self) -> str:
        inside = "".join(f"\n  ({name}): " + repr(child).replace("\n", "\n  ") for name, child in self.children())
        own = ", ".join(f"{name}{list(value.shape)}" for name, value in vars(self).items() if isinstance(value, Parameter))
        return f"{type(self).__name__}({own}{inside}{chr(10) if inside else ''})"


class ModuleList(Module, Generic[M]):
    """Modules named "0", "1", …"""

    def __init__(self, modules: Iterable[M] = ()) -> None:
        for module in modules:
            self.append(module)

    def append(self, module: M) -> None:
        """Add one at the end."""
        setattr(self, str(len(self)), module)

    def __len__(self) -> int:
        return sum(1 for _ in self.children())

    def __iter__(self) -> Iterator[M]:
        return (module for _, module in self.children())  # type: ignore[misc]

    def __getitem__(self, index: int) -> M:
        return list(self)[index]


class Sequential(ModuleList[Module]):
    """Modules run one after another."""

    def __init__(self, *modules: Module) -> None:
        super().__init__(modules)

    def forward(self, x: Any) -> Any:
        """The last module's result on the one before it, and so on, on x."""
        for module in self:
            x = module(x)
        return x


_filling = True


@contextmanager
def no_init() -> Iterator[None]:
    """A block in which new parameters are left unfilled (and take no memory until written): for weights about to be loaded."""
    global _filling
    before, _filling = _filling, False
    try:
        yield
    finally:
        _filling = before


def is_filling() -> bool:
    """Whether initialisers fill new parameters."""
    return _filling
