"""Running a pipeline's schedule: every rank does the actions of its row in order, and receives what they need ahead of time."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from collectives import CommunicationError
from parallel.autograd import REPLICATED, SEQUENCE, Array, Tensor, count_saved_bytes, deferring, no_gradient
from parallel.nn import GPT, Extent
from parallel.schedules import Action, Kind, Schedule

if TYPE_CHECKING:
    from collectives import Communicator, Work
    from parallel.autograd import SavedBytes
    from parallel.axis import Axis
    from parallel.data_parallel import Chunk, DataParallel
    from parallel.nn import Draws, GPTConfiguration
    from parallel.timeline import Timeline

_AHEAD = 2
"""Receives that are under way beside the one that is needed now."""


@dataclass(frozen=True)
class MicroBatch:
    """Windows (samples, positions + 1) that go through the pipeline together.

    `draws`: of the dropout. `sample`: with exact sums, the global number of the one sample that it holds, None if it is empty.
    """

    windows: Array
    draws: Draws | None
    sample: int | None = None


@dataclass(frozen=True)
class _Message:
    """What a virtual stage needs from another: an activation, or the gradient of one, of a micro-batch."""

    stage: int
    micro_batch: int
    gradient: bool

    def __str__(self) -> str:
        what = "gradient" if self.gradient else "activation"
        return f"the {what} of micro-batch {self.micro_batch} for stage {self.stage}"


class Pipeline:
    """The stages that this rank has of a model, and the schedule by which it runs them.

    Arguments: `schedule`, for as many ranks as `communicator` has; `replica`, whose chunks are this rank's, in the order of the
    schedule; `tensor`, the ranks that layers are cut among; `dtype`, of activations; `saved` counts what is kept for backward.
    """

    def __init__(
        self,
        schedule: Schedule,
        replica: DataParallel,
        communicator: Communicator,
        tensor: Axis | None,
        dtype: np.dtype[Any],
        saved: SavedBytes,
        timeline: Timeline | None = None,
    ) -> None:
        self.schedule, self.replica, self.communicator, self.tensor = schedule, replica, communicator, tensor
        self.actions: list[tuple[Action, float, float]] = []
        """What was done in the last step, with the seconds of `time.perf_counter` at which it began and ended."""
        self.history: list[tuple[float, float]] = []
        """Of every step, the seconds from the first action to the end of the last, and those in actions."""
        self.most_in_flight = 0
        self._dtype, self._saved, self._timeline = dtype, saved, timeline
        self._rank = communicator.rank
        self._stages = len(schedule.places)
        self._posted: dict[_Message, tuple[Work[Any], Array]] = {}
        self._handed: dict[_Message, Array] = {}
        self._sends: deque[Work[Any]] = deque()
        self._inputs: dict[tuple[int, int], Tensor | None] = {}
        self._outputs: dict[tuple[int, int], Tensor] = {}
        self._weights: dict[tuple[int, int], list[Callable[[], None]]] = {}

    def step(self, parts: Sequence[MicroBatch], scale: float, step: int) -> list[float]:
        """Run forward and backward of all micro-batches; returns their losses on the rank that has the last stage, none on others.

        `scale`: of the summed loss of a micro-batch; `step`: its number, for messages. Raises what the collectives raise, with the
        action in which that was; any other error ends the job, on all ranks, with its action.
        """
        if len(parts) != self.schedule.micro_batches:
            raise ValueError(f"{len(parts)} micro-batches for a schedule of {self.schedule.micro_batches}")
        self.replica.begin_step(len(parts))
        self.actions, self.most_in_flight = [], 0
        row = self.schedule.rows[self._rank]
        needed = deque(message for action in row if (message := self._needs(action)) is not None)
        losses: dict[int, float] = {}
        for action in row:
            where = f"{_NAMES[action.kind]} of micro-batch {action.micro_batch} in stage {self._stage(action)} in step {step + 1}"
            try:
                self._receive_ahead(needed, parts)
                message = self._needs(action)
                arrived = None if message is None else self._received(message)
                began = time.perf_counter()
                self._do(action, arrived, parts[action.micro_batch], scale, losses, where)
            except CommunicationError as error:
                raise type(error)(f"{error} (while in {where}{self._owed(action)})") from error
            except Exception as error:
                self.communicator.abort(f"{type(error).__name__}: {error} (in {where})")
                raise
            ended = time.perf_counter()
            self.actions.append((action, began, ended))
            self.most_in_flight = max(self.most_in_flight, len(self._outputs) + len(self._weights))
            if self._timeline is not None:
                chunk = f".{action.chunk}" if self.schedule.chunks > 1 else ""
                self._timeline.add("compute", f"{_NAMES[action.kind]} {action.micro_batch}{chunk}", began, ended)
        while self._sends:
            self._sends.popleft().wait()
        busy = sum(ended - began for _, began, ended in self.actions)
        self.history.append((self.actions[-1][2] - self.actions[0][1], busy))
        return [losses[number] for number in sorted(losses)]

    def evaluate(self, parts: Sequence[Array]) -> list[float]:
        """Return the summed losses of these windows on the ranks that have the last stage, and none on others."""
        losses = []
        with no_gradient():
            for number, windows in enumerate(parts):
                for stage, (rank, chunk) in enumerate(self.schedule.places):
                    if rank != self._rank:
                        continue
                    x = None
                    if stage:
                        message = _Message(stage, number, gradient=False)
                        self._post(message, windows)
                        x = Tensor(self._received(message), placement=self._placement())
                    y = self._forward(self.replica.chunks[chunk], stage, MicroBatch(windows, None), 1.0, x)
                    if stage == self._stages - 1:
                        losses.append(float(y.data))
                    else:
                        self._send(_Message(stage + 1, number, gradient=False), y.data)
            while self._sends:
                self._sends.popleft().wait()
        return losses

    # Actions

    def _do(
        self,
        action: Action,
        arrived: Array | None,
        part: MicroBatch,
        scale: float,
        losses: dict[int, float],
        where: str,
    ) -> None:
        chunk, stage, key = self.replica.chunks[action.chunk], self._stage(action), (action.chunk, action.micro_batch)
        if action.kind is not Kind.INPUT_GRADIENT:
            self.replica.finish_pass()
        if action.kind is Kind.FORWARD:
            x = None if stage == 0 else Tensor(arrived, requires_gradient=True, placement=self._placement())
            with count_saved_bytes(self._saved):
                y = self._forward(chunk, stage, part, scale, x)
            self._inputs[key], self._outputs[key] = x, y
            if stage == self._stages - 1:
                losses[action.micro_batch] = float(y.data)
            else:
                self._send(_Message(stage + 1, action.micro_batch, gradient=False), y.data)
                del y.data  # no backward reads it
        elif action.kind is Kind.WEIGHT_GRADIENT:
            with count_saved_bytes(self._saved), self.replica.backward(chunk, part.sample, where):
                for finish in self._weights.pop(key):
                    finish()
        elif action.kind is Kind.INPUT_GRADIENT:
            later: list[Callable[[], None]] = []
            with count_saved_bytes(self._saved), deferring(later):
                self._backward(key, arrived)
            self._weights[key] = later
            self.replica.close(chunk.units)
            self._send_gradient(key, stage, action.micro_batch)
        else:
            with count_saved_bytes(self._saved), self.replica.backward(chunk, part.sample, where):
                self._backward(key, arrived)
            self._send_gradient(key, stage, action.micro_batch)

    def _forward(self, chunk: Chunk, stage: int, part: MicroBatch, scale: float, x: Tensor | None) -> Tensor:
        if stage == self._stages - 1:
            return chunk.model.loss(part.windows, scale, part.draws, x)
        y: Tensor = chunk.model(part.windows[:, :-1].astype(np.int64) if x is None else x, part.draws)
        return y

    def _backward(self, key: tuple[int, int], gradient: Array | None) -> None:
        self._outputs.pop(key).backward(gradient)

    def _send_gradient(self, key: tuple[int, int], stage: int, micro_batch: int) -> None:
        x = self._inputs.pop(key)
        if x is not None:
            assert x.gradient is not None
            self._send(_Message(stage - 1, micro_batch, gradient=True), x.gradient)

    def _stage(self, action: Action) -> int:
        return self.schedule.stage(self._rank, action.chunk)

    def _placement(self) -> Any:
        return SEQUENCE if self.tensor is not None and self.tensor.sequence else REPLICATED

    # Messages

    def _needs(self, action: Action) -> _Message | None:
        stage = self._stage(action)
        if action.kind is Kind.FORWARD:
            return _Message(stage, action.micro_batch, gradient=False) if stage else None
        if action.kind is Kind.WEIGHT_GRADIENT or stage == self._stages - 1:
            return None
        return _Message(stage, action.micro_batch, gradient=True)

    def _owed(self, action: Action) -> str:
        """Whose action an action waits for, in words."""
        message = self._needs(action)
        if message is None:
            return ""
        stage, what = (message.stage + 1, "backward") if message.gradient else (message.stage - 1, "forward")
        return f", which waits for stage {stage}'s {what} of that micro-batch on rank {self._peer(message)} of the pipeline"

    def _peer(self, message: _Message) -> int:
        """The rank that the message comes from."""
        return self.schedule.places[message.stage + (1 if message.gradient else -1)][0]

    def _tag(self, message: _Message) -> int:
        return (message.micro_batch * self._stages + message.stage) * 2 + message.gradient

    def _receive_ahead(self, needed: deque[_Message], parts: Sequence[MicroBatch]) -> None:
        while needed and len(self._posted) <= _AHEAD:
            message = needed.popleft()
            self._post(message, parts[message.micro_batch].windows)

    def _post(self, message: _Message, windows: Array) -> None:
        """Begin to receive; each message has an array of its own, since layers keep what they are given for backward."""
        if self._peer(message) == self._rank:
            return
        model = self.replica.chunks[0].model
        here = len(model.positions(windows.shape[1] - 1))
        array = np.empty((len(windows), here, model.configuration.hidden), self._dtype)
        work = self.communicator.recv(array, self._peer(message), self._tag(message), async_op=True)
        self._posted[message] = (self._follow(f"receive {message}", work), array)

    def _received(self, message: _Message) -> Array:
        if message in self._handed:
            return self._handed.pop(message)
        work, array = self._posted.pop(message)
        began = time.perf_counter()
        work.wait()
        ended = time.perf_counter()
        self.replica.wait_seconds += ended - began
        if self._timeline is not None and ended - began > 1e-5:
            self._timeline.add("waiting", f"wait for {message}", began, ended)
        return array

    def _send(self, message: _Message, array: Array) -> None:
        """Send to the stage that the message is for, or hand it over where that is here."""
        peer = self.schedule.places[message.stage][0]
        if peer == self._rank:
            self._handed[message] = array
            return
        while self._sends and self._sends[0].done():
            self._sends.popleft()
        work = self.communicator.send(np.ascontiguousarray(array), peer, self._tag(message), async_op=True)
        self._sends.append(self._follow(f"send {message}", work))

    def _follow(self, name: str, work: Work[Any]) -> Work[Any]:
        if self._timeline is not None:
            self._timeline.follow(name, work)
        return work


_NAMES = {
    Kind.FORWARD: "forward",
    Kind.BACKWARD: "backward",
    Kind.INPUT_GRADIENT: "backward of the inputs",
    Kind.WEIGHT_GRADIENT: "backward of the weights",
}


def measure_head(shape: GPTConfiguration, samples: int, dtype: np.dtype[Any]) -> float:
    """Return how many layers take as long as the output head, forward and backward, of micro-batches of so many samples."""
    x = np.zeros((samples, shape.sequence, shape.hidden), dtype)
    windows = np.zeros((samples, shape.sequence + 1), np.uint8)
    layer = GPT(shape, extent=Extent(range(1), first=False, last=False))
    head = GPT(shape, extent=Extent(range(0), first=False, last=True))
    for model in (layer, head):
        for name, parameter in model.named_parameters():
            parameter.name = name
            parameter.data = parameter.initial_values(0, 0, parameter.size).astype(dtype).reshape(parameter.shape)

    def seconds(run: Callable[[Tensor], Tensor]) -> float:
        began = time.perf_counter()
        result = run(Tensor(x, requires_gradient=True))
        result.backward(np.ones_like(result.data))
        return time.perf_counter() - began

    turns = [(seconds(layer), seconds(lambda y: head.loss(windows, 1.0, x=y))) for _ in range(4)]
    return min(turn[1] for turn in turns) / min(turn[0] for turn in turns)
