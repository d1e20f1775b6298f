"""Reverse-mode differentiation: a tensor remembers what made it, and `backward` walks that record."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import partial
from itertools import count
from typing import Any, Protocol, TypeAlias

import numpy as np

from parallel.autograd.placement import REPLICATED, REPLICATED_ONLY, Placement, Rule

Array: TypeAlias = Any
"""A numpy array, or one of another module with the same interface (cupy); no type covers both."""

Saved: TypeAlias = tuple[Any, ...]
Forward: TypeAlias = Callable[..., tuple[Array, Saved]]
VectorJacobianProduct: TypeAlias = Callable[[Array, Saved], Array]

# Per context, hence per thread: ranks that live as threads of one process do not switch each other's
# recording off.
_recording: ContextVar[bool] = ContextVar("recording", default=True)
_saved_bytes: ContextVar[SavedBytes | None] = ContextVar("saved_bytes", default=None)
_deferred: ContextVar[list[Callable[[], None]] | None] = ContextVar("deferred", default=None)
_node_numbers = count()


def array_module(array: Array) -> Any:
    """Return the module whose functions work on `array`: numpy, or cupy for an array on a device."""
    return np if isinstance(array, np.ndarray) else sys.modules[type(array).__module__.partition(".")[0]]


class Sink(Protocol):
    """Who looks after the gradients of a leaf."""

    def place(self, leaf: Tensor) -> Array:
        """The array that the leaf's first part of a gradient is to be written to."""

    def complete(self, leaf: Tensor) -> None:
        """A `backward` has added its last part to the gradient of the leaf."""


class Tensor:
    """An array in a differentiable computation.

    Arguments: `data`, the array; `requires_gradient`, true for a leaf whose gradient `backward` should
    accumulate; `placement`, how the ranks of a tensor-parallel axis hold it together. `gradient` is None until the
    first `backward`; later ones are added to it. A leaf may have a `sink`, which says where its gradient lies and
    learns when it is complete.
    """

    __slots__ = ("data", "gradient", "node", "placement", "requires_gradient", "sink")

    data: Array

    def __init__(self, data: Array, requires_gradient: bool = False, placement: Placement = REPLICATED) -> None:
        self.data = data
        self.requires_gradient = requires_gradient
        self.placement = placement
        self.gradient: Array | None = None
        self.node: Node | None = None
        self.sink: Sink | None = None

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
        nodes, uses = _consumers_first(self.node)
        pending: dict[Node, Array] = {self.node: gradient}
        deferred = _deferred.get()
        for node in nodes:
            arrived = pending.pop(node)
            _pull_back(node, arrived, pending)
            finish = partial(_finish, node, arrived, uses)
            if deferred is not None and any(_has_sink(source) for source in node.sources):
                deferred.append(finish)
            else:
                finish()
        self.node = None


@dataclass(eq=False, slots=True)
class Node:
    """One recorded application of an operation: where its inputs come from, and what its products need.

    A source is the node that made the input, or a leaf that requires a gradient, or None for an input that
    does not. The inputs' arrays live on only where `saved` holds them.
    """

    operation: Operation
    sources: tuple[Node | Tensor | None, ...]
    saved: Saved | None
    number: int = field(default_factory=lambda: next(_node_numbers))

    def free(self) -> None:
        """Let go of what was saved."""
        if (ledger := _saved_bytes.get()) is not None and self.saved is not None:
            ledger.remove(self.saved)
        self.saved = None


@dataclass(frozen=True, eq=False)
class Operation:
    """A differentiable operation: how to compute it, and a vector-Jacobian product for each input.

    `forward(*tensors, **options)` returns the result's array and what is to be saved: arrays, and leaves
    themselves, whose data may lie elsewhere by the time of the products. `vjps[i](gradient, saved)` returns
    the gradient of input i, from the gradient of the result; `places` says how the result is placed. A product returns `gradient` itself or an array
    that is nobody else's, and may overwrite saved arrays if it is the only one of its row; no one writes into
    the array `gradient`.
    """

    name: str
    forward: Forward
    vjps: tuple[VectorJacobianProduct, ...]
    places: Rule = REPLICATED_ONLY

    def __call__(self, *inputs: Tensor, **options: Any) -> Tensor:
        """Apply the operation, and record it when recording is on and an input requires a gradient."""
        if len(inputs) != len(self.vjps):
            raise TypeError(f"{self.name} takes {len(self.vjps)} tensors, got {len(inputs)}")
        placement = self.places(self.name, [tensor.placement for tensor in inputs], options)
        data, saved = self.forward(*inputs, **options)
        result = Tensor(data, placement=placement)
        if _recording.get() and any(tensor.requires_gradient for tensor in inputs):
            result.requires_gradient = True
            result.node = Node(self, tuple(_source(tensor) for tensor in inputs), saved)
            if (ledger := _saved_bytes.get()) is not None:
                ledger.add(saved)
        return result


