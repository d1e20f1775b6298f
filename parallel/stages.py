"""`python -m parallel stages`: the same training under every stage of ZeRO, by turns, in one table."""

from __future__ import annotations

import statistics
from dataclasses import astuple, replace
from typing import TYPE_CHECKING

import numpy as np

from parallel import accounting
from parallel.report import table
from parallel.timeline import Timeline
from parallel.train import Trainer

if TYPE_CHECKING:
    from collectives import Communicator
    from parallel.configuration import TrainingConfiguration
    from parallel.data import Corpus

_WARM_UP = 2


def compare_stages(configuration: TrainingConfiguration, corpus: Corpus, communicator: Communicator) -> str:
    """Train under stages 0 to 3 for the configured steps each, and return the table; collective.

    Step time is the median of the slowest rank; communication is the time in which a collective of parameters or gradients
    was on its way, and hidden the part of it in which rank 0 did not wait for one. Memory is rank 0's: of the arrays that a
    stage is about, counted, and beside it by formula, in MiB.
    """
    c, mib = configuration, 1 << 20
    rows = [
        (
            "stage",
            "ms/step",
            "tokens/s",
            "communication",
            "hidden",
            "state MiB",
            "formula",
            "buffers",
            "formula",
            "loss",
        )
    ]
    for stage in range(4):
        timeline = Timeline()
        trainer = Trainer(replace(c, zero=stage, replicas=c.replicas if stage else 1), corpus, communicator, timeline)
        seconds, loss = [], 0.0
        for number in range(_WARM_UP + c.steps):
            if number == _WARM_UP:
                timeline.clear()
            step = trainer.step()
            seconds.append(step.seconds)
            loss = step.loss
        trainer.replica.settle()
        slowest = communicator.all_gather(np.array(seconds[_WARM_UP:])).max(axis=0)
        typical = statistics.median(slowest.tolist())
        moving, waiting = timeline.seconds("communication") / c.steps, timeline.seconds("waiting") / c.steps
        hidden = f"{max(0.0, 1 - waiting / moving):.0%}" if moving else ""
        memory, predicted = accounting.memory(trainer), accounting.expected_memory(trainer)
        state, formula = sum(astuple(memory)[:3]), sum(astuple(predicted)[:3])
        rows.append(
            (
                str(stage), f"{typical * 1e3:.1f}", f"{c.batch * c.seq / typical:,.0f}", f"{moving / typical:.1%}", hidden,
                f"{state / mib:.2f}", f"{formula / mib:.2f}",
                f"{memory.temporary / mib:.2f}", f"{predicted.temporary / mib:.2f}", f"{loss:.5f}",
            )
        )  # fmt: skip
    return table(rows)
