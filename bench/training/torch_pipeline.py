"""PyTorch's pipelines: torch.distributed.pipelining over Gloo, with its schedules of one stage a rank and of several."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import torch
import torch.distributed as dist
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleGPipe, ScheduleInterleaved1F1B
from torch.nn import functional as F  # noqa: N812
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from bench.training.ours import CHUNKS, MICRO_BATCHES
from bench.training.torch_gpt import Stage, TorchGPT
from bench.training.torch_learner import Alone
from parallel.configuration import ConfigurationError, TrainingConfiguration
from parallel.data import Corpus
from parallel.formulas import share


class HushableStage(PipelineStage):
    """Hushed, it neither sends nor receives: it computes with what it received last."""

    def __init__(self, owner: Alone, module: Stage, index: int, count: int) -> None:
        super().__init__(module, index, count, torch.device("cpu"))
        self.owner = owner

    def get_fwd_recv_ops(self, *arguments: Any) -> list[Any]:
        return self._unless_hushed(super().get_fwd_recv_ops(*arguments))

    def get_fwd_send_ops(self, *arguments: Any) -> list[Any]:
        return self._unless_hushed(super().get_fwd_send_ops(*arguments))

    def get_bwd_recv_ops(self, *arguments: Any) -> list[Any]:
        return self._unless_hushed(super().get_bwd_recv_ops(*arguments))

    def get_bwd_send_ops(self, *arguments: Any) -> list[Any]:
        return self._unless_hushed(super().get_bwd_send_ops(*arguments))

    def _unless_hushed(self, operations: list[Any]) -> list[Any]:
        return [] if self.owner.hushed else operations


class Pipeline(Alone):
    """The blocks cut into stages; the head's weight is tied to the token embedding by summing the gradients of both.

    Arguments: `chunks`, stages of a rank; `schedule`, makes the schedule from them, the micro-batches and the loss.
    """

    def __init__(
        self, chunks: int, schedule: Callable[..., Any], configuration: TrainingConfiguration, corpus: Corpus
    ) -> None:
        self.chunks, self.schedule = chunks, schedule
        super().__init__(configuration, corpus)

    def distribute(self, model: TorchGPT) -> Any:
        c, ranks, rank = self.configuration, dist.get_world_size(), dist.get_rank()
        count = ranks * self.chunks
        if c.layers < count:
            raise ConfigurationError(f"{c.layers} layers cannot be cut into {count} stages")
        if c.batch % MICRO_BATCHES:
            raise ConfigurationError(f"{c.batch} sequences cannot be cut evenly into {MICRO_BATCHES} micro-batches")
        numbers = range(rank, count, ranks)
        self.parts = [Stage(model, share(c.layers, count, number)) for number in numbers]
        stages = [HushableStage(self, part, number, count) for part, number in zip(self.parts, numbers, strict=True)]
        self.first, self.last = rank == 0, rank == ranks - 1
        self.ends = dist.new_group([0, ranks - 1])
        self.tied = model.token_embedding.weight
        return self.schedule(stages, MICRO_BATCHES, _loss)

    def samples(self) -> range:
        return range(self.configuration.batch if self.first or self.last else 0)

    def backward(self, windows: torch.Tensor) -> float | None:
        losses: list[torch.Tensor] = []
        tokens = (windows[:, :-1],) if self.first else ()
        target = windows[:, 1:] if self.last else None
        self.model.step(*tokens, target=target, losses=losses, return_outputs=False)
        if (self.first or self.last) and not self.hushed:
            dist.all_reduce(self.tied.grad, group=self.ends)
        return float(torch.stack(losses).mean()) if self.last else None

    def clip(self) -> None:
        parameters = [parameter for part in self.parts for parameter in part.parameters()]
        counted = [parameter.grad for parameter in parameters if parameter is not self.tied or self.first]
        squares = get_total_norm(counted).square()
        if not self.hushed:
            dist.all_reduce(squares)
        clip_grads_with_norm_(parameters, self.configuration.clip, squares.sqrt())


def _loss(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


def _single(kind: Callable[..., Any]) -> Callable[..., Any]:
    return lambda stages, micro_batches, loss: kind(stages[0], micro_batches, loss)


SCHEDULES: Final[dict[str, tuple[int, Callable[..., Any]]]] = {
    "gpipe": (1, _single(ScheduleGPipe)),
    "1f1b": (1, _single(Schedule1F1B)),
    "interleaved": (CHUNKS, ScheduleInterleaved1F1B),
}
"""Name -> stages of a rank, and what makes the schedule of them."""
