"""Attention of each position to itself and to earlier ones (Vaswani 2017), on one rank, or in a ring that shares the positions.

Notation: B sequences, S positions, H heads in G groups of R = H/G (Ainslie 2023, arXiv 2305.13245; G = H is multi-head and
G = 1 multi-query attention), E elements a head. A packed projection (B, S, (H + 2·G)·E) is ordered (group, (queries of the
group's heads, key, value), element), so that a run of groups is a run of its rows. Queries are (B, G, R, S, E), keys and
values (B, G, 1, S, E): products broadcast them over the heads of a group, and no copies are made.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from kernels import fused
from parallel.autograd.placement import FEATURES, rule
from parallel.autograd.tensor import Array, Operation, Saved, Tensor, array_module
from parallel.formulas import share, zigzag

if TYPE_CHECKING:
    from collections.abc import Iterator

    from collectives import Communicator, Work

_RUN = 64
_KEYS, _GRADIENTS = 0, 1
"""Tags of messages."""


def _groups(name: str, packed: Array, heads: int, groups: int | None) -> int:
    """The number of groups, `heads` by default, if the projection fits."""
    groups = heads if groups is None else groups
    if groups < 1 or heads % groups:
        raise ValueError(f"{name}: groups must divide heads, but {heads} is no multiple of {groups}")
    if packed.shape[-1] % (heads + 2 * groups):
        raise ValueError(
            f"{name}: packed has shape {packed.shape}, expected a last axis of a multiple of {heads + 2 * groups}: "
            f"{heads} queries, {groups} keys and {groups} values"
        )
    return groups


def _split(packed: Array, heads: int, groups: int) -> tuple[Array, Array, Array]:
    """The queries, keys and values of a packed projection, as views."""
    sequences, positions, width = packed.shape
    rows = heads // groups + 2
    by_group = packed.reshape(sequences, positions, groups, rows, width // (groups * rows)).transpose(0, 2, 3, 1, 4)
    return by_group[:, :, :-2], by_group[:, :, -2:-1], by_group[:, :, -1:]


def _by_head(result: Array, heads: int, groups: int) -> Array:
    """A result (B, S, H·E) as (B, G, R, S, E), as a view."""
    sequences, positions, width = result.shape
    split = result.reshape(sequences, positions, groups, heads // groups, width // heads)
    return split.transpose(0, 2, 3, 1, 4)


def _runs(start: int, stop: int) -> list[slice]:
    """Positions in runs: no product is made of the keys of runs behind the queries'."""
    return [slice(first, min(first + _RUN, stop)) for first in range(start, stop, _RUN)]


def _over_queries(weights: Array, rows: Array, out: Array | None = None) -> Array:
    """Return weightsᵀ·rows, summed over the queries of all heads of a group: (B, G, 1, keys, E)."""
    xp, turned = array_module(rows), weights.swapaxes(-1, -2)
    out = xp.matmul(turned[:, :, :1], rows[:, :, :1], out=out)
    for head in range(1, rows.shape[2]):
        out += xp.matmul(turned[:, :, head : head + 1], rows[:, :, head : head + 1])
    return out


def _causal_attention(packed: Tensor, heads: int, groups: int | None = None) -> tuple[Array, Saved]:
    data = packed.data
    groups = _groups("causal_attention", data, heads, groups)
    xp = array_module(data)
    q, k, v = _split(data, heads, groups)
    sequences, positions = data.shape[:2]
    size = q.shape[-1]
    weights = xp.empty((*q.shape[:-1], positions), data.dtype)
    for run in _runs(0, positions):
        seen = slice(0, run.stop)
        xp.matmul(q[..., run, :], k[..., seen, :].swapaxes(-1, -2), out=weights[..., run, seen])
    fused.causal_softmax(weights, 1 / math.sqrt(size), 0)
    result = xp.empty((sequences, positions, heads * size), data.dtype)
    by_head = _by_head(result, heads, groups)
    for run in _runs(0, positions):
        seen = slice(0, run.stop)
        xp.matmul(weights[..., run, seen], v[..., seen, :], out=by_head[..., run, :])
    return result, (data, weights)


