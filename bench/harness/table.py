"""The columns: what is reckoned from the times, and how it is printed."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Final

from bench.harness.case import ITEM_BYTES, Case
from bench.harness.sizes import label

PEERS: Final = ("openmpi", "mpich", "impi", "gloo")


@dataclass
class Measured:
    """The seconds of one run, one list a rank with one number an iteration, and the elements that were wrong in all."""

    seconds: Sequence[Sequence[float]]
    wrong: int

    @property
    def time(self) -> float:
        """The median over the iterations of the slowest rank in each."""
        return float(median(max(ranks) for ranks in zip(*self.seconds, strict=True)))


@dataclass
class Row:
    """One line of the table."""

    collective: str
    contestant: str
    ranks: int
    asked: int
    """The size that the command line asked for; `size` differs where the ranks cannot share it evenly."""
    size: int
    count: int
    redop: str
    root: int
    microseconds: float
    algbw: float
    busbw: float
    wrong: int
    ratio: float | None = None
    """The best peer's time ÷ this one's; None for peers, and where no peer ran."""
    floor: float | None = None
    """The time that moving the bytes that must move takes at the bandwidth of copies ÷ this one's; None where nothing must."""


def rows(
    case: Case, ranks: int, asked: int, count: int, measured: Mapping[str, Measured], copying: Measured | None
) -> list[Row]:
    """One row a contestant; `copying` is `case.COPY` on the same ranks and count."""
    size = count * ITEM_BYTES
    bandwidth = 2.0 * ranks * size / copying.time if copying is not None else None
    peers = [result.time for name, result in measured.items() if name in PEERS]
    table = []
    for name, result in measured.items():
        algbw = size / result.time / 1e9
        row = Row(
            case.name, name, ranks, asked, size, count, case.redop, case.root, result.time * 1e6, algbw,
            algbw * case.bus_factor(ranks), result.wrong,
        )  # fmt: skip
        if peers and name not in PEERS:
            row.ratio = min(peers) / result.time
        if bandwidth is not None and case.moved(ranks):
            row.floor = case.moved(ranks) * size / bandwidth / result.time
        table.append(row)
    return table


HEADER: Final = (
    f"{'size':>10} {'count':>10} {'type':>7} {'redop':>6} {'root':>4} {'with':>8} {'time':>10} {'algbw':>7} {'busbw':>7} "
    f"{'#wrong':>6} {'ratio':>6} {'floor':>6}\n"
    f"{'(B)':>10} {'(elements)':>10} {'':>7} {'':>6} {'':>4} {'':>8} {'(µs)':>10} {'(GB/s)':>7} {'(GB/s)':>7}"
)


def line(row: Row) -> str:
    """The row as printed."""
    return (
        f"{row.size:10} {row.count:10} {'float32':>7} {row.redop:>6} {row.root:4} {row.contestant:>8} "
        f"{row.microseconds:10.1f} {row.algbw:7.2f} {row.busbw:7.2f} {row.wrong:6} {_short(row.ratio):>6} {_short(row.floor):>6}"
    ).rstrip()


def summary(table: Iterable[Row]) -> str:
    """The ratios of our contestants as Markdown: a line for each collective and contestant, a column for each size."""
    ours = [row for row in table if row.ratio is not None]
    sizes = sorted({row.asked for row in ours})
    cells = {(row.ranks, row.collective, row.contestant, row.asked): row for row in ours}
    lines = [
        "| ranks | collective | with | " + " | ".join(map(label, sizes)) + " |",
        "|---|---|---|" + "---|" * len(sizes),
    ]
    for ranks, collective, contestant in dict.fromkeys(key[:3] for key in cells):
        found = [cells.get((ranks, collective, contestant, size)) for size in sizes]
        lines.append(
            f"| {ranks} | {collective} | {contestant} | "
            + " | ".join(_short(row.ratio) if row else "" for row in found)
            + " |"
        )
    return "\n".join(lines) if ours else ""


def _short(number: float | None) -> str:
    if number is None:
        return ""
    return f"{number:.2f}" if number >= 0.095 else f"{number:.3f}"
