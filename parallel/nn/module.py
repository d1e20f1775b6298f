"""Modules, parameters, and the flat storage that they live in."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from parallel.autograd import Array, Tensor, array_module
from parallel.random import normal

Allocate = Callable[[tuple[int, ...], Any], Array]


class Parameter(Tensor):
    """A trainable tensor: a shape and a rule for its first values, until FlatParameters gives it storage.

    Arguments: `shape`; `mean` and `deviation` of the normal distribution that the first values are drawn from
    (deviation 0 for a constant); `decay`, whether weight decay applies (matrices of linear layers, as the
    field does).
    """

    __slots__ = ("decay", "deviation", "full_shape", "mean")

    def __init__(self, shape: tuple[int, ...], mean: float = 0.0, deviation: float = 0.0, decay: bool = False) -> None:
        self.full_shape, self.mean, self.deviation, self.decay = shape, mean, deviation, decay
        self.requires_gradient = True
        self.gradient = None
        self.node = None

    def __getattr__(self, name: str) -> Any:
        if name == "data":
            raise RuntimeError(
                f"parameter of shape {self.full_shape} has no storage; call FlatParameters(model, dtype)"
            )
        raise AttributeError(name)


class Module:
    """A part of a model: its parameters and modules are its attributes, from which they have their names."""

    def named_parameters(self, prefix: str = "") -> Iterator[tuple[str, Parameter]]:
        """Yield every parameter once with its dotted name, in the order of definition."""
        for name, value in vars(self).items():
            if isinstance(value, Parameter):
                yield prefix + name, value
            elif isinstance(value, Module):
                yield from value.named_parameters(f"{prefix}{name}.")
            elif isinstance(value, list):
                for number, module in enumerate(value):
                    yield from module.named_parameters(f"{prefix}{name}.{number}.")

    def parameter_count(self) -> int:
        """Return the number of trainable elements."""
        return sum(math.prod(parameter.full_shape) for _, parameter in self.named_parameters())


class FlatParameters:
    """All parameters of a model in one buffer and all gradients in another, the model's own being views.

    One collective and one optimizer pass then serve the whole model. Parameters with weight decay come first.
    Arguments: `model`; `dtype`; `allocate(shape, dtype)` for the gradients (a communicator's `empty`), numpy
    by default.
    """

    def __init__(self, model: Module, dtype: Any, allocate: Allocate = np.empty) -> None:
        named = sorted(model.named_parameters(), key=lambda item: not item[1].decay)
        self.named: dict[str, Parameter] = dict(named)
        self.size = model.parameter_count()
        self.decayed_size = sum(math.prod(p.full_shape) for p in self.named.values() if p.decay)
        self.gradients = allocate((self.size,), np.dtype(dtype))
        self.values: Array = array_module(self.gradients).empty_like(self.gradients)
        self.gradients.fill(0)
        offset = 0
        for parameter in self.named.values():
            stop = offset + math.prod(parameter.full_shape)
            parameter.data = self.values[offset:stop].reshape(parameter.full_shape)
            parameter.gradient = self.gradients[offset:stop].reshape(parameter.full_shape)
            offset = stop

    def initialise(self, seed: int) -> None:
        """Give every parameter its first values, which depend on seed, name and element index alone."""
        for name, parameter in self.named.items():
            if parameter.deviation:
                drawn = normal(seed, f"initial weights/{name}", 0, parameter.data.size) * parameter.deviation
                parameter.data[...] = array_module(parameter.data).asarray(
                    drawn.reshape(parameter.shape) + parameter.mean
                )
            else:
                parameter.data.fill(parameter.mean)

    def sha256(self) -> str:
        """Return the digest of all parameters: name, dtype, shape and bytes of each, in order of name."""
        digest = hashlib.sha256()
        for name in sorted(self.named):
            data = self.named[name].data
            data = data if isinstance(data, np.ndarray) else data.get()
            digest.update(f"{name} {data.dtype.name} {data.shape}\n".encode())
            digest.update(np.ascontiguousarray(data).data)
        return digest.hexdigest()
