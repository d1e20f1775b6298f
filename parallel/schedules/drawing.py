"""A pipeline schedule as a picture: its planned timeline and, under it, what was measured."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from parallel.schedules.actions import Action, Kind
from parallel.schedules.timing import Times, times

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from parallel.schedules.table import Schedule

Bar = tuple[Action, float, float]
"""An action, its begin and its end."""

_LOOKS = {
    Kind.FORWARD: ("tab:blue", "forward"),
    Kind.BACKWARD: ("tab:green", "backward"),
    Kind.INPUT_GRADIENT: ("tab:orange", "input gradient"),
    Kind.WEIGHT_GRADIENT: ("tab:purple", "weight gradient"),
}
_NUMBERED = 1500
"""The numbers of more actions than these could not be read."""


def draw(
    path: str | Path,
    schedule: Schedule,
    measured: Sequence[Sequence[Bar]] | None = None,
    plan: Times | None = None,
) -> None:
    """Write a chart of the planned timeline, a row a rank, in the format that the name of the file says.

    `plan` is that of unit costs by default. `measured` has for each rank what ran, in seconds of one clock. It is drawn under
    the plan on the same axis: the first action begins at 0, and the unit is chosen so that the actions take as long in all as
    they do in the plan, which leaves the waiting to be compared. Earlier chunks of a rank are paler. Needs matplotlib.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    plan = times(schedule) if plan is None else plan
    lines: list[tuple[str, list[Bar]]] = []
    scale, zero = _unit(measured or (), sum(float(plan.work(rank)) for rank in range(schedule.ranks)))
    for rank, (row, spans) in enumerate(zip(schedule.rows, plan.rows, strict=True)):
        planned = [(action, float(begin), float(end)) for action, (begin, end) in zip(row, spans, strict=True)]
        lines.append((f"rank {rank}", planned))
        if measured is not None:
            lines.append(
                ("measured", [(a, (begin - zero) * scale, (end - zero) * scale) for a, begin, end in measured[rank]])
            )
    figure = Figure(figsize=(12, 1.5 + 0.4 * len(lines)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    numbered = sum(len(bars) for _, bars in lines) <= _NUMBERED
    for line, (_, bars) in enumerate(lines):
        _draw_line(axes, line, bars, schedule.chunks, numbered)
    looks = [_LOOKS[kind] for kind in dict.fromkeys(action.kind for row in schedule.rows for action in row)]
    figure.legend(
        handles=[Patch(facecolor=color, label=name) for color, name in looks],
        loc="outside lower center", ncols=len(looks), frameon=False,
    )  # fmt: skip
    title = str(schedule).partition("\n")[0]
    axes.set(xlabel="planned time", title=title, yticks=range(len(lines)), yticklabels=[name for name, _ in lines])
    axes.margins(x=0.01)
    axes.invert_yaxis()
    if measured is not None:
        conversions: Any = (lambda time: time * 1e3 / scale, lambda milliseconds: milliseconds * scale / 1e3)
        axes.secondary_xaxis("top", functions=conversions).set_xlabel("measured, ms")
    figure.savefig(path, dpi=110)


def _unit(measured: Sequence[Sequence[Bar]], work: float) -> tuple[float, float]:
    """Planned time in a measured second, and the second at which everything began."""
    bars = [bar for row in measured for bar in row]
    seconds = sum(end - begin for _, begin, end in bars)
    return (work / seconds if seconds > 0 else 1.0), min((begin for _, begin, _ in bars), default=0.0)


def _draw_line(axes: Any, line: int, bars: Sequence[Bar], chunks: int, numbered: bool) -> None:
    from matplotlib.colors import to_rgb

    def shade(action: Action) -> tuple[float, ...]:
        strength = 1.0 if chunks == 1 else 0.5 + 0.5 * action.chunk / (chunks - 1)
        return tuple(1 - strength * (1 - part) for part in to_rgb(_LOOKS[action.kind][0]))

    axes.broken_barh(
        [(begin, end - begin) for _, begin, end in bars], (line - 0.42, 0.84),
        facecolors=[shade(action) for action, _, _ in bars], edgecolor="white", linewidth=0.4,
    )  # fmt: skip
    if numbered:
        for action, begin, end in bars:
            axes.text((begin + end) / 2, line, str(action.micro_batch), ha="center", va="center", size=6, clip_on=True)
