"""One rank of a contestant: builds its model, and steps it when the driver says so.

Started as `python -m bench.training.worker SPECIFICATION`, once a rank.
"""

from __future__ import annotations

import json
import os
import re
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from bench.harness.contestants import Unavailable
from bench.harness.protocol import Channel, Message
from bench.training.contestants import join
from bench.training.learner import Contestant, Learner
from parallel.configuration import TrainingConfiguration
from parallel.data import load
from transports import environment


@dataclass(frozen=True)
class Specification:
    """What the driver wants of the ranks of a contestant."""

    address: str
    contestant: str
    cores: list[int]
    """Rank r runs on core r, or r modulo their number."""
    store: str
    data: str
    training: TrainingConfiguration

    def encode(self) -> str:
        """For the command line."""
        return json.dumps(asdict(self))

    @classmethod
    def decode(cls, text: str) -> Specification:
        """From the command line."""
        fields = json.loads(text)
        return cls(**{**fields, "training": TrainingConfiguration(**fields["training"])})


class Worker:
    """Takes the steps that the driver's messages name."""

    def __init__(self, contestant: Contestant, specification: Specification) -> None:
        self._contestant, self._specification = contestant, specification
        self._learner: Learner | None = None
        self.steps: dict[str, Callable[..., Message]] = {"build": self.build, "run": self.run, "peak": self.peak}

    def build(self) -> Message:
        """Read the data, say how many bytes of memory are resident, and make the model."""
        corpus = load(self._specification.data)
        before = resident("VmRSS")
        self._learner = self._contestant.build(self._specification.training, corpus)
        return {"before": before}

    def run(self, steps: int, hushed: bool) -> Message:
        """Meet, and take so many steps; `hushed`: without any communication."""
        learner = self._learner
        assert learner is not None
        learner.hush(hushed)
        self._contestant.barrier()
        began = time.perf_counter()
        done = [learner.step() for _ in range(steps)]
        seconds = (time.perf_counter() - began) / steps
        learner.hush(False)
        waits = [wait for _, wait in done if wait is not None]
        return {
            "seconds": seconds,
            "losses": [loss for loss, _ in done],
            "waited": sum(waits) / steps if waits else None,
        }

    def peak(self) -> Message:
        """How many bytes were resident at most."""
        return {"peak": resident("VmHWM")}


def resident(name: str) -> int:
    """Bytes of this process's memory, now (VmRSS) or at most (VmHWM); getrusage also counts what its parent held."""
    found = re.search(rf"{name}:\s*(\d+) kB", Path("/proc/self/status").read_text())
    return int(found[1]) * 1024 if found else 0


def serve(specification: Specification) -> None:
    """Join as the contestant, say so to the driver, and answer it until it hangs up."""
    world = environment.detect()
    # Before libraries start threads, which inherit it.
    os.sched_setaffinity(0, {specification.cores[world.rank % len(specification.cores)]})
    channel = Channel.connect(specification.address)
    hello: Message = {"job": specification.contestant, "rank": world.rank, "joined": {}, "missing": {}}
    try:
        contestant = join(specification.contestant, specification.store)
    except Unavailable as error:
        channel.send({**hello, "missing": {specification.contestant: str(error)}})
        return
    channel.send({**hello, "joined": {specification.contestant: contestant.description}})
    channel.serve(Worker(contestant, specification).steps)


if __name__ == "__main__":
    serve(Specification.decode(sys.argv[1]))
