"""What a step sends and what a rank holds, as exact integers, to be compared with what is measured.

Bytes are payload bytes sent.
"""

from __future__ import annotations

from dataclasses import dataclass


def share(count: int, parts: int, index: int) -> range:
    """Return part `index` of `range(count)` cut into `parts` runs whose lengths differ by at most one."""
    quotient, remainder = divmod(count, parts)
    start = index * quotient + min(index, remainder)
    return range(start, start + quotient + (index < remainder))


def zigzag(sequence: int, ranks: int, rank: int) -> tuple[range, range]:
    """Return the positions that a rank holds where ranks share a sequence: blocks `rank` and 2·ranks − 1 − `rank` of 2·ranks.

    With causal attention, all ranks then have the same to compute (Llama 3 2024, arXiv 2407.21783, section 3.3.2).
    """
    return share(sequence, 2 * ranks, rank), share(sequence, 2 * ranks, 2 * ranks - 1 - rank)


def ring_bytes(collective: str, nbytes: int, ranks: int) -> int:
    """Return the bytes that every rank sends in a collective of a large buffer of equal blocks, the least there can be.

    An all_reduce of N bytes sends 2·(p − 1)/p·N, each half of it (p − 1)/p·N (Patarasuk 2009), and so does an all_to_all.
    """
    halves = {"all_reduce": 2, "all_gather": 1, "reduce_scatter": 1, "all_to_all": 1}[collective]
    return halves * (ranks - 1) * nbytes // ranks


def ring_attention_bytes(
    ranks: int, rank: int, samples: int, sequence: int, key_width: int, item: int
) -> tuple[int, int]:
    """Return the bytes that a rank sends in `ring_attention`, forward and backward.

    Forward, it passes on the keys and values of all ranks but the next one, 2·(p − 1)/p·N·K elements for N tokens where blocks
    are equal; backward, the same again, and their gradients, of all ranks but itself.
    """

    def others(left_out: int) -> int:
        held = sum(map(len, zigzag(sequence, ranks, left_out)))
        return 2 * samples * (sequence - held) * key_width * item

    forward = others((rank + 1) % ranks)
    return forward, forward + others(rank)


@dataclass(frozen=True)
class Memory:
    """Bytes of one rank: for the whole of the training, of the buffers that come and go, and of what is kept for backward.

    `optimizer`: the moments, and the masters where parameters are kept in 16 bits. `temporary`: what the pools of data
    parallelism hold, for whole parameters and gradients; messages, and results of products, are not counted.
    """

    parameters: int
    gradients: int
    optimizer: int
    temporary: int = 0
    activations: int = 0


@dataclass(frozen=True)
class Call:
    """A collective that every unit takes part in: on which axis, and how often in a step.

    `what`: the whole unit, this rank's part, or with exact sums the nodes of ranks or of groups. `computes`: in the dtype
    that is computed with, not in the one that is kept. `updates`: only in steps that update the parameters.
    """

    axis: str
    collective: str
    times: int
    what: str = "whole"
    computes: bool = False
    updates: bool = False


def step_calls(stage: int, exact: bool, micro_batches: int, reshard: bool, replicas: int) -> list[Call]:
    """Return the collectives of one step.

    Stage 0 is AR; stage 1 RS + AG; stage 2 M·RS + AG; stage 3 M·(2·AG + RS), or M·(AG + RS) where parameters are kept after
    forward (Rajbhandari 2020, arXiv 1910.02054, section 7); with replicas one AR of the shard among them besides. Summing in
    a fixed tree (exact) takes an all_to_all of the tree's nodes in place of the reductions, and an AG for stage 0.
    """
    calls = []
    if stage in (1, 2):
        calls.append(Call("gather", "all_gather", 1, updates=True))
    elif stage == 3:
        calls.append(Call("gather", "all_gather", micro_batches * (2 if reshard else 1)))
    if exact:
        calls.append(Call("reduce", "all_to_all", 1, "nodes", computes=True))
        if replicas > 1:
            calls.append(Call("replicate", "all_gather", 1, "groups", computes=True))
        if stage == 0:
            calls.append(Call("gather", "all_gather", 1, computes=True))
        return calls
    if stage == 0:
        calls.append(Call("reduce", "all_reduce", 1))
    else:
        calls.append(Call("reduce", "reduce_scatter", micro_batches if stage > 1 else 1))
    if replicas > 1:
        calls.append(Call("replicate", "all_reduce", 1, "part"))
    return calls


def model_state(stage: int, parts: int, elements: int, storage: int, compute: int) -> Memory:
    """Return what a rank holds of `elements` parameters (padded) in `parts` parts; item sizes in bytes.

    With Adam: 16 bytes a parameter in float32, and 2 + 2 + 12 in 16 bits with float32 masters. Stage 1 divides the optimizer's
    part, stage 2 the gradients too, stage 3 all (Rajbhandari 2020, arXiv 1910.02054, section 5).
    """
    masters = compute if storage != compute else 0
    return Memory(
        elements * storage // (parts if stage == 3 else 1),
        elements * storage // (parts if stage >= 2 else 1),
        elements * (2 * compute + masters) // (parts if stage >= 1 else 1),
    )


def tensor_sums(layers: int, first: bool, last: bool, backward: bool, recompute: bool) -> int:
    """Return how many times the tensor-parallel ranks of a stage add up B·S·D elements for a micro-batch.

    Twice a layer forward, after attention and after the feed-forward part, and twice backward, before them (Shoeybi 2019,
    arXiv 1909.08053, section 3), and where layers are computed again twice more; besides, once for the embedding forward, and
    once backward for what the output head reads. With sequence parallelism each is a reduce_scatter, and each has a
    counterpart in the other direction, an all_gather (Korthikanti 2022, arXiv 2205.05198, section 4.2.2).
    """
    forward = 2 * layers + first
    return forward + (2 * layers * (2 if recompute else 1) + last if backward else 0)


def tensor_gathers(layers: int, first: bool, last: bool, backward: bool, recompute: bool) -> int:
    """Return how many times they gather as many elements, with sequence parallelism: the counterparts of `tensor_sums`."""
    forward = 2 * layers + last
    return forward + (2 * layers * (2 if recompute else 1) + first if backward else 0)


def gpt_parameters(layers: int, hidden: int, sequence: int, vocabulary: int = 256, key_width: int | None = None) -> int:
    """Return the number of parameters of a GPT.

    A layer has 10·D² + 2·D·K weights (D² to queries, D·K to keys and to values, whose width K is D by default, D² back, 4·D² up
    and 4·D² down) and 11·D + 2·K biases and normalisation parameters; the embeddings have a vector for every token and position.
    """
    keys = hidden if key_width is None else key_width
    layer = (10 * hidden + 11) * hidden + 2 * keys * (hidden + 1)
    return layers * layer + (vocabulary + sequence + 2) * hidden
