"""Reverse-mode differentiation: a tensor remembers what made it, and `backward` walks that record."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from itertools import count
from typing import Any, TypeAlias

import numpy as np

Array: TypeAlias = Any
"""A numpy array, or one of another module with the same interface (cupy); no type covers both."""

Saved: TypeAlias = tuple[Any, ...]
Forward: TypeAlias = Callable[..., tuple[Array, Saved]]
VectorJacobianProduct: TypeAlias = Callable[[Array, Saved], Array]

# Per context, hence per thread: ranks that live as threads of one process do not switch each other's
# recording off.
_recording: ContextVar[bool] = ContextVar("recording", default=True)
_node_numbers = count()


def array_module(array: Array) -> Any:
    """Return the module whose functions work on `array`: numpy, or cupy for an array on a device."""
    return np if isinstance(array, np.ndarray) else sys.modules[type(array).__module__.partition(".")[0]]


class Tensor:
    """An array in a differentiable computation.

    Arguments: `data`, the array; `requires_gradient`, true for a leaf whose gradient `backward` should
    accumulate. `gradient` is None until the first `backward`, unless somebody put an array there: gradients
    are then added to it.
    """

    __slots__ = ("data", "gradient", "node", "requires_gradient")

    data: Array

    def __init__(self, data: Array, requires_gradient: bool = False) -> None:
        self.data = data
        self.requires_gradient = requires_gradient
        self.gradient: Array | None = None
        self.node: Node | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the data."""
        shape: tuple[int, ...] = self.data.shape
        return shape

    def backward(self, gradient: Array | None = None) -> None:
        """Add the gradient of this tensor to every leaf that it was computed from and that requires one.

        The record is used up: what the operations saved is freed as the walk passes, and a second call is an
        error. Arguments: `gradient`, of this tensor's shape, the weight of each element; one for a scalar by
        default. Raises ValueError for a tensor without a record, or a missing gradient of a tensor that is no
        scalar.
        """
        if self.node is None:
            raise ValueError("backward on a tensor without a record: no input required a gradient, or it was used up")
        if gradient is None:
            if self.data.size != 1:
                raise ValueError(
                    f"backward on shape {self.shape} wants a gradient of that shape, only a scalar has one"
                )
            gradient = array_module(self.data).ones_like(self.data)
        pending: dict[Node, Array] = {self.node: gradient}
        for node in _consumers_first(self.node):
            _pull_back(node, pending.pop(node), pending)
        self.node = None


@dataclass(eq=False, slots=True)
class Node:
    """One recorded application of an operation: its inputs, and what its vector-Jacobian products need."""

    operation: Operation
    inputs: tuple[Tensor, ...]
    saved: Saved | None
    number: int = field(default_factory=lambda: next(_node_numbers))


@dataclass(frozen=True, eq=False)
class Operation:
    """A differentiable operation: how to compute it, and a vector-Jacobian product for each input.

    `forward(*arrays, **options)` returns the result and what is to be saved; `vjps[i](gradient, saved)`
    returns the gradient of input i, from the gradient of the result. A product returns `gradient` itself or
    an array that is nobody else's, and may overwrite saved arrays if it is the only one of its row; no one
    writes into the array `gradient`.
    """

    name: str
    forward: Forward
    vjps: tuple[VectorJacobianProduct, ...]

    def __call__(self, *inputs: Tensor, **options: Any) -> Tensor:
        """Apply the operation, and record it when recording is on and an input requires a gradient."""
        if len(inputs) != len(self.vjps):
            raise TypeError(f"{self.name} takes {len(self.vjps)} tensors, got {len(inputs)}")
        data, saved = self.forward(*(tensor.data for tensor in inputs), **options)
        result = Tensor(data)
        if _recording.get() and any(tensor.requires_gradient for tensor in inputs):
            result.requires_gradient = True
            result.node = Node(self, inputs, saved)
        return result


@contextmanager
def no_gradient() -> Iterator[None]:
    """Record nothing in this block: evaluation then keeps no intermediate arrays alive."""
    token = _recording.set(False)
    try:
        yield
    finally:
        _recording.reset(token)


def _consumers_first(root: Node) -> list[Node]:
    """All nodes that `root` depends on, each after those that use it: youngest first, as inputs are older."""
    found, stack = {root}, [root]
    while stack:
        for tensor in stack.pop().inputs:
            if tensor.node is not None and tensor.node not in found:
                found.add(tensor.node)
                stack.append(tensor.node)
    return sorted(found, key=lambda node: node.number, reverse=True)


def _pull_back(node: Node, gradient: Array, pending: dict[Node, Array]) -> None:
    """Send the gradient of a result to its inputs: to leaves at once, to nodes by way of `pending`."""
    if node.saved is None:
        raise ValueError(f"the record of {node.operation.name} was used up by an earlier backward; compute it again")
    for tensor, product in zip(node.inputs, node.operation.vjps, strict=True):
        if not tensor.requires_gradient:
            continue
        part = product(gradient, node.saved)
        if tensor.node is None:
            if tensor.gradient is None:
                tensor.gradient = part.copy() if part is gradient else part
            else:
                tensor.gradient += part
        elif tensor.node not in pending:
            pending[tensor.node] = part
        elif part is gradient:
            pending[tensor.node] = pending[tensor.node] + part
        else:
            part += pending[
                tensor.node
            ]  # fresh and ours alone, whereas the pending one may be some node's own gradient
            pending[tensor.node] = part
    node.saved = None
