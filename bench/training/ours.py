"""This library's ways to train, by the name of the contestant."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Final, Protocol

import numpy as np

import collectives as cc
from bench.harness.contestants import Unavailable
from bench.training.learner import Contestant, Learner
from parallel.configuration import TrainingConfiguration
from parallel.data import Corpus
from parallel.train import Step, Trainer


class Steps(Protocol):
    """What a mode makes: something that takes one optimizer step after the other."""

    def step(self) -> Step:
        """The next one."""
        ...


Mode = Callable[[TrainingConfiguration, Corpus, cc.Communicator], Steps]


MICRO_BATCHES: Final = 8
"""Of a pipeline, on every rank count and in PyTorch too."""
CHUNKS: Final = 2
"""Stages of a rank in an interleaved pipeline."""


def _with(changes: Callable[[int], dict[str, Any]]) -> Mode:
    """The trainer of a configuration with the changes that a number of ranks makes to it."""
    return lambda configuration, corpus, world: Trainer(replace(configuration, **changes(world.size)), corpus, world)


def _zero(stage: int) -> Mode:
    return _with(lambda ranks: {"zero": stage})


def _pipeline(schedule: str, chunks: int = 1) -> Mode:
    return _with(lambda ranks: {"pp": ranks, "schedule": schedule, "chunks": chunks, "micro_batches": MICRO_BATCHES})


MODES: Final[dict[str, Mode]] = {
    **{f"zero{stage}": _zero(stage) for stage in range(4)},
    "dp-exact": _with(lambda ranks: {"exact": True}),
    "tp": _with(lambda ranks: {"tp": ranks}),
    "tp-exact": _with(lambda ranks: {"tp": ranks, "exact": True}),
    "gpipe": _pipeline("gpipe"),
    "1f1b": _pipeline("1f1b"),
    "interleaved": _pipeline("interleaved", CHUNKS),
}
"""Contestant -> what trains so, from the configuration, the corpus, and the communicator."""


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
    switch = Switch()
    hushable: Any = Hushable(world, switch)
    trainer = mode(configuration, corpus, hushable)

    def step() -> tuple[float, float | None]:
        with np.errstate(all="ignore"):
            done = trainer.step()
        return done.loss, done.communication_seconds

    def hush(hushed: bool) -> None:
        switch.hushed = hushed

    return Learner(step, hush)


_HUSHED: Final[dict[str, Callable[..., Any]]] = {
    "all_reduce": lambda comm, x, op=None: x,
    "broadcast": lambda comm, x, root=0: x,
    "all_gather": lambda comm, x, out=None: _repeated(x, comm.size, out),
    "reduce_scatter": lambda comm, x, out=None, op=None: np.split(x, comm.size)[0].copy() if out is None else out,
    "all_gather_v": lambda comm, x, counts, out=None: np.resize(x, sum(counts)) if out is None else out,
    "reduce_scatter_v": lambda comm, x, counts, out=None, op=None: (
        x[: counts[comm.rank]].copy() if out is None else out
    ),
    "all_to_all": lambda comm, x, out=None: x.copy() if out is None else _repeated(x, 1, out),
    "send": lambda comm, x, peer, tag=0: None,
    "recv": lambda comm, x, peer, tag=0: _zeroed(x),
    "sendrecv": lambda comm, x, to, out, source, tag=0: _zeroed(out),
}
"""What a collective that carries nothing returns: memory of the right size, with numbers that can be computed with."""


def _repeated(x: Any, times: int, out: Any) -> Any:
    """`x` in every part: gathered parameters must be like parameters, or the step would take another time."""
    whole = np.empty((times, *x.shape), x.dtype) if out is None else out
    whole.reshape(times, -1)[:] = x.reshape(-1)
    return whole


def _zeroed(x: Any) -> Any:
    """`x`, which may be memory as it came, without any numbers that would diverge, or slow the arithmetic down."""
    x[...] = 0
    return x


@dataclass
class Switch:
    """Whether communicators are hushed."""

    hushed: bool = False


class Hushable:
    """A communicator whose collectives carry nothing while its switch says so; what is split from it is so too."""

    def __init__(self, comm: cc.Communicator, switch: Switch) -> None:
        self._comm, self._switch = comm, switch

    def __getattr__(self, name: str) -> Any:
        if name in _HUSHED and self._switch.hushed:
            return partial(self._nothing, name)
        return getattr(self._comm, name)

    def split(self, color: int | None, key: int = 0) -> Hushable | None:
        """As a communicator's."""
        group = self._comm.split(color, key)
        return None if group is None else Hushable(group, self._switch)

    def dup(self) -> Hushable:
        """As a communicator's."""
        return Hushable(self._comm.dup(), self._switch)

    def _nothing(self, name: str, *arguments: Any, async_op: bool = False, **others: Any) -> Any:
        result = _HUSHED[name](self._comm, *arguments, **others)
        return cc.Work(result, lambda: True, lambda timeout: None, lambda: (0.0, 0.0)) if async_op else result
