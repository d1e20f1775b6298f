"""The numerical check of vector-Jacobian products, public so that a new operation's test is one line."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from parallel.autograd.tensor import Array, Tensor

if TYPE_CHECKING:
    from collections.abc import Callable


class GradientError(AssertionError):
    """A vector-Jacobian product disagrees with central differences."""


def check_gradients(
    function: Callable[..., Tensor],
    *arrays: Array,
    step: float = 1e-6,
    tolerance: float = 1e-6,
    seed: int = 0,
) -> None:
    """Compare every gradient of `function` with central differences along each element.

    Arguments: `function` takes one tensor for each of `arrays` (float64) and returns a tensor; its result is
    contracted with random weights drawn from `seed`, so that every row of the Jacobian counts; `tolerance` is
    absolute plus relative. Raises GradientError naming the input, the element, and both values.
    """
    tensors = [Tensor(array.copy(), requires_gradient=True) for array in arrays]
    result = function(*tensors)
    weights = np.random.default_rng(seed).standard_normal(result.shape)
    result.backward(weights)
    for number, tensor in enumerate(tensors):
        if tensor.gradient is None:
            raise GradientError(f"input {number} received no gradient")
        if tensor.gradient.shape != tensor.shape:
            raise GradientError(f"input {number}: gradient of shape {tensor.gradient.shape}, expected {tensor.shape}")
        for index in np.ndindex(tensor.shape):
            values = []
            for sign in (1, -1):
                moved = [array.copy() for array in arrays]
                moved[number][index] += sign * step
                values.append(float(np.sum(function(*map(Tensor, moved)).data * weights)))
            expected = (values[0] - values[1]) / (2 * step)
            actual = float(tensor.gradient[index])
            if not abs(actual - expected) <= tolerance * (1 + abs(expected)):
                raise GradientError(
                    f"input {number}, element {index}: gradient {actual!r}, but central differences give {expected!r}"
                )
