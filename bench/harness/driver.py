"""Leads the contestants' jobs through a benchmark: one runs, all others are blocked; they take turns in every iteration."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from bench.harness import sizes
from bench.harness.case import COPY, ITEM_BYTES, Case
from bench.harness.jobs import Job, JobLost, Player, turns
from bench.harness.protocol import Message
from bench.harness.table import PEERS, Measured, Row, rows

Say = Callable[[str], None]


@dataclass
class Entrant(Player):
    """A contestant in one cell of the table: a case at a size on a number of ranks."""

    contestant: str = ""
    case: Case = COPY
    repeats: int = 1
    seconds: list[list[float]] = field(default_factory=list)
    wrong: int = 0

    @property
    def name(self) -> str:
        """What the table calls it."""
        return COPY.name if self.case is COPY else self.contestant

    def ask(self, do: str, **arguments: object) -> list[Message]:
        """As a player does, about this cell."""
        return super().ask(do, case=self.case.name, contestant=self.contestant, **arguments)


class Driver:
    """Measures cells on the jobs of one number of ranks."""

    def __init__(
        self, jobs: Sequence[Job], ranks: int, say: Say, *, fresh: bool = False, iterations: int | None = None
    ):
        self._jobs, self._ranks, self._say = jobs, ranks, say
        self._fresh, self._iterations = fresh, iterations

    def cell(self, case: Case, asked: int) -> list[Row]:
        """Time the case at the size that comes closest to `asked` bytes, for every contestant that has it."""
        count = case.count(asked, self._ranks)
        entrants = list(self._entrants(case))
        for entrant in entrants:
            self._prepare(entrant, count)
        for entrant in turns(entrants, self._iterations or sizes.iterations(asked)):
            self._iterate(entrant, count)
        measured = {}
        for entrant in entrants:
            if entrant.lost:
                self._say(f"{entrant.name} is left out of {case.name} at {sizes.label(asked)}: {entrant.lost}")
            else:
                measured[entrant.name] = Measured(list(zip(*entrant.seconds, strict=True)), entrant.wrong)
        for job in self._jobs:
            if job.joined:
                try:
                    job.ask({"do": "release"})
                except JobLost as error:
                    self._say(f"{job.name}: {error}")
                    job.joined.clear()
        copying = measured.pop(COPY.name, None)
        return rows(case, self._ranks, asked, count, measured, copying)

    def _entrants(self, case: Case) -> Iterator[Entrant]:
        """Ours, the peers that have the case, and where there is a floor, the copies that it is reckoned from."""
        for job in self._jobs:
            for contestant in job.joined:
                has = case.gloo if contestant == "gloo" else case.mpi if contestant in PEERS else case.ours
                if has is not None:
                    yield Entrant(job, contestant=contestant, case=case)
        host = next(((job, name) for job in self._jobs for name in job.joined if name not in PEERS), None)
        if host is not None and case.moved(self._ranks):
            yield Entrant(host[0], contestant=host[1], case=COPY)

    def _one_run(self, entrant: Entrant, count: int) -> bool:
        return self._fresh or (count * ITEM_BYTES >= sizes.LARGE and entrant.case is not COPY)

    def _prepare(self, entrant: Entrant, count: int) -> None:
        one_run = self._one_run(entrant, count)
        answers = entrant.ask("prepare", count=count, fresh=self._fresh, calibrate=0 if one_run else 3)
        if answers and not one_run:
            entrant.repeats = sizes.repeats(max(answer["seconds"] for answer in answers))

    def _iterate(self, entrant: Entrant, count: int) -> None:
        one_run = self._one_run(entrant, count)
        entrant.wrong += sum(answer.get("wrong", 0) for answer in entrant.ask("ready", check=not one_run))
        answers = entrant.ask("go", repeats=entrant.repeats, check=one_run)
        entrant.wrong += sum(answer["wrong"] for answer in answers)
        entrant.seconds.append([answer["seconds"] for answer in answers])
