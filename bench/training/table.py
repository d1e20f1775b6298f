"""The columns of the training benchmark: what is reckoned from the times, and how it is printed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Final

from bench.training.contestants import ALONE, RIVALS, TORCH


@dataclass
class Measured:
    """Of one contestant: the losses of its first steps, and of the slowest rank one number a round, and bytes."""

    losses: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    """Of a step."""
    alone: list[float] = field(default_factory=list)
    """Of a step without any communication."""
    waits: list[float] = field(default_factory=list)
    """Of a step, in collectives, as the library itself counts them."""
    before: int = 0
    peak: int = 0

    @property
    def time(self) -> float:
        """Seconds of a step: the median over the rounds."""
        return float(median(self.seconds))


@dataclass
class Row:
    """One line of the table; None: it cannot be told."""

    layout: str
    contestant: str
    ranks: int
    milliseconds: float
    tokens_per_second: float
    rival: str | None
    """What the next two compare with: PyTorch's way to do the same; for exact sums the same without."""
    ratio: float | None
    """The time of the rival ÷ this one's."""
    memory: float | None
    """The peak of this one ÷ the rival's."""
    fsdp2: float | None
    """The time of FSDP2 ÷ this one's."""
    scaling: float | None
    """Tokens a second ÷ (cores in use × those of the same library on one rank)."""
    peak_bytes: int
    before_bytes: int
    unhidden_milliseconds: float | None
    waits_milliseconds: float | None
    losses: list[float]
    difference: float | None
    """The largest difference of a loss to that of the contestant which all on so many ranks are compared with."""
    seconds: list[float]
    """Of a step, one number a round."""
    seconds_alone: list[float]
    """Of a step without any communication, likewise."""


def rows(measured: Mapping[str, tuple[int, Measured]], tokens: int, cores: int, layout: str = "dp") -> list[Row]:
    """One row a contestant; `tokens` is what one rank takes in a step where each has a share of the batch."""
    table = []
    for name, (ranks, found) in measured.items():
        rival, fsdp2 = _of(measured, RIVALS.get(name, "")), _of(measured, "fsdp2")
        one = _of(measured, "torch" if name in TORCH else "alone")
        reference = _reference(measured, name)
        apart = [together - alone for together, alone in zip(found.seconds, found.alone, strict=False)]
        row = Row(
            layout, name, ranks, found.time * 1e3, ranks * tokens / found.time,
            rival=RIVALS[name] if rival else None,
            ratio=rival.time / found.time if rival else None,
            memory=found.peak / rival.peak if rival and rival.peak else None,
            fsdp2=fsdp2.time / found.time if fsdp2 and name not in ALONE else None,
            scaling=one.time / found.time * ranks / min(ranks, cores) if one and name not in ALONE else None,
            peak_bytes=found.peak,
            before_bytes=found.before,
            unhidden_milliseconds=median(apart) * 1e3 if apart else None,
            waits_milliseconds=median(found.waits) * 1e3 if found.waits and name not in ALONE else None,
            losses=found.losses,
            difference=_difference(found.losses, reference.losses) if reference else None,
            seconds=found.seconds,
            seconds_alone=found.alone,
        )  # fmt: skip
        table.append(row)
    return table


def _of(measured: Mapping[str, tuple[int, Measured]], name: str) -> Measured | None:
    return measured[name][1] if name in measured else None


def _reference(measured: Mapping[str, tuple[int, Measured]], name: str) -> Measured | None:
    """What the losses are compared with: those of the first of PyTorch's that is here, or else of ours."""
    alike = [other for other in measured if (other in ALONE) == (name in ALONE)]
    first = next((other for other in (*TORCH, *alike) if other in alike), name)
    return measured[first][1] if first != name else None


def _difference(losses: list[float], others: list[float]) -> float:
    return max(abs(one - other) for one, other in zip(losses, others, strict=True))


TITLE: Final = (
    "ratio = time of the one under `against` ÷ this one's, above 1 this one is faster; memory = peak of this one ÷ that "
    "one's, below 1 this one takes less; fsdp2 = time of PyTorch's FSDP2 ÷ this one's"
)
HEADER: Final = (
    f"{'with':>17} {'ranks':>5} {'step':>8} {'tokens':>9} {'against':>17} {'ratio':>6} {'memory':>6} {'fsdp2':>6} {'scaling':>7} "
    f"{'peak':>7} {'before':>7} {'unhidden':>8} {'waits':>7} {'loss':>8} {'differs':>8}\n"
    f"{'':>17} {'':>5} {'(ms)':>8} {'(1/s)':>9} {'':>17} {'':>6} {'':>6} {'':>6} {'':>7} {'(MiB)':>7} {'(MiB)':>7} {'(ms)':>8} "
    f"{'(ms)':>7} {'':>8}"
)


def line(row: Row) -> str:
    """The row as printed."""
    return (
        f"{row.contestant:>17} {row.ranks:5} {row.milliseconds:8.1f} {row.tokens_per_second:9.0f} {row.rival or '':>17} "
        f"{_short(row.ratio):>6} {_short(row.memory):>6} {_short(row.fsdp2):>6} {_short(row.scaling):>7} "
        f"{row.peak_bytes / 2**20:7.1f} {row.before_bytes / 2**20:7.1f} {_short(row.unhidden_milliseconds, 1):>8} "
        f"{_short(row.waits_milliseconds, 1):>7} {row.losses[-1]:8.5f} "
        f"{'' if row.difference is None else f'{row.difference:.1e}':>8}"
    ).rstrip()


def summary(table: Sequence[Row]) -> str:
    """Ours as Markdown, a line for each, those on one rank of the first layout only; then what exact sums cost."""
    headings = (
        "ranks", "layout", "with", "against", "tokens/s ÷ its (above 1: ours is faster)", "FSDP2 ÷ ours",
        "memory ÷ its (below 1: ours takes less)", "scaling", "peak MiB",
    )  # fmt: skip
    lines = [f"| {' | '.join(headings)} |", "|---" * len(headings) + "|"]
    for row in table:
        if row.contestant in TORCH or (row.contestant in ALONE and row.layout != table[0].layout):
            continue
        numbers = (row.ratio, row.fsdp2, row.memory, row.scaling)
        cells = (row.layout, row.contestant, row.rival or "", *map(_short, numbers), f"{row.peak_bytes / 2**20:.0f}")
        lines.append(f"| {row.ranks} | {' | '.join(cells)} |")
    exact = [
        f"- {row.contestant} takes {1 / row.ratio:.2f} times as long as {row.rival} on {row.ranks} ranks"
        for row in table
        if row.contestant.endswith("-exact") and row.ratio
    ]
    return "\n".join([*lines, *([""] if exact else []), *exact])


def _short(number: float | None, digits: int = 2) -> str:
    return "" if number is None else f"{number:.{digits}f}"
