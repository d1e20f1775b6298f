"""How a pipeline ran, beside what its schedule and the published formulas say: what is in flight, and how long ranks wait."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from parallel.report import table, verdict
from parallel.schedules import Action, Kind, expected_idle, expected_in_flight, times

if TYPE_CHECKING:
    from collections.abc import Sequence

    from parallel.train import Trainer

_KINDS = list(Kind)


@dataclass(frozen=True)
class Conduct:
    """What one rank of a pipeline did.

    `in_flight`: the most micro-batches (times chunks) whose forward had run and whose backward had not; `idle`: of the
    `period` at unit costs, by the schedule's table and by formula, and as a measured share.
    """

    layers: str
    in_flight: int
    expected_in_flight: int
    idle: float
    expected_idle: float
    period: float
    measured_share: float


def conduct(trainer: Trainer) -> list[Conduct]:
    """Return what every rank did in all steps, the waiting as the median of steps; collective.

    A rank waits while it is in none of its actions, from the first to the last one of any rank of its pipeline in a step. Time
    runs by each rank's own clock.
    """
    schedule, mesh, pipeline = trainer.pipeline.schedule, trainer.mesh, trainer.pipeline
    history = trainer.metrics.all_gather(np.array(pipeline.history).reshape(-1, 2))
    most = trainer.metrics.all_gather(np.array([pipeline.most_in_flight]))[:, 0]
    plan, rows = times(schedule), []
    idle = expected_idle(schedule.name, schedule.ranks, schedule.chunks, micro_batches=schedule.micro_batches)
    for rank in range(trainer.metrics.size):
        place = mesh.place(rank)["pp"]
        stages = [stage for stage, (of, _) in enumerate(schedule.places) if of == place]
        layers = ", ".join(_run(trainer.extents[stage].layers) for stage in stages)
        expected = expected_in_flight(schedule.name, schedule.ranks, place, schedule.micro_batches, schedule.chunks)
        periods = history[mesh.along("pp", rank), :, 0].max(axis=0)
        share = float(np.median((periods - history[rank, :, 1]) / periods)) if len(periods) else 0.0
        rows.append(
            Conduct(layers, int(most[rank]), expected, float(plan.idle(place)), float(idle), float(plan.period), share)
        )
    return rows


def _run(layers: range) -> str:
    return f"{layers.start}" if len(layers) == 1 else f"{layers.start}–{layers.stop - 1}"


def conduct_table(rows: Sequence[Conduct]) -> str:
    """Return the ranks as a table; idle is the share of the whole time."""
    lines = [("rank", "layers", "in flight", "formula", "", "idle", "formula", "", "measured")]
    for rank, row in enumerate(rows):
        lines.append(
            (
                str(rank), row.layers, str(row.in_flight), str(row.expected_in_flight),
                verdict(row.in_flight, row.expected_in_flight), f"{row.idle / row.period:.1%}",
                f"{row.expected_idle / row.period:.1%}",
                "equal" if row.idle == row.expected_idle else "", f"{row.measured_share:.1%}",
            )
        )  # fmt: skip
    return table(lines)


def differences(rows: Sequence[Conduct]) -> list[str]:
    """Return what is not as the formulas say, in words."""
    failures = []
    for rank, row in enumerate(rows):
        if row.in_flight != row.expected_in_flight:
            failures.append(
                f"rank {rank} had {row.in_flight} micro-batches in flight, the formula says {row.expected_in_flight}"
            )
        if row.idle != row.expected_idle:
            failures.append(
                f"the schedule leaves rank {rank} idle for {row.idle:g}, but the formula says {row.expected_idle:g}"
            )
    return failures


def last_actions(trainer: Trainer) -> list[list[tuple[Action, float, float]]]:
    """Return what every rank of this rank's pipeline did in the last step, in seconds of one host's clock; collective."""
    mine = [
        (_KINDS.index(action.kind), action.chunk, action.micro_batch, began, ended)
        for action, began, ended in trainer.pipeline.actions
    ]
    counts = [5 * len(row) for row in trainer.pipeline.schedule.rows]
    everyone = trainer.mesh.pp.all_gather_v(np.array(mine, np.float64).reshape(-1), counts)
    ends = np.cumsum(counts)
    return [
        [
            (Action(_KINDS[int(kind)], int(chunk), int(number)), float(began), float(ended))
            for kind, chunk, number, began, ended in everyone[end - count : end].reshape(-1, 5)
        ]
        for end, count in zip(ends, counts, strict=True)
    ]