def _causal_attention_packed(g: Array, saved: Saved) -> Array:
    packed, weights = saved
    xp = array_module(g)
    _, groups, shared, positions, _ = weights.shape
    heads = groups * shared
    q, k, v = _split(packed, heads, groups)
    g = _by_head(g, heads, groups)
    gradient = xp.empty(packed.shape, packed.dtype)
    q_gradient, k_gradient, v_gradient = _split(gradient, heads, groups)
    scores = xp.empty_like(weights)
    for run in _runs(0, positions):
        seen = slice(0, run.stop)
        xp.matmul(g[..., run, :], v[..., seen, :].swapaxes(-1, -2), out=scores[..., run, seen])
    fused.causal_softmax_backward(scores, weights, 1 / math.sqrt(q.shape[-1]), 0, scores)
    for run in _runs(0, positions):
        seen, seeing = slice(0, run.stop), slice(run.start, positions)
        xp.matmul(scores[..., run, seen], k[..., seen, :], out=q_gradient[..., run, :])
        _over_queries(scores[..., seeing, run], q[..., seeing, :], k_gradient[..., run, :])
        _over_queries(weights[..., seeing, run], g[..., seeing, :], v_gradient[..., run, :])
    return gradient


_BY_HEADS = rule((FEATURES, FEATURES))

causal_attention = Operation("causal_attention", _causal_attention, (_causal_attention_packed,), _BY_HEADS)


# ring_attention: each rank holds two blocks of the positions, and keys and values go round (Liu 2023, arXiv 2310.01889)


def positions(sequence: int, ranks: int, rank: int) -> Array:
    """Return which positions of a sequence this rank gives to `ring_attention`, in this order: two of 2·ranks blocks.

    Rank i has blocks i and 2·ranks − 1 − i, since late positions see more than early ones.
    """
    return np.concatenate([np.arange(block.start, block.stop) for block in zigzag(sequence, ranks, rank)])


@dataclass(frozen=True)
class RingStep:
    """What a rank multiplies while it has the keys and values of rank `source`: these blocks of queries and of keys."""

    source: int
    queries: tuple[int, ...]
    keys: tuple[int, ...]

    @property
    def causal(self) -> bool:
        """Whether these are the rank's own blocks, of which the triangle counts; of others, all is seen."""
        return self.queries == self.keys

    @property
    def products(self) -> list[tuple[int, int]]:
        """The pairs of blocks (queries, keys) that are multiplied."""
        return [(query, key) for query in self.queries for key in self.keys if key <= query]


def ring_steps(ranks: int, rank: int) -> list[RingStep]:
    """Return the steps of a rank: three products of blocks in the first, of which two are triangles, two in every other.

    That is 2·ranks + 1 on every rank, and together they are the triangle of 2·ranks blocks, each once. Queries × keys:

        rank | has   | step 0    | step 1    | step 2
        0    | 0 5   | 0 5 × 0 5 | 5 × 2 3   | 5 × 1 4
        1    | 1 4   | 1 4 × 1 4 | 1 4 × 0   | 4 × 2 3
        2    | 2 3   | 2 3 × 2 3 | 2 3 × 1   | 2 3 × 0

    (Brandon 2023, arXiv 2311.09431, balances by single positions in stripes; blocks leave the products whole.)
    """
    last = 2 * ranks - 1
    steps = [RingStep(rank, (rank, last - rank), (rank, last - rank))]
    for source in ((rank - distance) % ranks for distance in range(1, ranks)):
        if source < rank:
            steps.append(RingStep(source, (rank, last - rank), (source,)))
        else:
            steps.append(RingStep(source, (last - rank,), (source, last - source)))
    return steps


def ring_tiles(step: RingStep, sequence: int, ranks: int) -> list[tuple[slice, slice]]:
    """Return what is computed at once in a step: a run of queries and the keys that it sees, as places in their rank's share.

    In a causal step the last keys of a tile are those of its queries, and form a triangle with them.
    """
    lengths = [len(share(sequence, 2 * ranks, block)) for block in range(2 * ranks)]
    late = step.queries[-1]
    early = 2 * ranks - 1 - late
    keys = sum(lengths[block] for block in step.keys)
    runs = _runs(lengths[early], lengths[early] + lengths[late])
    if early in step.queries:
        runs = _runs(0, lengths[early]) + runs
    return [(run, slice(0, run.stop if step.causal else keys)) for run in runs if keys]


