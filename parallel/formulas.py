"""What a step sends and what a rank holds, as exact integers, to be compared with what is measured.

Bytes are payload bytes sent. The ring algorithms cut n elements into p chunks, of which the first n mod p
have one more.
"""

from __future__ import annotations

from dataclasses import dataclass


def share(count: int, parts: int, index: int) -> range:
    """Return part `index` of `range(count)` cut into `parts` runs whose lengths differ by at most one."""
    quotient, remainder = divmod(count, parts)
    start = index * quotient + min(index, remainder)
    return range(start, start + quotient + (index < remainder))


def ring_all_reduce_bytes(elements: int, itemsize: int, ranks: int, rank: int) -> int:
    """Return the bytes that a rank sends in a ring all_reduce: 2·(p − 1)/p of the buffer if p divides it.

    The reduce-scatter half sends every chunk but the rank's own, and the all-gather half every chunk but its
    successor's.
    """
    if ranks == 1:
        return 0
    kept = len(share(elements, ranks, rank)) + len(share(elements, ranks, (rank + 1) % ranks))
    return (2 * elements - kept) * itemsize


def all_reduce_bytes(elements: int, itemsize: int, ranks: int, rank: int, algorithm: str) -> int:
    """Return the bytes that a rank sends in an all_reduce by `algorithm`: ring, direct or one_hop.

    direct cuts the buffer into shares of whole 64-byte lines: a rank sends each share but its own to the share's owner, and
    its own, reduced, to all others; that is 2·(p − 1)/p of the buffer again if p divides the lines. one_hop, for small
    buffers, sends all of it to every other rank. Raises ValueError for other algorithms.
    """
    if algorithm == "ring":
        return ring_all_reduce_bytes(elements, itemsize, ranks, rank)
    nbytes = elements * itemsize
    if algorithm == "one_hop":
        return (ranks - 1) * nbytes
    if algorithm == "direct":
        lines = share(-(-nbytes // 64), ranks, rank)
        own = max(0, min(nbytes, 64 * lines.stop) - 64 * lines.start)
        return nbytes - own + (ranks - 1) * own
    raise ValueError(f"there is no formula for all_reduce by {algorithm}; expected ring, direct or one_hop")


@dataclass(frozen=True)
class Memory:
    """Bytes that one rank holds for the whole of the training: parameters, gradients, optimizer state."""

    parameters: int
    gradients: int
    optimizer: int


def gpt_parameters(layers: int, hidden: int, sequence: int, vocabulary: int = 256) -> int:
    """Return the number of parameters of a GPT.

    A layer has 12·D² weights (3·D² to queries, keys and values, D² back, 4·D² up and 4·D² down) and 13·D
    biases and normalisation parameters; the embeddings have a vector for every token and position.
    """
    return layers * (12 * hidden + 13) * hidden + (vocabulary + sequence + 2) * hidden


def data_parallel_memory(parameters: int, itemsize: int) -> Memory:
    """Return what a rank holds under data parallelism with Adam: 16 bytes a parameter in float32."""
    return Memory(parameters * itemsize, parameters * itemsize, 2 * parameters * itemsize)
