"""What a step sends and what a rank holds, as exact integers, to be compared with what is measured.

Bytes are payload bytes sent.
"""

from __future__ import annotations

from dataclasses import dataclass


def share(count: int, parts: int, index: int) -> range:
    """Return part `index` of `range(count)` cut into `parts` runs whose lengths differ by at most one."""
    quotient, remainder = divmod(count, parts)
    start = index * quotient + min(index, remainder)
    return range(start, start + quotient + (index < remainder))


def all_reduce_bytes(elements: int, itemsize: int, ranks: int) -> int:
    """Return the bytes that all ranks together send in an all_reduce of a large buffer: 2·(p − 1)·N.

    That is 2·(p − 1)/p·N a rank, the least there can be: each rank's contribution to p − 1 parts goes out, and
    its own part's result goes to p − 1 ranks. How ranks share it where p does not divide N is the algorithm's.
    """
    return 2 * (ranks - 1) * elements * itemsize


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