class _Ring:
    """The keys and values of all ranks, each of which goes on to the next rank while it is computed with.

    `keys` is an array of this rank's; sending and receiving take turns in two buffers.
    """

    def __init__(self, axis: Communicator, sequence: int, keys: Array) -> None:
        self.axis = axis
        self.steps = ring_steps(axis.size, axis.rank)
        self.following, self.previous = (axis.rank + 1) % axis.size, (axis.rank - 1) % axis.size
        self._counts = [sum(map(len, zigzag(sequence, axis.size, rank))) for rank in range(axis.size)]
        self._keys = keys

    def buffer(self) -> Array:
        """Room for the keys and values of any rank."""
        sequences, groups, _, _, size = self._keys.shape
        elements = 2 * sequences * groups * max(self._counts) * size
        return array_module(self._keys).empty(elements, self._keys.dtype)

    def view(self, buffer: Array, source: int) -> Array:
        """The beginning of a buffer as the keys and values (2, B, G, 1, S, E) of a rank."""
        shape = (2, *self._keys.shape[:3], self._counts[source], self._keys.shape[-1])
        return buffer[: math.prod(shape)].reshape(shape)

    def rounds(self, values: Array) -> Iterator[tuple[RingStep, Array, list[Work[Any]]]]:
        """Yield each step, its keys and values, and the messages that are under way meanwhile."""
        given, taken = self.buffer(), self.buffer()
        own = self.view(given, self.axis.rank)
        own[0], own[1] = self._keys, values
        for step, after in zip(self.steps, [*self.steps[1:], None], strict=True):
            messages: list[Work[Any]] = []
            block = self.view(given, step.source)
            if after is not None:
                coming = self.view(taken, after.source)
                messages = [
                    self.axis.recv(coming, self.previous, _KEYS, async_op=True),
                    self.axis.send(block, self.following, _KEYS, async_op=True),
                ]
            yield step, block, messages
            for message in messages:
                message.wait()
            given, taken = taken, given


class _Gradients:
    """The gradients of keys and values, which follow these round the ring: every rank adds its part, the last sends them home.

    What a rank adds to its own stays there, so the others' go one step less than round. The sum of a rank's part is made
    in one of two buffers while the other is sent.
    """

    def __init__(self, ring: _Ring, keys: Array, values: Array) -> None:
        self._ring, self._own = ring, (keys, values)
        self._parts, self._inbox = (ring.buffer(), ring.buffer()), ring.buffer()
        self._part: Array = None
        self._arriving: Work[Any] | None = None
        self._sending: Work[Any] | None = None

    @property
    def messages(self) -> list[Work[Any]]:
        """What may be under way."""
        return [work for work in (self._arriving, self._sending) if work is not None]

    def begin(self, number: int, step: RingStep) -> tuple[Array, Array]:
        """Return where the gradients of a step's keys and values are to be added."""
        if number == 0:
            return self._own
        self._part = self._ring.view(self._parts[number % 2], step.source)
        self._part[...] = 0
        if number > 1:
            self._arriving = self._receive(step.source)
        return self._part[0], self._part[1]

    def end(self, number: int) -> None:
        """Add what other ranks have found, and send it on."""
        if number == 0:
            return
        if self._arriving is not None:
            self._part += self._arriving.wait()
        if self._sending is not None:
            self._sending.wait()
        self._sending = self._ring.axis.send(self._part, self._ring.following, _GRADIENTS, async_op=True)

    def finish(self) -> None:
        """Add what has come home."""
        if self._sending is not None:
            for own, others in zip(self._own, self._receive(self._ring.axis.rank).wait(), strict=True):
                own += others
            self._sending.wait()

    def _receive(self, source: int) -> Work[Any]:
        target = self._ring.view(self._inbox, source)
        work: Work[Any] = self._ring.axis.recv(target, self._ring.previous, _GRADIENTS, async_op=True)
        return work


def _advance(messages: list[Work[Any]]) -> None:
    """Let messages move: over some transports they do only when somebody asks."""
    for message in messages:
        message.done()