def _source(tensor: Tensor) -> Node | Tensor | None:
    return (tensor.node or tensor) if tensor.requires_gradient else None


class SavedBytes:
    """Counts the bytes of the arrays that records keep alive for their products, each array once.

    `peak`: the most there were at any time since it was set last.
    """

    def __init__(self) -> None:
        self._users: dict[int, int] = {}
        self.now = self.peak = 0

    def add(self, saved: Saved) -> None:
        """A record begins to hold these."""
        for array in map(_owner, _arrays(saved)):
            users = self._users.get(id(array), 0)
            self._users[id(array)] = users + 1
            if users == 0:
                self.now += array.nbytes
        self.peak = max(self.peak, self.now)

    def remove(self, saved: Saved) -> None:
        """The record lets go of them."""
        for array in map(_owner, _arrays(saved)):
            self._users[id(array)] -= 1
            if self._users[id(array)] == 0:
                del self._users[id(array)]
                self.now -= array.nbytes


def _arrays(saved: Saved) -> Iterator[Array]:
    return (item for item in saved if hasattr(item, "nbytes") and getattr(item, "ndim", 0) > 0)


def _owner(array: Array) -> Array:
    while getattr(array, "base", None) is not None and hasattr(array.base, "nbytes"):
        array = array.base
    return array


@contextmanager
def count_saved_bytes(ledger: SavedBytes) -> Iterator[None]:
    """Count in `ledger` what is saved in this block, until `backward` has freed it."""
    token = _saved_bytes.set(ledger)
    try:
        yield
    finally:
        _saved_bytes.reset(token)


@contextmanager
def recording(on: bool = True) -> Iterator[None]:
    """Record operations in this block, or not, whatever holds outside it."""
    token = _recording.set(on)
    try:
        yield
    finally:
        _recording.reset(token)


@contextmanager
def deferring(gradients: list[Callable[[], None]]) -> Iterator[None]:
    """Have every `backward` in this block leave the gradients of leaves with sinks undone, as calls added to `gradients`.

    What these need is kept until they are called. So backward falls into two halves, that of the inputs and that of the
    weights (Qi 2024, arXiv 2401.10241, section 2).
    """
    token = _deferred.set(gradients)
    try:
        yield
    finally:
        _deferred.reset(token)


def is_recording() -> bool:
    """Whether operations are recorded here."""
    return _recording.get()


def no_gradient() -> AbstractContextManager[None]:
    """Record nothing in this block: evaluation then keeps no intermediate arrays alive."""
    return recording(False)


def _consumers_first(root: Node) -> tuple[list[Node], Counter[Tensor]]:
    """All nodes that `root` depends on, each after those that use it, and how often each leaf is used.

    Youngest first, as inputs are older.
    """
    found, stack, uses = {root}, [root], Counter[Tensor]()
    while stack:
        for source in stack.pop().sources:
            if isinstance(source, Tensor):
                uses[source] += 1
            elif source is not None and source not in found:
                found.add(source)
                stack.append(source)
    return sorted(found, key=lambda node: node.number, reverse=True), uses


def _pull_back(node: Node, gradient: Array, pending: dict[Node, Array]) -> None:
    """Send the gradient of a result to its inputs that have no sink: leaves, and nodes by way of `pending`."""
    saved = node.saved
    if saved is None:
        raise ValueError(f"the record of {node.operation.name} was used up by an earlier backward; compute it again")
    for source, product in zip(node.sources, node.operation.vjps, strict=True):
        if source is None or _has_sink(source):
            continue
        part = product(gradient, saved)
        if isinstance(source, Tensor):
            _add_to_leaf(source, part, shared=part is gradient)
        elif source not in pending:
            pending[source] = part
        elif part is gradient:
            pending[source] = pending[source] + part
        else:
            part += pending[source]  # fresh and ours alone, whereas the pending one may be some node's own gradient
            pending[source] = part


def _finish(node: Node, gradient: Array, uses: Counter[Tensor]) -> None:
    """Send the gradient of a result to its inputs that have a sink, and free the record."""
    assert node.saved is not None
    for source, product in zip(node.sources, node.operation.vjps, strict=True):
        if isinstance(source, Tensor) and source.sink is not None:
            part = product(gradient, node.saved)
            _add_to_leaf(source, part, shared=part is gradient)
            uses[source] -= 1
            if uses[source] == 0:
                source.sink.complete(source)
    node.free()


def _has_sink(source: Node | Tensor | None) -> bool:
    return isinstance(source, Tensor) and source.sink is not None


def _add_to_leaf(leaf: Tensor, part: Array, shared: bool) -> None:
    if leaf.gradient is not None:
        leaf.gradient += part
    elif leaf.sink is not None:
        leaf.gradient = leaf.sink.place(leaf)
        leaf.gradient[...] = part
    else:
        leaf.gradient = part.copy() if shared else part
