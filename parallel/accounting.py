"""The bytes that a training has sent and that it holds, as measured, and as the formulas say they must be.

Formulas are the published ones where they hold: what every rank sends in a collective of large equal blocks. A small message
may go by an algorithm that sends more; what counts for it is the number that the schedule itself tells.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from collectives.select import LARGE_MESSAGE
from parallel import buffers
from parallel.activations import Shape, most_kept
from parallel.autograd.across import chunks
from parallel.axis import Axis
from parallel.exact import exchange_shapes, most_nodes, sample_runs
from parallel.formulas import (
    Memory,
    model_state,
    ring_attention_bytes,
    ring_bytes,
    share,
    step_calls,
    tensor_gathers,
    tensor_sums,
)

if TYPE_CHECKING:
    from typing import Any

    from collectives import Communicator
    from parallel.data_parallel import Chunk
    from parallel.nn import Extent
    from parallel.sharding import Unit
    from parallel.train import Trainer

_LINE = 64
_FLOAT64 = np.dtype(np.float64)
_VOCABULARY = 256


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


def expected_memory(trainer: Trainer) -> Memory:
    """Return what `memory` must be after a step, from the formulas."""
    c, replica, sharding = trainer.configuration, trainer.replica, trainer.configuration.sharding
    sizes = [unit.layout.padded for unit in replica.units]
    storage, compute = sharding.storage.itemsize, sharding.compute.itemsize
    state = model_state(c.zero, replica.group.size, sum(sizes), storage, compute)
    row, samples = trainer.pipeline.schedule.rows[trainer.mesh.pp.rank], _samples(trainer)
    first = trainer.samples(c.batch).start
    numbers = [first + number if count else None for number, count in enumerate(samples)]
    step = buffers.Step(sharding, [_chunk_sizes(chunk) for chunk in replica.chunks], replica.group.size, numbers)
    shapes = exchange_shapes(c.batch, max(sizes), replica.group.size, c.replicas) if c.exact else []
    temporary = step.run(row, sum(map(math.prod, shapes)))
    kept = most_kept(row, _extents(trainer), samples, _shape(trainer), c.recompute)
    return replace(state, temporary=temporary, activations=kept)


def _chunk_sizes(chunk: Chunk) -> buffers.ChunkSizes:
    def size(unit: Unit) -> buffers.UnitSize:
        names = [slot.parameter.name for slot in unit.layout.slots]
        tail = [name.startswith(("final_norm.", "head.")) for name in names]
        # An embedding that is the output head as well gets a gradient early, and another one late.
        shared = chunk.model.head is None and chunk.model.extent.last and "token_embedding.weight" in names
        return buffers.UnitSize(unit.layout.padded, any(tail) or shared, all(tail))

    return buffers.ChunkSizes([size(unit) for unit in chunk.ends], [size(unit) for unit in chunk.blocks])


def traffic(trainer: Trainer) -> dict[str, int]:
    """Return the bytes that this rank has sent on each axis so far; what is under way must be finished first."""
    return {name: 0 if axis is None else axis.stats.bytes_sent for name, axis in _axes(trainer).items()}


def expected_traffic(trainer: Trainer, validations: int) -> dict[str, int]:
    """Return what `traffic` must be after the steps taken here and so many validations."""
    steps = trainer.steps - trainer.first
    evaluated = _evaluated(trainer)
    return {
        **_of_data(trainer, steps, validations),
        "tensor": steps * (_of_tensor(trainer, _samples(trainer), True) + _of_copied(trainer))
        + validations * _of_tensor(trainer, evaluated, False),
        "context": steps * _of_context(trainer, _samples(trainer), True)
        + validations * _of_context(trainer, evaluated, False),
        "pipeline": steps * _of_pipeline(trainer, _samples(trainer), True)
        + validations * _of_pipeline(trainer, evaluated, False),
        "tied": steps * _of_tied(trainer),
        "metrics": _of_metrics(trainer, steps, validations),
    }


def _axes(trainer: Trainer) -> dict[str, Communicator | None]:
    replica = trainer.replica
    return {
        "gather": replica.gathers,
        "reduce": replica.reduces,
        "replicate": replica.replicates,
        "tensor": trainer.mesh.tp,
        "context": trainer.mesh.cp,
        "pipeline": trainer.mesh.pp,
        "tied": trainer.tied,
        "metrics": trainer.metrics,
    }


def _samples(trainer: Trainer) -> list[int]:
    """How many samples each micro-batch of this rank holds."""
    mine, count = len(trainer.samples(trainer.configuration.batch)), trainer.pipeline.schedule.micro_batches
    if trainer.configuration.exact:
        return [1] * mine + [0] * (count - mine)
    return [len(share(mine, count, number)) for number in range(count)]


def _evaluated(trainer: Trainer) -> list[int]:
    """How many samples go together in a validation."""
    c = trainer.configuration
    windows = c.validation_batches * c.batch
    mine, at_once = len(trainer.samples(windows)), trainer.at_once
    parts = [min(at_once, mine - start) for start in range(0, mine, at_once)]
    return parts + [1] * (trainer.evaluations(windows) - len(parts))


def _extents(trainer: Trainer) -> list[Extent]:
    return [chunk.model.extent for chunk in trainer.replica.chunks]


def _shape(trainer: Trainer) -> Shape:
    c, ranks, rank = trainer.configuration, trainer.mesh.tp.size, trainer.mesh.tp.rank
    within = trainer.positions
    between = len(share(within, ranks, rank)) if c.sequence_parallel else within
    head, groups = c.hidden // c.heads, len(share(c.groups, ranks, rank))
    cuts = [len(_axis(trainer).cut(length).elements) for length in (4 * c.hidden, _VOCABULARY)]
    return Shape(
        hidden=c.hidden, head=head, heads=groups * (c.heads // c.groups), groups=groups, inner=cuts[0], vocabulary=cuts[1],
        within=within, between=between, item=c.sharding.compute.itemsize, ring=c.cp > 1,
    )  # fmt: skip


def _axis(trainer: Trainer) -> Axis:
    """How layers are cut, among one rank where they are not."""
    return trainer.axis or Axis(trainer.mesh.tp)


def _sent(axis: Communicator, collective: str, elements: int, dtype: np.dtype[Any]) -> int:
    nbytes = elements * dtype.itemsize
    if nbytes >= LARGE_MESSAGE and nbytes % (_LINE * axis.size) == 0:
        return ring_bytes(collective, nbytes, axis.size)
    return axis.explain(collective, nbytes, dtype=dtype).bytes_sent[axis.rank]


# Data parallelism and ZeRO


def _of_data(trainer: Trainer, steps: int, validations: int) -> dict[str, int]:
    c, replica = trainer.configuration, trainer.replica
    axes = {"gather": replica.gathers, "reduce": replica.reduces, "replicate": replica.replicates}
    batches = trainer.pipeline.schedule.micro_batches
    nodes, group_nodes = (most_nodes(sample_runs(c.batch, replica.ranks, n)) for n in (1, replica.group.size))
    sent = dict.fromkeys(axes, 0)
    for unit in replica.units:
        whole, part = unit.layout.padded, unit.layout.padded // replica.group.size
        for call in step_calls(c.zero, c.exact, batches, not c.keep_parameters, c.replicas):
            elements = {"whole": whole, "part": part, "nodes": whole * nodes, "groups": part * group_nodes * c.replicas}
            dtype = c.sharding.compute if call.computes else c.sharding.storage
            times = call.times * (steps - trainer.skipped if call.updates else steps)
            sent[call.axis] += times * _sent(axes[call.axis], call.collective, elements[call.what], dtype)
        # In stage 3 a validation gathers; stages 1 and 2 gather what they did not read from a checkpoint.
        passes = validations * len(_evaluated(trainer))
        gathers = passes if c.zero == 3 else int(trainer.restored and c.zero > 0)
        sent["gather"] += gathers * _sent(axes["gather"], "all_gather", whole, c.sharding.storage)
    return sent


# Tensor parallelism


def _of_tensor(trainer: Trainer, samples: list[int], backward: bool) -> int:
    """What one step, or one validation, sends for layers that are cut."""
    c, axis = trainer.configuration, trainer.mesh.tp
    if axis.size == 1:
        return 0
    total = 0
    for extent in _extents(trainer):
        args = len(extent.layers), extent.first, extent.last, backward, c.recompute
        for count in samples:
            for collective, elements, times in _crossings(trainer, *args, count):
                total += times * _sent(axis, collective, elements, c.sharding.compute)
    return total


def _crossings(
    trainer: Trainer, layers: int, first: bool, last: bool, backward: bool, recompute: bool, samples: int
) -> Iterator[tuple[str, int, int]]:
    """Yield the collectives of a micro-batch in a stage: (collective, elements, times)."""
    c, axis = trainer.configuration, trainer.mesh.tp
    tokens = samples * trainer.positions
    whole = tokens * c.hidden
    if last:
        yield "all_reduce", tokens, 1
        if c.exact:
            yield "all_gather", axis.size * _axis(trainer).cut(_VOCABULARY).most_nodes * tokens, 1
            yield "all_reduce", tokens, 1
        else:
            yield "all_reduce", 2 * tokens, 1
    if c.exact:
        yield from _exact_crossings(trainer, layers, first, last, backward, recompute, samples)
        return
    if c.sequence_parallel:
        yield "all_gather", whole, tensor_gathers(layers, first, last, backward, recompute)
    # What a layer adds up forward goes in parts.
    forward = 2 * layers * (2 if backward and recompute else 1)
    collective, rows = ("reduce_scatter", samples) if c.sequence_parallel else ("all_reduce", tokens)
    for part in chunks(rows):
        yield collective, (part.stop - part.start) * (whole // rows), forward
    yield collective, whole, tensor_sums(layers, first, last, backward, recompute) - forward


def _exact_crossings(
    trainer: Trainer, layers: int, first: bool, last: bool, backward: bool, recompute: bool, samples: int
) -> Iterator[tuple[str, int, int]]:
    """The same, where ranks exchange the nodes of a tree."""
    c, size = trainer.configuration, trainer.mesh.tp.size
    whole = samples * trainer.positions * c.hidden
    attention, hidden = (_axis(trainer).cut(c.hidden, c.groups), _axis(trainer).cut(4 * c.hidden))
    sums = [(attention, layers), (hidden, layers)] * (2 if backward and recompute else 1)
    if backward:
        sums += [(attention, layers), (hidden, layers)] + ([(_axis(trainer).cut(_VOCABULARY), 1)] if last else [])
    length = -(-whole // size)  # every rank adds up an equal part, or of small arrays all
    for cut, times in sums:
        if not c.sequence_parallel and _axis(trainer).gathers(whole * c.sharding.compute.itemsize):
            yield "all_gather", size * cut.most_nodes * whole, times
            continue
        yield "all_to_all", size * cut.most_nodes * length, times
        if not c.sequence_parallel:
            yield "all_gather", size * length, times
    if not c.sequence_parallel:
        if first:
            yield "all_reduce", whole, 1
        return
    yield "all_gather", whole, tensor_gathers(layers, first, last, backward, recompute)
    if first:
        yield "reduce_scatter", whole, 1
    if backward and samples:
        runs = [share(trainer.positions, size, rank) for rank in range(size)]
        yield "all_gather", size * most_nodes(runs) * c.hidden, 2 * layers  # biases
        yield "all_gather", size * most_nodes(runs) * 2 * c.hidden, 2 * layers + last  # normalisations


def _of_copied(trainer: Trainer) -> int:
    """What one step sends to add up gradients of which every tensor-parallel rank makes a part."""
    c, axis = trainer.configuration, trainer.mesh.tp
    dtype = c.sharding.compute if c.zero > 1 or c.exact else c.sharding.storage
    mine = len(trainer.samples(c.batch))
    times = mine if c.exact else trainer.pipeline.schedule.micro_batches if c.zero > 1 else 1
    sizes = [unit.layout.size - unit.layout.copied for unit in trainer.replica.units]
    return sum(times * _sent(axis, "all_reduce", size, dtype) for size in sizes if size)


# Context parallelism, and pipelines


def _of_context(trainer: Trainer, samples: list[int], backward: bool) -> int:
    c, axis, shape = trainer.configuration, trainer.mesh.cp, _shape(trainer)
    if axis.size == 1:
        return 0
    layers, total = sum(len(extent.layers) for extent in _extents(trainer)), 0
    for count in samples:
        there, back = ring_attention_bytes(axis.size, axis.rank, count, c.seq, shape.groups * shape.head, shape.item)
        total += layers * (there + (back + (there if c.recompute else 0) if backward else 0))
    return total


def _of_pipeline(trainer: Trainer, samples: list[int], backward: bool) -> int:
    """Activations go on to the next stage, and gradients to the one before, B·S·D elements each (Narayanan 2021)."""
    places, stream, total = trainer.pipeline.schedule.places, _shape(trainer).stream, 0
    for stage, (rank, _) in enumerate(places):
        if rank != trainer.mesh.pp.rank:
            continue
        there = stage + 1 < len(places) and places[stage + 1][0] != rank
        back = backward and stage > 0 and places[stage - 1][0] != rank
        total += (there + back) * sum(samples) * stream
    return total


def _of_tied(trainer: Trainer) -> int:
    """The gradient of an embedding that the first stage and the last hold is added up once a step."""
    tied = [unit for unit in trainer.replica.units if unit.layout.tied]
    if len(tied) != 1 or trainer.tied is None:
        return 0
    return _sent(trainer.tied, "all_reduce", tied[0].shard.gradient.size, trainer.configuration.sharding.storage)


def _of_metrics(trainer: Trainer, steps: int, validations: int) -> int:
    """The loss and the norm of each step, and the loss of each validation; exact sums gather losses."""
    c, axis = trainer.configuration, trainer.metrics
    head = _sent(axis, "broadcast", 1, _FLOAT64) if c.pp > 1 and not c.stage_layers else 0
    if not c.exact:
        in_step = _sent(axis, "all_reduce", 2, _FLOAT64)
        return head + steps * in_step + validations * _sent(axis, "all_reduce", 1, _FLOAT64)
    losses = _sent(axis, "all_gather", axis.size * trainer.pipeline.schedule.micro_batches, _FLOAT64)
    norm = _sent(axis, "all_reduce", 1, _FLOAT64) + _sent(axis, "all_reduce", 3, _FLOAT64)
    passes = len(_evaluated(trainer))
    return head + steps * (losses + norm) + validations * _sent(axis, "all_gather", axis.size * passes, _FLOAT64)
