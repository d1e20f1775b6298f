"""Reverse-mode automatic differentiation on numpy or cupy arrays."""

from parallel.autograd.check import GradientError, check_gradients
from parallel.autograd.placement import (
    COPIED,
    FEATURES,
    OUTPUTS,
    PARTIAL,
    REPLICATED,
    SEQUENCE,
    Placement,
    PlacementError,
    unchanged,
)
from parallel.autograd.recompute import recompute
from parallel.autograd.tensor import (
    Array,
    Operation,
    SavedBytes,
    Tensor,
    array_module,
    count_saved_bytes,
    deferring,
    no_gradient,
)
from parallel.autograd.vjps import TABLE

__all__ = [
    "COPIED",
    "FEATURES",
    "OUTPUTS",
    "PARTIAL",
    "REPLICATED",
    "SEQUENCE",
    "TABLE",
    "Array",
    "GradientError",
    "Operation",
    "Placement",
    "PlacementError",
    "SavedBytes",
    "Tensor",
    "array_module",
    "check_gradients",
    "count_saved_bytes",
    "deferring",
    "no_gradient",
    "recompute",
    "unchanged",
]
