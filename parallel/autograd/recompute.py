"""Activation checkpointing: keep the input of a function only, and compute it once more in backward."""

from __future__ import annotations

from collections.abc import Callable

from parallel.autograd.placement import PlacementError, unchanged
from parallel.autograd.tensor import Array, Operation, Saved, Tensor, no_gradient, recording


def recompute(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Return `function(x)`; of all that it computes only `x` is kept for backward (Chen 2016, arXiv 1604.06174).

    `function` must give the same result again, so its random numbers must not depend on when they are drawn. What it makes must
    be placed as x is. The parameters that it uses get their gradients, and their sinks learn of it, while `backward` passes. Raises
    PlacementError if it is not, and ValueError if x requires no gradient, as backward would not come by.
    """
    if not x.requires_gradient:
        raise ValueError("recompute: x requires no gradient, so backward would not reach what is computed from it")
    return _recomputed(x, function=function)


def _forward(x: Tensor, function: Callable[[Tensor], Tensor]) -> tuple[Array, Saved]:
    with no_gradient():
        result = function(x)
    if result.placement != x.placement:
        raise PlacementError(f"recompute of what makes {result.placement} of {x.placement}; both must be placed alike")
    return result.data, (x.data, x.placement, function)


def _product(g: Array, saved: Saved) -> Array:
    data, placement, function = saved
    x = Tensor(data, requires_gradient=True, placement=placement)
    with recording():
        result = function(x)
    result.backward(g)
    return x.gradient


_recomputed = Operation("recompute", _forward, (_product,), unchanged)
