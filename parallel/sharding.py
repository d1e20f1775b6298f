"""How a model is held: which of its parameters, gradients and optimizer state a rank keeps whole, and which in part."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np

from parallel.autograd import Array
from parallel.exact import TreeSum
from parallel.units import Layout, Pool, Shard, by_module, by_size, convert

if TYPE_CHECKING:
    from collectives import Communicator, Work
    from parallel.nn import GPT, Parameter


@dataclass(frozen=True)
class Sharding:
    """How data parallelism holds and sends a model.

    `stage`: 0 to 3, of ZeRO. `dtype`: of parameters and gradients as they are kept and sent: float32, float64, or bfloat16
    and float16, which are computed with in float32 and updated from float32 masters. `replicas`: so many groups of ranks each
    hold a whole, which is sharded within (HSDP). `reshard`: stage 3 gathers parameters again for backward. `recompute`:
    keep only the inputs of blocks for backward. `exact`: sums in an order that does not depend on the layout (see
    `parallel.exact`; the threads of matrix products are the caller's to fix).
    `first_bucket`, `bucket`: bytes, of stage 0; over shared memory no size from 64 KiB to one bucket for all was better.
    """

    stage: int = 0
    dtype: str = "float32"
    replicas: int = 1
    reshard: bool = True
    recompute: bool = False
    exact: bool = False
    first_bucket: int = 1 << 20
    bucket: int = 4 << 20

    @property
    def storage(self) -> np.dtype[Any]:
        """What parameters and gradients are kept and sent as."""
        return np.dtype(ml_dtypes.bfloat16 if self.dtype == "bfloat16" else self.dtype)

    @property
    def compute(self) -> np.dtype[Any]:
        """What is computed with, and what the optimizer keeps."""
        return np.dtype(np.float64 if self.dtype == "float64" else np.float32)

    @property
    def mixed(self) -> bool:
        """Whether the two differ."""
        return self.storage != self.compute

    @property
    def buckets(self) -> bool:
        """Whether units are buckets by size, whose parameters are always there, and not the model's blocks."""
        return self.stage == 0 and not self.mixed and not self.exact

    def check(self, ranks: int) -> None:
        """Raise ValueError unless so many ranks can hold a model so."""
        if not 0 <= self.stage <= 3:
            raise ValueError(f"stage is {self.stage}; expected 0, 1, 2 or 3")
        if self.replicas < 1 or ranks % self.replicas or (self.replicas > 1 and not self.stage):
            raise ValueError(
                f"replicas is {self.replicas}; expected 1, or with stages 1 to 3 a divisor of {ranks} ranks"
            )

    def layouts(self, model: GPT, parts: int) -> list[Layout]:
        """The units of a model, in the order of forward."""
        if self.buckets:
            return by_size(model, parts, self.storage.itemsize, self.first_bucket, self.bucket)
        return by_module(model, parts)


@dataclass(eq=False)
class Unit:
    """A unit in use.

    `values`: whole parameters, where this rank keeps them. `gradient`: of whole parameters, where it is kept. `missing`:
    what backward has given no gradient yet. `gathering`: parameters that are on their way, and where to. `tree`: of exact sums.
    `passes`: how many backward passes of this step have been through.
    """

    layout: Layout
    values: Array | None
    gradient: Array | None
    shard: Shard
    missing: set[Parameter]
    tree: TreeSum
    passes: int = 0
    opened: Array | None = None  # whole parameters to compute with, which are to be given back
    buffer: Array | None = None  # whole gradient, to be given back
    gathering: tuple[Work[Any], Array] | None = None


def make_unit(layout: Layout, sharding: Sharding, group: Communicator, seed: int, pool: Pool) -> Unit:
    """Allocate what this rank of the group keeps of a unit, with its first values.

    `pool`: where exact sums take and leave their arrays.
    """
    s, size = sharding, layout.padded
    whole = slice(0, size)
    part = whole if s.stage == 0 else layout.part(group.rank)
    length = part.stop - part.start
    values = gradient = None
    if s.stage < 3:
        values = group.empty((size,), s.storage) if s.stage else np.empty(size, s.storage)
        held = values[part]
    else:
        held = group.empty((length,), s.storage)
    if s.stage < 2:
        gradient = group.empty((size,), s.storage)
        gradient.fill(0)
        reduced = gradient[part]
    else:
        reduced = group.empty((length,), s.storage)
        reduced.fill(0)
    masters = np.empty(length, s.compute) if s.mixed else held
    shard = Shard(
        layout, part, masters, reduced, held if s.mixed else None,
        np.zeros(length, s.compute), np.zeros(length, s.compute),
    )  # fmt: skip
    layout.first_values(seed, part, masters)
    if s.mixed:
        convert(masters, held)
    if values is not None and part != whole:  # the others' parts are drawn too: that is quicker than to gather them
        for index in range(layout.parts):
            other = layout.part(index)
            if other != part:
                drawn = np.empty(length, s.compute)
                layout.first_values(seed, other, drawn)
                convert(drawn, values[other])
    if values is not None and not s.mixed:
        for parameter, view in layout.views(values):
            parameter.data = view
    return Unit(layout, values, gradient, shard, set(), TreeSum(pool.give))
