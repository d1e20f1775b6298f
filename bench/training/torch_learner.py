"""PyTorch's data-parallel ways to train: one rank alone, DistributedDataParallel, and fully_shard (FSDP2), over Gloo."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any, Final

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grad_norm_, clip_grads_with_norm_, get_total_norm

from bench.training.torch_gpt import TorchGPT, initialise, parameter_groups
from parallel.configuration import TrainingConfiguration
from parallel.data import Corpus
from parallel.formulas import share
from parallel.nn import GPTConfiguration
from parallel.optim import learning_rate


class Alone:
    """One rank, as whose model and gradients the others' begin."""

    def __init__(self, configuration: TrainingConfiguration, corpus: Corpus) -> None:
        c = self.configuration = configuration
        self.corpus, self.steps, self.hushed = corpus, 0, False
        shape = GPTConfiguration(c.layers, c.hidden, c.heads, c.seq)
        model = TorchGPT(shape)
        initialise(model, shape, c.seed)
        self.parts: list[Any] = [model]
        self.model = self.distribute(model)
        groups = parameter_groups(self.parts, shape, c.weight_decay)
        self.optimizer = torch.optim.AdamW(groups, lr=c.lr, betas=(0.9, 0.95), eps=1e-8, fused=True)

    def distribute(self, model: TorchGPT) -> Any:
        """What is called with windows; where that holds but some of the model, `parts` is what this rank trains."""
        return model

    def samples(self) -> range:
        """This rank's part of the global batch."""
        return share(self.configuration.batch, dist.get_world_size(), dist.get_rank())

    def backward(self, windows: torch.Tensor) -> float | None:
        loss = self.model(windows)
        loss.backward()
        return float(loss.detach())

    def clip(self) -> None:
        clip_grad_norm_(self.model.parameters(), self.configuration.clip)

    def step(self) -> tuple[float | None, float | None]:
        c = self.configuration
        windows = self.corpus.batch(c.seed, self.steps, self.samples(), c.seq)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.steps, c.lr, c.warmup, c.steps)
        self.optimizer.zero_grad()
        loss = self.backward(torch.from_numpy(windows.astype(np.int64)))
        self.clip()
        self.optimizer.step()
        self.steps += 1
        return loss, None

    def hush(self, hushed: bool) -> None:
        self.hushed = hushed


class DDP(Alone):
    """Gradients in buckets, which are reduced while the backward pass goes on."""

    def distribute(self, model: TorchGPT) -> Any:
        return DistributedDataParallel(model, gradient_as_bucket_view=True)

    def backward(self, windows: torch.Tensor) -> float | None:
        with self.model.no_sync() if self.hushed else nullcontext():
            return super().backward(windows)


class FSDP2(Alone):
    """Parameters, gradients and optimizer state sharded: every block, and what is left, is a group of its own."""

    def distribute(self, model: TorchGPT) -> Any:
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        for block in model.blocks:
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)
        for module in (*model.blocks, model):
            module.set_custom_all_gather(HushableAllGather(self))
            module.set_custom_reduce_scatter(HushableReduceScatter(self))
        self.mesh = mesh
        return model

    def clip(self) -> None:
        if not self.hushed:
            return super().clip()
        parameters = list(self.model.parameters())
        norm = get_total_norm(
            [parameter.grad.to_local() for parameter in parameters]
        )  # a DTensor's is summed up at once
        everywhere = DTensor.from_local(norm, self.mesh, [Replicate()], run_check=False)
        clip_grads_with_norm_(parameters, self.configuration.clip, everywhere)
        return None


# The functions' names in newer versions, or the older ones.
_all_gather: Final = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)
_reduce_scatter: Final = getattr(dist, "reduce_scatter_single", dist.reduce_scatter_tensor)


class HushableAllGather:
    """What fully_shard does by default; hushed, it gives the parameters that it gathered when it was first called so."""

    def __init__(self, owner: Alone) -> None:
        self.owner = owner
        self.kept: torch.Tensor | None = None

    def allocate(self, size: Any, *, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        kept = self.kept if self.owner.hushed else None
        return torch.empty(*size, dtype=dtype, device=device) if kept is None else kept

    def __call__(self, output_tensor: Any, input_tensor: Any, group: Any, async_op: bool = False) -> Any:
        if self.owner.hushed and self.kept is not None:
            return None
        if self.owner.hushed:
            self.kept = output_tensor
        return _all_gather(output_tensor, input_tensor, group=group, async_op=async_op)


class HushableReduceScatter:
    """What fully_shard does by default; hushed, it gives gradients of this rank alone."""

    def __init__(self, owner: Alone) -> None:
        self.owner = owner

    def allocate(self, size: Any, *, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        return torch.empty(*size, dtype=dtype, device=device)

    def __call__(self, output_tensor: Any, input_tensor: Any, group: Any, op: Any, async_op: bool = False) -> Any:
        if not self.owner.hushed:
            return _reduce_scatter(output_tensor, input_tensor, group=group, op=op, async_op=async_op)
        output_tensor.copy_(input_tensor[: output_tensor.numel()])
        return None
