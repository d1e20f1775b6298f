"""The columns of the training benchmark: what is reckoned from the times, and how it is printed."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from statistics import median
from typing import Final

from bench.training.contestants import ALONE, TORCH


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

    contestant: str
    ranks: int
    milliseconds: float
    tokens_per_second: float
    ratio: float | None
    """The time of PyTorch's DDP (on one rank of plain PyTorch) ÷ this one's."""
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


def rows(measured: Mapping[str, tuple[int, Measured]], tokens: int, cores: int) -> list[Row]:
    """One row a contestant; `tokens` is what one rank takes in a step."""
    table = []
    for name, (ranks, found) in measured.items():
        peer, fsdp2 = _of(measured, "torch" if name in ALONE else "ddp"), _of(measured, "fsdp2")
        one = _of(measured, "torch" if name in TORCH else "alone")
        reference = _reference(measured, name)
        apart = [together - alone for together, alone in zip(found.seconds, found.alone, strict=False)]
        row = Row(
            name, ranks, found.time * 1e3, ranks * tokens / found.time,
            ratio=peer.time / found.time if peer else None,
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
    """What the losses are compared with: plain PyTorch's or DDP's, or else those of the first mode of ours."""
    alike = [other for other in measured if (other in ALONE) == (name in ALONE)]
    first = next((other for other in ("torch", "ddp", *alike) if other in alike), name)
    return measured[first][1] if first != name else None


def _difference(losses: list[float], others: list[float]) -> float:
    return max(abs(one - other) for one, other in zip(losses, others, strict=True))


TITLE: Final = "ratio, fsdp2 = time of PyTorch's DDP (on one rank: of plain PyTorch), of its FSDP2 ÷ this one's; above 1 this one is faster"
HEADER: Final = (
    f"{'with':>8} {'ranks':>5} {'step':>8} {'tokens':>9} {'ratio':>6} {'fsdp2':>6} {'scaling':>7} {'peak':>7} {'before':>7} "
    f"{'unhidden':>8} {'waits':>7} {'loss':>8} {'differs':>8}\n"
    f"{'':>8} {'':>5} {'(ms)':>8} {'(1/s)':>9} {'':>6} {'':>6} {'':>7} {'(MiB)':>7} {'(MiB)':>7} {'(ms)':>8} {'(ms)':>7} {'':>8}"
)


def line(row: Row) -> str:
    """The row as printed."""
    return (
        f"{row.contestant:>8} {row.ranks:5} {row.milliseconds:8.1f} {row.tokens_per_second:9.0f} {_short(row.ratio):>6} "
        f"{_short(row.fsdp2):>6} {_short(row.scaling):>7} {row.peak_bytes / 2**20:7.1f} {row.before_bytes / 2**20:7.1f} "
        f"{_short(row.unhidden_milliseconds, 1):>8} {_short(row.waits_milliseconds, 1):>7} {row.losses[-1]:8.5f} "
        f"{'' if row.difference is None else f'{row.difference:.1e}':>8}"
    ).rstrip()


def summary(table: Iterable[Row]) -> str:
    """Ours as Markdown, a line for each."""
    ours = [row for row in table if row.contestant not in TORCH]
    lines = ["| ranks | with | DDP ÷ ours | FSDP2 ÷ ours | scaling | peak MiB |", "|---|---|---|---|---|---|"]
    for row in ours:
        numbers = (_short(row.ratio), _short(row.fsdp2), _short(row.scaling), f"{row.peak_bytes / 2**20:.0f}")
        lines.append(f"| {row.ranks} | {row.contestant} | {' | '.join(numbers)} |")
    return "\n".join(lines)


def _short(number: float | None, digits: int = 2) -> str:
    return "" if number is None else f"{number:.{digits}f}"