def _scores(queries: Array, keys: Array, causal: bool) -> Array:
    """Queries times keysᵀ, −∞ where one of the last keys comes after its query."""
    xp = array_module(queries)
    scores = xp.matmul(queries, keys.swapaxes(-1, -2))
    if causal:
        run = scores.shape[-2]
        xp.copyto(scores[..., -run:], -math.inf, where=~xp.tri(run, dtype=bool))
    return scores


def _ring_attention(
    packed: Tensor, heads: int, axis: Communicator, sequence: int, groups: int | None = None
) -> tuple[Array, Saved]:
    """As `causal_attention` of a sequence of so many positions, of which packed holds `positions(…)` of this rank.

    All ranks of `axis` call it together, and its product too. It keeps the logarithm of each row's sum in place of weights
    (Dao 2023, arXiv 2307.08691), and has the scores of one run of queries and one rank's keys at a time.
    """
    data = packed.data
    groups = _groups("ring_attention", data, heads, groups)
    xp = array_module(data)
    sequences, found, _ = data.shape
    expected = len(positions(sequence, axis.size, axis.rank))
    if found != expected:
        raise ValueError(
            f"ring_attention: packed has {found} positions, but rank {axis.rank} of {axis.size} holds {expected} of a "
            f"sequence of {sequence}; take those of positions({sequence}, {axis.size}, {axis.rank})"
        )
    q, k, v = _split(data, heads, groups)
    size = q.shape[-1]
    q = q * (1 / math.sqrt(size))
    result = xp.zeros((sequences, found, heads * size), data.dtype)
    by_head = _by_head(result, heads, groups)
    largest = xp.full(q.shape[:-1], -math.inf, data.dtype)
    total = xp.zeros(q.shape[:-1], data.dtype)
    ring = _Ring(axis, sequence, k)
    for step, (keys, values), messages in ring.rounds(v):
        for run, seen in ring_tiles(step, sequence, axis.size):
            _advance(messages)
            weights = _scores(q[..., run, :], keys[..., seen, :], step.causal)
            before, part = largest[..., run], by_head[..., run, :]
            now = xp.maximum(before, weights.max(-1))
            weights -= now[..., None]
            xp.exp(weights, out=weights)
            factor = xp.exp(before - now)
            total[..., run] = total[..., run] * factor + weights.sum(-1)
            part *= factor[..., None]
            part += xp.matmul(weights, values[..., seen, :])
            largest[..., run] = now
    by_head /= total[..., None]
    return result, (data, result, largest + xp.log(total), heads, groups, axis, sequence)


def _ring_attention_packed(g: Array, saved: Saved) -> Array:
    packed, result, logarithms, heads, groups, axis, sequence = saved
    xp = array_module(g)
    q, k, v = _split(packed, heads, groups)
    scale = 1 / math.sqrt(q.shape[-1])
    q = q * scale
    g = _by_head(g, heads, groups)
    shares = (g * _by_head(result, heads, groups)).sum(-1)
    gradient = xp.zeros(packed.shape, packed.dtype)
    q_gradient, k_gradient, v_gradient = _split(gradient, heads, groups)
    ring = _Ring(axis, sequence, k)
    travelling = _Gradients(ring, k_gradient, v_gradient)
    for number, (step, (keys, values), messages) in enumerate(ring.rounds(v)):
        to_keys, to_values = travelling.begin(number, step)
        for run, seen in ring_tiles(step, sequence, axis.size):
            _advance(messages + travelling.messages)
            weights = _scores(q[..., run, :], keys[..., seen, :], step.causal)
            weights -= logarithms[..., run, None]
            xp.exp(weights, out=weights)
            to_values[..., seen, :] += _over_queries(weights, g[..., run, :])
            slopes = xp.matmul(g[..., run, :], values[..., seen, :].swapaxes(-1, -2))
            slopes -= shares[..., run, None]
            slopes *= weights
            q_gradient[..., run, :] += xp.matmul(slopes, keys[..., seen, :])
            to_keys[..., seen, :] += _over_queries(slopes, q[..., run, :])
        travelling.end(number)
    travelling.finish()
    q_gradient *= scale
    return gradient


ring_attention = Operation("ring_attention", _ring_attention, (_ring_attention_packed,), _BY_HEADS)
