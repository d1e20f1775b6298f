"""The bytes that a training has sent and that it holds, as measured, and as the formulas say they must be.

Formulas are the published ones where they hold: what every rank sends in a collective of large equal blocks. A small message
may go by an algorithm that sends more; what counts for it is the number that the schedule itself tells.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from collectives.select import LARGE_MESSAGE
from parallel.exact import most_nodes
from parallel.formulas import (
    Memory,
    Prediction,
    activations,
    model_state,
    ring_bytes,
    share,
    step_calls,
    temporary_bytes,
)

if TYPE_CHECKING:
    from typing import Any

    from collectives import Communicator
    from parallel.train import Trainer

_LINE = 64


def memory(trainer: Trainer) -> Memory:
    """Return the bytes of the arrays that this rank holds, the activations at their most."""
    units = trainer.replica.units
    shards = [unit.shard for unit in units]
    held = [shard.values if shard.copy is None else shard.copy for shard in shards]
    parameters = [part if unit.values is None else unit.values for part, unit in zip(held, units, strict=True)]
    gradients = [unit.shard.gradient if unit.gradient is None else unit.gradient for unit in units]
    moments = sum(shard.first_moment.nbytes + shard.second_moment.nbytes for shard in shards)
    masters = sum(shard.values.nbytes for shard in shards if shard.copy is not None)
    return Memory(
        sum(array.nbytes for array in parameters),
        sum(array.nbytes for array in gradients),
        moments + masters,
        trainer.replica.temporary_bytes,
        trainer.activations.peak,
    )


def expected_memory(trainer: Trainer) -> Prediction:
    """Return what `memory` must be after a step, from the formulas.

    There is none for the buffers of mixed precision, of exact sums and of kept parameters.
    """
    c, replica, sharding = trainer.configuration, trainer.replica, trainer.configuration.sharding
    sizes = [unit.layout.padded for unit in replica.units]
    storage, compute = sharding.storage.itemsize, sharding.compute.itemsize
    state = model_state(c.zero, replica.group.size, sum(sizes), storage, compute)
    temporary = None
    if not (sharding.mixed or c.exact or c.keep_parameters):
        rest, block = sizes[0] * storage, sizes[-1] * storage
        temporary = temporary_bytes(c.zero, rest, block, c.layers, c.micro_batches, replica.group.size)
    samples = 1 if c.exact else len(share(len(replica.samples(c.batch)), c.micro_batches, 0))
    kept = activations(c.layers, c.hidden, c.heads, c.seq, samples, compute, c.recompute, c.key_width)
    return Prediction(state.parameters, state.gradients, state.optimizer, temporary, kept)


def traffic(trainer: Trainer) -> dict[str, int]:
    """Return the bytes that this rank has sent on each axis so far; what is under way must be finished first."""
    return {name: axis.stats.bytes_sent for name, axis in _axes(trainer).items()}


def expected_traffic(trainer: Trainer, validations: int) -> dict[str, int]:
    """Return what `traffic` must be after the steps taken here and so many validations."""
    c, replica, axes = trainer.configuration, trainer.replica, _axes(trainer)
    steps = trainer.steps - trainer.first
    batches = len(share(c.batch, replica.ranks, 0)) if c.exact else c.micro_batches
    nodes, group_nodes = (most_nodes(c.batch, replica.ranks, merged) for merged in (1, replica.group.size))
    sent = dict.fromkeys(axes, 0)
    for unit in replica.units:
        whole, part = unit.layout.padded, unit.layout.padded // replica.group.size
        for call in step_calls(c.zero, c.exact, batches, not c.keep_parameters, c.replicas):
            elements = {"whole": whole, "part": part, "nodes": whole * nodes, "groups": part * group_nodes * c.replicas}
            dtype = c.sharding.compute if call.computes else c.sharding.storage
            times = call.times * (steps - trainer.skipped if call.updates else steps)
            sent[call.axis] += times * _sent(axes[call.axis], call.collective, elements[call.what], dtype)
        # In stage 3 a validation gathers; stages 1 and 2 gather what they did not read from a checkpoint.
        passes = validations * trainer.evaluations(c.validation_batches * c.batch)
        gathers = passes if c.zero == 3 else int(trainer.restored and c.zero > 0)
        sent["gather"] += gathers * _sent(axes["gather"], "all_gather", whole, c.sharding.storage)
    sent["metrics"] = _expected_metrics(trainer, steps, validations)
    return sent


def _axes(trainer: Trainer) -> dict[str, Communicator]:
    replica = trainer.replica
    return {
        "gather": replica.gathers,
        "reduce": replica.reduces,
        "replicate": replica.replicates,
        "metrics": trainer.metrics,
    }


def _sent(axis: Communicator, collective: str, elements: int, dtype: np.dtype[Any]) -> int:
    nbytes = elements * dtype.itemsize
    if nbytes >= LARGE_MESSAGE and nbytes % (_LINE * axis.size) == 0:
        return ring_bytes(collective, nbytes, axis.size)
    return axis.explain(collective, nbytes, dtype=dtype).bytes_sent[axis.rank]


def _expected_metrics(trainer: Trainer, steps: int, validations: int) -> int:
    """The loss and the norm of each step, and the loss of each validation; exact sums gather them."""
    c, axis = trainer.configuration, trainer.metrics
    if not c.exact:
        return steps * _sent(axis, "all_reduce", 2, _FLOAT64) + validations * _sent(axis, "all_reduce", 1, _FLOAT64)
    mine = len(share(c.batch, axis.size, 0))
    passes = trainer.evaluations(c.validation_batches * c.batch)
    return sum(
        times * _sent(axis, "all_gather", axis.size * most, _FLOAT64)
        for most, times in ((mine, steps), (passes, validations))
    )


_FLOAT64 = np.dtype(np.float64)
