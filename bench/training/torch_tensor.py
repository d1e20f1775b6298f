"""PyTorch's tensor parallelism: parallelize_module with ColwiseParallel and RowwiseParallel, over Gloo."""

from __future__ import annotations

from typing import Any, Final

import torch
import torch.distributed as dist
from torch.distributed import _functional_collectives as functional
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from bench.training.torch_gpt import TorchGPT
from bench.training.torch_learner import Alone
from parallel.configuration import ConfigurationError


class TensorParallel(Alone):
    """Every matrix of a block in parts, the attention's by heads; the rest, embeddings and head too, is on every rank.

    With a vocabulary of bytes sharing out the head too (RowwiseParallel, loss_parallel) was no faster on 2 ranks, and
    slower on 4.
    """

    def distribute(self, model: TorchGPT) -> Any:
        heads, ranks = self.configuration.heads, dist.get_world_size()
        if heads % ranks:
            raise ConfigurationError(f"{heads} heads cannot be shared out evenly among {ranks} ranks")
        self.mesh = init_device_mesh("cpu", (ranks,))
        for block in model.blocks:
            for parameter in block.attention.packed.parameters():  # so that a rank's rows are its heads' of all three
                rows = parameter.data.unflatten(0, (3, ranks, -1)).transpose(0, 1)
                parameter.data = rows.flatten(0, 2).contiguous()
            parallelize_module(
                block,
                self.mesh,
                {
                    "attention.packed": ColwiseParallel(),
                    "attention.output": RowwiseParallel(),
                    "feed_forward.up": ColwiseParallel(),
                    "feed_forward.down": RowwiseParallel(),
                },
            )
        return model

    def samples(self) -> range:
        return range(self.configuration.batch)

    def clip(self) -> None:
        parameters = list(self.model.parameters())
        distributed = [parameter for parameter in parameters if isinstance(parameter, DTensor)]
        plain = [parameter for parameter in parameters if not isinstance(parameter, DTensor)]
        sharded = [p.grad.to_local() for p in distributed if p.placements[0].is_shard()]
        whole = [p.grad.to_local() for p in distributed if p.placements[0].is_replicate()] + [p.grad for p in plain]
        squares = get_total_norm(sharded).square()
        if not self.hushed:
            dist.all_reduce(squares)
        norm = (squares + get_total_norm(whole).square()).sqrt()
        everywhere = DTensor.from_local(norm, self.mesh, [Replicate()], run_check=False)
        clip_grads_with_norm_(plain, self.configuration.clip, norm)
        clip_grads_with_norm_(distributed, self.configuration.clip, everywhere)

    def hush(self, hushed: bool) -> None:
        super().hush(hushed)
        functional.all_reduce = _nothing if hushed else _all_reduce  # which is what DTensors call


_all_reduce: Final = functional.all_reduce


def _nothing(tensor: torch.Tensor, *arguments: Any, **others: Any) -> torch.Tensor:
    return tensor
