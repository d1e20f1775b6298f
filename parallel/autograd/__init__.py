"""Reverse-mode automatic differentiation on numpy or cupy arrays."""

from parallel.autograd.check import GradientError, check_gradients
from parallel.autograd.tensor import Array, Operation, Tensor, array_module, no_gradient
from parallel.autograd.vjps import TABLE

__all__ = [
    "TABLE",
    "Array",
    "GradientError",
    "Operation",
    "Tensor",
    "array_module",
    "check_gradients",
    "no_gradient",
]
