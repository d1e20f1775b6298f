"""Modules and their parameters."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from parallel.autograd import Array, Tensor
from parallel.random import normal

Wrapper = Callable[..., Any]
"""Called as `wrapper(forward, *arguments)` in place of `forward(*arguments)`."""


class Parameter(Tensor):
    """A trainable tensor: a shape and a rule for its first values, until somebody gives it an array.

    Arguments: `shape`; `mean` and `deviation` of the normal distribution that the first values are drawn from
    (deviation 0 for a constant); `decay`, whether weight decay applies (matrices of linear layers, as the
    field does). `name` is set by the one who looks after the model's parameters.
    """

    __slots__ = ("decay", "deviation", "full_shape", "mean", "name")

    def __init__(self, shape: tuple[int, ...], mean: float = 0.0, deviation: float = 0.0, decay: bool = False) -> None:
        self.full_shape, self.mean, self.deviation, self.decay = shape, mean, deviation, decay
        self.name = ""
        self.requires_gradient = True
        self.gradient = None
        self.node = None
        self.sink = None

    def __getattr__(self, name: str) -> Any:
        if name == "data":
            raise RuntimeError(
                f"parameter {self.name or 'without a name'} of shape {self.full_shape} has no values here; give the "
                "model to DataParallel, and use its modules by calling them"
            )
        raise AttributeError(name)

    @property
    def size(self) -> int:
        """The number of elements."""
        return math.prod(self.full_shape)

    def initial_values(self, seed: int, start: int, stop: int) -> Array:
        """Return the first values of elements start … stop − 1, which depend on seed, name and index alone."""
        if self.deviation == 0:
            return np.full(stop - start, self.mean)
        return normal(seed, f"initial weights/{self.name}", start, stop) * self.deviation + self.mean


class Module:
    """A part of a model: its parameters and modules are its attributes, from which they have their names.

    A subclass defines `forward`; calling the module calls it, by way of `wrapper` if there is one.
    """

    wrapper: Wrapper | None = None
    forward: Callable[..., Any]

    def __call__(self, *arguments: Any) -> Any:
        """Apply the module."""
        return self.forward(*arguments) if self.wrapper is None else self.wrapper(self.forward, *arguments)

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

    def named_buffers(self, prefix: str = "") -> Iterator[tuple[str, Array]]:
        """Yield every array that is no parameter, with its dotted name: what is the same on all ranks, but not trained."""
        for name, value in vars(self).items():
            if isinstance(value, np.ndarray):
                yield prefix + name, value
            elif isinstance(value, Module):
                yield from value.named_buffers(f"{prefix}{name}.")
            elif isinstance(value, list):
                for number, module in enumerate(value):
                    yield from module.named_buffers(f"{prefix}{name}.{number}.")

    def parameter_count(self) -> int:
        """Return the number of trainable elements."""
        return sum(parameter.size for _, parameter in self.named_parameters())
