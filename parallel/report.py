"""What a training leaves behind: a JSON file, a table of bytes, and a picture of the loss."""

from __future__ import annotations

import json
import os
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from parallel.formulas import Memory


class ReportError(ValueError):
    """A file that was asked for cannot be made; the message says which and what to do."""


@dataclass(frozen=True)
class Traffic:
    """Bytes that every rank sent on one axis of the layout: measured by the transport, and by the formula."""

    measured: tuple[int, ...]
    formula: tuple[int, ...]

    @property
    def exact(self) -> bool:
        """Whether every rank sent precisely what the formula says."""
        return self.measured == self.formula

    def document(self) -> dict[str, Any]:
        """Return the numbers for the report, with their totals over the ranks."""
        return {
            "measured": list(self.measured),
            "formula": list(self.formula),
            "measured_total": sum(self.measured),
            "formula_total": sum(self.formula),
        }


def check_writable(path: str, flag: str) -> None:
    """Raise ReportError unless a file can be written at `path`, so that a training does not end in vain."""
    if not path:
        raise ReportError(f"{flag} is empty; name a file, or leave {flag} out")
    folder = Path(path).parent
    if not folder.is_dir():
        raise ReportError(f"{flag} {path}: there is no folder {folder}; create it first")
    if Path(path).is_dir():
        raise ReportError(f"{flag} {path}: that is a folder; name a file in it")
    try:
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise ReportError(f"{flag} {path}: cannot write in {folder}: {error.strerror}") from error


def check_plotting(path: str, flag: str = "--plot") -> None:
    """Raise ReportError unless `plot` can make a file at `path`."""
    try:
        import matplotlib as mpl  # noqa: F401
    except ImportError as error:
        raise ReportError(
            f"{flag} {path}: matplotlib is missing; install the extra 'train', or leave {flag} out"
        ) from error
    if Path(path).suffix not in (".png", ".svg", ".pdf"):
        raise ReportError(f"{flag} {path}: the name must end in .png, .svg or .pdf")
    check_writable(path, flag)


def write_json(path: str, document: Mapping[str, Any]) -> None:
    """Write the document whole or not at all: to a temporary file beside `path` that then takes its place."""
    target = Path(path)
    descriptor, temporary = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            json.dump(document, file, indent=1)
            file.write("\n")
        Path(temporary).chmod(0o644)
        Path(temporary).replace(target)
    except BaseException:
        Path(temporary).unlink()
        raise


def traffic_table(axes: Mapping[str, Traffic]) -> str:
    """Return a table of the bytes that each rank sent on each axis, beside the formula's."""
    rows = [("axis", "rank", "bytes sent", "formula", "")]
    for axis, traffic in axes.items():
        for rank, (measured, formula) in enumerate(zip(traffic.measured, traffic.formula, strict=True)):
            rows.append((axis, str(rank), f"{measured:,}", f"{formula:,}", verdict(measured, formula)))
    return table(rows)


def verdict(measured: int, formula: int) -> str:
    """Return whether two numbers are equal, and by how much they differ otherwise."""
    return "equal" if measured == formula else f"differs by {measured - formula:+,}"


def memory_table(measured: Memory, predicted: Memory, peak_resident: int) -> str:
    """Return a table of the bytes that a rank holds, beside the formula's, and the most that its process ever held."""
    rows = [("kind", "bytes", "formula", "")]
    for kind, found in asdict(measured).items():
        formula = getattr(predicted, kind)
        rows.append((kind, f"{found:,}", f"{formula:,}", verdict(found, formula)))
    rows.append(("peak resident", f"{peak_resident:,}", "", "with Python and its libraries"))
    return table(rows)


def table(rows: Sequence[tuple[str, ...]]) -> str:
    """Return rows as text: columns flush right, the last one flush left."""
    last = len(rows[0]) - 1
    widths = [max(len(row[column]) for row in rows) for column in range(last)]
    return "\n".join(
        "  ".join(["", *(cell.rjust(width) for cell, width in zip(row, widths, strict=False)), row[last]]).rstrip()
        for row in rows
    )


def plot(
    path: str,
    losses: Sequence[float],
    ranks: int,
    single_rank_losses: Sequence[float],
    validation: tuple[float, float],
    unigram: float,
    first: int = 0,
) -> None:
    """Draw the losses of all steps, those of one rank, validation before and after, and the unigram line."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    steps = first + len(losses)
    axes.plot(range(first + 1, steps + 1), losses, color="tab:blue", linewidth=1, label=f"training, {ranks} ranks")
    if single_rank_losses:
        numbers = range(first + 1, first + len(single_rank_losses) + 1)
        axes.plot(numbers, single_rank_losses, "--", color="tab:orange", linewidth=2.5, label="training, 1 rank")
    axes.plot(
        [first, steps],
        validation,
        "D",
        color="tab:green",
        clip_on=False,
        zorder=5,
        label="validation, before and after",
    )
    axes.axhline(unigram, color="tab:gray", linestyle="-.", label="byte frequencies alone")
    axes.set(xlabel="step", ylabel="loss (nats a byte)", xlim=(first, steps), title="Training and validation loss")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)
