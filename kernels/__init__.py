"""Arithmetic on buffers: reduction operations on every dtype, fused kernels for training. Knows no ranks and no peers."""

from kernels import fused
from kernels.dispatch import backend, reduce, reduce_many, scale
from kernels.ops import PremultipliedSum, ReduceOp, check, supported

__all__ = ["PremultipliedSum", "ReduceOp", "backend", "check", "fused", "reduce", "reduce_many", "scale", "supported"]
