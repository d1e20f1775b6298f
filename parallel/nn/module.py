"""Modules and their parameters."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from parallel.autograd import COPIED, FEATURES, OUTPUTS, REPLICATED, Array, Tensor
from parallel.random import normal

Wrapper = Callable[..., Any]
"""Called as `wrapper(forward, *arguments)` in place of `forward(*arguments)`."""


class Parameter(Tensor):
    """A trainable tensor: a shape and a rule for its first values, until somebody gives it an array.

    Arguments: `shape`, of the whole; `mean` and `deviation` of the normal distribution that the first values are drawn from
    (deviation 0 for a constant); `decay`, whether weight decay applies (matrices of linear layers, as the field does);
    `cut`: the run of elements that this rank of a tensor-parallel axis has, along `dimension`; `copied`: every rank has it
    whole, but makes a part of its gradient only. `name` is set by the one who looks after the model's parameters; a parameter
    that is a copy of another, with a gradient of its own, has that one's name as `copy_of`.
    """

    __slots__ = ("_shape", "copy_of", "decay", "deviation", "mean", "name", "start", "whole_shape")

    def __init__(
        self,
        shape: tuple[int, ...],
        mean: float = 0.0,
        deviation: float = 0.0,
        decay: bool = False,
        cut: range | None = None,
        dimension: int = 0,
        copied: bool = False,
        copy_of: str = "",
    ) -> None:
        self.whole_shape, self.mean, self.deviation, self.decay = shape, mean, deviation, decay
        self.name, self.copy_of = "", copy_of
        self.requires_gradient = True
        self.gradient = None
        self.node = None
        self.sink = None
        self._shape, self.start = shape, (0,) * len(shape)
        self.placement = COPIED if copied else REPLICATED
        if cut is not None:
            self._shape = (*shape[:dimension], len(cut), *shape[dimension + 1 :])
            self.start = tuple(cut.start if axis == dimension else 0 for axis in range(len(shape)))
            self.placement = OUTPUTS if dimension == 0 and len(shape) > 1 else FEATURES

    def __getattr__(self, name: str) -> Any:
        if name == "data":
            raise RuntimeError(
                f"parameter {self.name or 'without a name'} of shape {self.shape} has no values here; give the "
                "model to DataParallel, and use its modules by calling them"
            )
        raise AttributeError(name)

    @property
    def shape(self) -> tuple[int, ...]:
        """Of this rank's part."""
        return self._shape

    @property
    def size(self) -> int:
        """The number of elements of this rank's part."""
        return math.prod(self._shape)

    def initial_values(self, seed: int, start: int, stop: int) -> Array:
        """Return the first values of elements start … stop − 1 of this rank's part.

        They depend on the seed, the name, and their index in the whole alone.
        """
        if self.deviation == 0 or start == stop:
            return np.full(stop - start, self.mean)
        stream = f"initial weights/{self.copy_of or self.name}"
        width, whole_width = math.prod(self._shape[1:]), math.prod(self.whole_shape[1:])
        if width == whole_width:
            first = self.start[0] * width
            return normal(seed, stream, first + start, first + stop) * self.deviation + self.mean
        values = np.empty(stop - start)
        for row in range(start // width, -(-stop // width)):  # a part of each row of the whole
            inside = range(max(start, row * width), min(stop, (row + 1) * width))
            first = row * whole_width + self.start[1] - row * width
            values[inside.start - start : inside.stop - start] = normal(
                seed, stream, first + inside.start, first + inside.stop
            )
        return values * self.deviation + self.mean


class Module:
    """A part of a model: its parameters and modules are its attributes, from which they have their names.

    Modules may lie in dicts, whose keys are names. A subclass defines `forward`; calling the module calls it, by way of
    `wrapper` if there is one.
    """

    wrapper: Wrapper | None = None
    forward: Callable[..., Any]

    def __call__(self, *arguments: Any) -> Any:
        """Apply the module."""
        return self.forward(*arguments) if self.wrapper is None else self.wrapper(self.forward, *arguments)

    def named_parameters(self, prefix: str = "") -> Iterator[tuple[str, Parameter]]:
        """Yield every parameter once with its dotted name, in the order of definition."""
        return self._named(Parameter, prefix)

    def named_buffers(self, prefix: str = "") -> Iterator[tuple[str, Array]]:
        """Yield every array that is no parameter, with its dotted name: what is the same on all ranks, but not trained."""
        return self._named(np.ndarray, prefix)

    def _named(self, kind: type[Any], prefix: str) -> Iterator[tuple[str, Any]]:
        """Yield what is of this kind here and in modules, which may lie in dicts."""
        for name, value in vars(self).items():
            if isinstance(value, kind):
                yield prefix + name, value
            elif isinstance(value, Module):
                yield from value._named(kind, f"{prefix}{name}.")
            elif isinstance(value, dict):
                for key, module in value.items():
                    yield from module._named(kind, f"{prefix}{name}.{key}.")

    def parameter_count(self) -> int:
        """Return the number of trainable elements."""
        return sum(parameter.size for _, parameter in self.named_parameters())
