"""One-hop all-reduce."""

from __future__ import annotations

from collections.abc import Iterator

from collectives.algorithms.registry import algorithm
from collectives.schedule import Ref, Row, Schedule, copy, fold, recv, send


@algorithm("all_reduce", "one_hop")
def one_hop_all_reduce(size: int, root: int) -> Schedule:
    """Everyone sends everything to everyone and folds in rank order: one hop, the latency bound where messages overlap.

    (p − 1)·N bytes sent per rank, p·N of scratch (the "one-shot" all-reduce of NVIDIA's TensorRT-LLM).
    """

    def program(rank: int) -> Iterator[Row]:
        exchange = [copy(Ref("in", 0), Ref("tmp", rank))]
        for distance in range(1, size):
            to, back = (rank + distance) % size, (rank - distance) % size
            exchange += [send(to, Ref("in", 0)), recv(back, Ref("tmp", back))]
        yield tuple(exchange)
        yield (fold(Ref("tmp", 0, size), Ref("out", 0)),)

    return Schedule("all_reduce", "one_hop", size, program, scratch=lambda rank: (Ref("in", 0),) * size)
