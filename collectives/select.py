"""Which algorithm runs: the cheapest by the costs of the link, the same on every rank, and the reasons for it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Final

from collectives.algorithms import Algorithm, find, registered
from collectives.costs import LinkCosts
from collectives.plan import elements_sent
from collectives.predict import predict, whole_blocks
from collectives.schedule import Kind, Schedule
from collectives.spec import COLLECTIVES
from collectives.verify import verify

LARGE_MESSAGE: Final = 16 * 1024
"""Bytes from which only algorithms that send the fewest bytes are considered: an all_reduce sends 2·(p − 1)/p·N."""

MODELLED_RANKS: Final = 16
"""Up to so many ranks every message is priced. Beyond, the choice is that for so many, with as many bytes a rank."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """An algorithm with its price."""

    name: str
    seconds: float
    most_sent: float
    """Bytes sent by the rank that sends most."""


@lru_cache
def in_rank_order(entry: Algorithm) -> bool:
    """Whether every result of the algorithm is one fold in rank order, as the verifier finds (at 5 ranks, which tell)."""
    return verify(entry.schedule(5), in_place=False).rank_ordered


def choose(
    collective: str, nbytes: int, size: int, costs: LinkCosts, slice_bytes: int, *, deterministic: bool, even: bool
) -> str:
    """The name of the cheapest algorithm for a whole buffer of `nbytes` over `size` ranks.

    Sizes are classed by powers of two and priced in the middle of their class, so that a choice is made once and then looked up.
    `deterministic`: only reductions in rank order. `even`: all blocks have equal counts.
    """
    return ranking(collective, nbytes.bit_length(), size, costs, slice_bytes, deterministic, even)[0].name


@lru_cache(maxsize=4096)
def ranking(
    collective: str, size_class: int, size: int, costs: LinkCosts, slice_bytes: int, deterministic: bool, even: bool
) -> tuple[Candidate, ...]:
    """The algorithms that may run, cheapest first, for whole buffers of 2^(size_class − 1) to 2^size_class bytes."""
    smallest = 1 << size_class >> 1
    nbytes = smallest + smallest // 2
    if size > MODELLED_RANKS:
        # As many bytes a rank, and a power of two where the size is one: what some algorithms are made for.
        modelled = MODELLED_RANKS if size & (size - 1) == 0 else MODELLED_RANKS * 3 // 4
        nbytes, size = nbytes * modelled // size, modelled
    schedules, _ = _considered(collective, smallest, size, deterministic, even)
    found = [Candidate(s.algorithm, predict(s, nbytes, costs, slice_bytes), _most_sent(s) * nbytes) for s in schedules]
    return tuple(sorted(found, key=lambda candidate: (candidate.seconds, candidate.name)))


def _considered(
    collective: str, nbytes: int, size: int, deterministic: bool, even: bool, root: int = 0
) -> tuple[list[Schedule], list[tuple[str, str]]]:
    """The schedules that may run, and (algorithm, why not) of the others."""
    left_out: list[tuple[str, str]] = []

    def keep(schedules: list[Schedule], serves: Callable[[Schedule], bool], why: str) -> list[Schedule]:
        left_out.extend((s.algorithm, why) for s in schedules if not serves(s))
        return [s for s in schedules if serves(s)]

    found = [entry.schedule(size, root) for entry in registered(collective)]
    if not even:
        found = keep(found, lambda s: not s.even, "needs blocks of equal counts")
    if deterministic and COLLECTIVES[collective].reduces:
        found = keep(found, lambda s: in_rank_order(find(collective, s.algorithm)), "does not reduce in rank order")
    if nbytes >= LARGE_MESSAGE:
        least = min(map(_most_sent, found)) * 1.001
        found = keep(
            found, lambda s: _most_sent(s) <= least, "sends more bytes than others, which counts for large messages"
        )
        modest = max(1.0, min(map(_scratch, found)))
        found = keep(found, lambda s: _scratch(s) <= modest, "needs more scratch memory than the whole buffer")
    return found, left_out


@lru_cache(maxsize=512)
def _most_sent(schedule: Schedule) -> float:
    """What the rank that sends most sends, in whole buffers."""
    sent = (
        sum(i.source.count for row in program for i in row if i.kind is Kind.SEND and i.source is not None)
        for program in schedule.programs
    )
    return max(sent) / (whole_blocks(schedule) * schedule.pieces)


@lru_cache(maxsize=512)
def _scratch(schedule: Schedule) -> float:
    """The most scratch memory of any rank, in whole buffers."""
    return max(len(schedule.scratch(rank)) for rank in range(schedule.size)) / (
        whole_blocks(schedule) * schedule.pieces
    )


@dataclass(frozen=True, slots=True)
class Explanation:
    """Which algorithm a call runs, and why; made by `Communicator.explain`."""

    collective: str
    nbytes: int
    size: int
    transport: str
    algorithm: str
    slices: int
    """Into which the largest chunk is cut."""
    predicted_seconds: float
    bytes_sent: tuple[int, ...]
    """By each rank, exactly."""
    costs: LinkCosts
    runners_up: tuple[Candidate, ...]
    """The others that were considered, cheapest first."""
    left_out: tuple[tuple[str, str], ...]
    """(algorithm, why) of those that were not."""

    def __str__(self) -> str:
        def line(name: str, seconds: float, most: float) -> str:
            return f"{name:20} {seconds * 1e6:12,.1f} µs {most:16,.0f} bytes sent by a rank at most"

        head = (
            f"{self.collective} of {self.nbytes:,} bytes over {self.size} ranks by {self.transport}: {self.algorithm}, "
            f"{self.slices} slice{'s' * (self.slices != 1)} a chunk"
        )
        lines = [line(self.algorithm, self.predicted_seconds, max(self.bytes_sent))]
        lines += [line(other.name, other.seconds, other.most_sent) for other in self.runners_up]
        lines += [f"{name:20} left out: {why}" for name, why in self.left_out]
        return "\n  ".join([head, *lines, str(self.costs)])


def bytes_sent(schedule: Schedule, nbytes: int, itemsize: int) -> tuple[int, ...]:
    """What every rank sends, exactly, when the whole buffer has `nbytes` in elements of `itemsize`, in blocks of equal counts."""
    spec, size, root = COLLECTIVES[schedule.collective], schedule.size, schedule.root
    count = nbytes // itemsize // whole_blocks(schedule)
    return tuple(
        itemsize
        * elements_sent(
            schedule,
            rank,
            (count,) * spec.input_blocks(size, rank, root),
            (count,) * spec.output_blocks(size, rank, root),
        )
        for rank in range(size)
    )


def explain(
    collective: str,
    nbytes: int,
    itemsize: int,
    size: int,
    root: int,
    transport: str,
    costs: LinkCosts,
    slice_bytes: int,
    *,
    deterministic: bool,
    algorithm: str | None = None,
) -> Explanation:
    """As `Communicator.explain`, for any communicator; `algorithm` is one that was chosen otherwise."""
    name = algorithm or choose(collective, nbytes, size, costs, slice_bytes, deterministic=deterministic, even=True)
    considered, left_out = _considered(collective, 1 << nbytes.bit_length() >> 1, size, deterministic, True, root)
    schedule = find(collective, name).schedule(size, root)
    others = [
        Candidate(s.algorithm, predict(s, nbytes, costs, slice_bytes), _most_sent(s) * nbytes)
        for s in considered
        if s.algorithm != name
    ]
    largest = -(-nbytes // (whole_blocks(schedule) * schedule.pieces))
    return Explanation(
        collective, nbytes, size, transport, name, max(1, -(-largest // slice_bytes)),
        predict(schedule, nbytes, costs, slice_bytes), bytes_sent(schedule, nbytes, itemsize), costs,
        tuple(sorted(others, key=lambda other: (other.seconds, other.name))),
        tuple((other, why) for other, why in left_out if other != name),
    )  # fmt: skip
