"""Leads the contestants through one training: first they learn, for the losses; then they take turns, for the times."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from statistics import fmean

from bench.harness.jobs import Job, Player, turns
from bench.training.table import Measured

BLOCK = 5
"""Steps in a row while the contestants learn, so that an answer does not take too long."""


@dataclass
class Trainee(Player):
    """A contestant while it is measured."""

    measured: Measured = field(default_factory=Measured)

    @property
    def name(self) -> str:
        """What the table calls it."""
        return self.job.name

    def build(self) -> None:
        """Make the model."""
        self.measured.before = max((answer["before"] for answer in self.ask("build")), default=0)

    def learn(self, steps: int) -> None:
        """Take the first steps, of which the losses are kept, and look at the memory."""
        for start in range(0, steps, BLOCK):
            answers = self.ask("run", steps=min(BLOCK, steps - start), hushed=False)
            losses = zip(*(answer["losses"] for answer in answers), strict=True)
            self.measured.losses += [fmean(loss for loss in ranks if loss is not None) for ranks in losses]
        self.measured.peak = max((answer["peak"] for answer in self.ask("peak")), default=0)
        self.ask("run", steps=1, hushed=True)  # what is to be prepared for this is not to be timed

    def turn(self, steps: int) -> None:
        """Take so many steps, and where there is communication as many without; what counts is the slowest rank."""
        answers = self.ask("run", steps=steps, hushed=False)
        if not answers:
            return
        self.measured.seconds.append(max(answer["seconds"] for answer in answers))
        waits = [answer["waited"] for answer in answers if answer["waited"] is not None]
        if waits:
            self.measured.waits.append(max(waits))
        alone = self.ask("run", steps=steps, hushed=True) if self.job.ranks > 1 else []
        if alone:
            self.measured.alone.append(max(answer["seconds"] for answer in alone))


def measure(
    jobs: Sequence[Job], learn: int, rounds: int, steps: int, say: Callable[[str], None]
) -> dict[str, tuple[int, Measured]]:
    """Contestant -> its ranks and what was measured, but for those that failed, of which `say` tells."""
    trainees = [Trainee(job) for job in jobs if job.joined]
    for trainee in trainees:
        trainee.build()
    for trainee in trainees:
        trainee.learn(learn)
    for trainee in turns(trainees, rounds):
        trainee.turn(steps)
    for trainee in trainees:
        if trainee.lost:
            say(f"{trainee.name} is left out on {trainee.job.ranks} ranks: {trainee.lost}")
    return {trainee.name: (trainee.job.ranks, trainee.measured) for trainee in trainees if not trainee.lost}
