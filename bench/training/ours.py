"""This library's ways to train, by the name of the contestant."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Final, Protocol

import numpy as np

import collectives as cc
from bench.harness.contestants import Unavailable
from bench.training.learner import Contestant, Learner
from parallel.data import Corpus
from parallel.train import Step, Trainer, TrainingConfiguration


class Steps(Protocol):
    """What a mode makes: something that takes one optimizer step after the other."""

    def step(self) -> Step:
        """The next one."""
        ...


Mode = Callable[[TrainingConfiguration, Corpus, cc.Communicator, cc.Communicator], Steps]

MODES: Final[dict[str, Mode]] = {"zero0": Trainer}
"""Contestant -> what trains so, from the configuration, the corpus, and the communicators for gradients and for losses."""


def join(name: str) -> Contestant:
    """Join the other ranks of this process's job as this contestant."""
    try:
        return contestant(name, cc.init())
    except (cc.CommunicationError, ValueError) as error:
        raise Unavailable(str(error)) from None


def contestant(name: str, world: cc.Communicator) -> Contestant:
    """A rank of `world` as this contestant; `alone` is the first mode, on one rank."""
    return Contestant(
        "this library", world.barrier, partial(_build, MODES["zero0" if name == "alone" else name], world)
    )


def _build(mode: Mode, world: cc.Communicator, configuration: TrainingConfiguration, corpus: Corpus) -> Learner:
    axes: tuple[Any, Any] = (Hushable(world.dup()), Hushable(world.dup()))
    trainer = mode(configuration, corpus, *axes)

    def step() -> tuple[float, float | None]:
        with np.errstate(all="ignore"):
            done = trainer.step()
        return done.loss, done.communication_seconds

    def hush(hushed: bool) -> None:
        for axis in axes:
            axis.hushed = hushed

    return Learner(step, hush)


_HUSHED: Final[dict[str, Callable[..., Any]]] = {
    "all_reduce": lambda comm, x, op=None: x,
    "broadcast": lambda comm, x, root=0: x,
    "all_gather": lambda comm, x, out=None: np.stack([x] * comm.size) if out is None else out,
    "reduce_scatter": lambda comm, x, out=None, op=None: np.split(x, comm.size)[0].copy() if out is None else out,
    "all_gather_v": lambda comm, x, counts, out=None: np.resize(x, sum(counts)) if out is None else out,
    "reduce_scatter_v": lambda comm, x, counts, out=None, op=None: (
        x[: counts[comm.rank]].copy() if out is None else out
    ),
}
"""What a collective that carries nothing returns: memory of the right size, whose content is of some step before."""


class Hushable:
    """A communicator whose collectives carry nothing while it is hushed."""

    def __init__(self, comm: cc.Communicator) -> None:
        self._comm, self.hushed = comm, False

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._comm, name)
        if name in _HUSHED and self.hushed:
            return partial(self._nothing, name)
        return partial(self._plan, found) if name.startswith("plan_") else found

    def _nothing(self, name: str, *arguments: Any, async_op: bool = False, **others: Any) -> Any:
        result = _HUSHED[name](self._comm, *arguments, **others)
        return cc.Work(result, lambda: True, lambda timeout: None) if async_op else result

    def _plan(self, plan: Callable[..., Any], *arguments: Any, **others: Any) -> _Plan:
        return _Plan(self, plan(*arguments, **others))


class _Plan:
    """A planned call that does nothing while its communicator is hushed."""

    def __init__(self, comm: Hushable, planned: Any) -> None:
        self._comm, self._planned = comm, planned

    def __call__(self) -> Any:
        return None if self._comm.hushed else self._planned()

    def start(self) -> None:
        if not self._comm.hushed:
            self._planned.start()

    def wait(self, timeout: float | None = None) -> Any:
        return None if self._comm.hushed else self._planned.wait(timeout)

    def done(self) -> bool:
        return self._comm.hushed or bool(self._planned.done())
