"""Every way to lay a training out over ranks, against one rank, against its formulas, and bit by bit with exact sums."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from collectives import Communicator
from collectives.testing import run_ranks
from parallel import accounting, checkpoint
from parallel.configuration import ConfigurationError, TrainingConfiguration, balance
from parallel.formulas import ring_bytes
from parallel.optim import LossScale
from parallel.train import Trainer
from tests.parallel.layouts import CORPUS, Run, check_numbers, configuration, go_on, train

STEPS = 4
EXACT_STEPS = 10

LAYOUTS: list[tuple[int, dict[str, Any]]] = [
    (2, {"tp": 2}),
    (3, {"tp": 3}),  # which divides neither the heads nor the vocabulary
    (4, {"tp": 2, "zero": 1}),
    (4, {"tp": 4, "sequence_parallel": True}),
    (4, {"tp": 2, "sequence_parallel": True, "zero": 3, "recompute": True}),
    (6, {"tp": 3, "sequence_parallel": True, "zero": 2, "micro_batches": 2}),
    (2, {"pp": 2, "schedule": "gpipe", "micro_batches": 4}),
    (2, {"pp": 2, "micro_batches": 3}),
    (4, {"pp": 4, "micro_batches": 8, "recompute": True}),
    (2, {"pp": 2, "schedule": "interleaved", "micro_batches": 4}),
    (2, {"pp": 2, "schedule": "zb-h1", "micro_batches": 4}),
    (2, {"pp": 2, "schedule": "zb-h1", "micro_batches": 4, "recompute": True}),
    (2, {"pp": 2, "schedule": "zb-v", "micro_batches": 4}),
    (4, {"pp": 2, "schedule": "zb-v", "micro_batches": 3, "zero": 3}),
    (3, {"pp": 3, "stage_layers": "1,2,1", "micro_batches": 2}),
    (4, {"pp": 2, "tp": 2, "micro_batches": 4}),
    (8, {"pp": 2, "tp": 2, "micro_batches": 2}),
    (8, {"pp": 2, "tp": 2, "zero": 1, "schedule": "gpipe", "micro_batches": 2}),
    (8, {"pp": 2, "tp": 2, "zero": 2, "schedule": "zb-h1", "micro_batches": 2, "sequence_parallel": True}),
    (8, {"pp": 2, "tp": 2, "zero": 3, "schedule": "interleaved", "micro_batches": 2, "recompute": True}),
    (8, {"tp": 2, "zero": 3, "replicas": 2, "sequence_parallel": True}),
    (2, {"cp": 2}),
    (3, {"cp": 3, "recompute": True}),
    (4, {"cp": 2, "zero": 3, "micro_batches": 2}),
    (8, {"cp": 2, "tp": 2, "pp": 2, "micro_batches": 2, "sequence_parallel": True, "seq": 24}),
]


def name(layout: tuple[int, dict[str, Any]]) -> str:
    ranks, options = layout
    return " ".join([str(ranks), *(f"{key}={value}" for key, value in options.items())])


def chosen(dtype: str, **options: Any) -> TrainingConfiguration:
    return configuration(
        dtype, **{"batch": 8, "layers": 4, "heads": 4, "dropout": 0.1, "clip": 0.2, "steps": EXACT_STEPS, **options}
    )


@cache
def one_rank(dtype: str, steps: int, **options: Any) -> Run:
    (run,) = train(1, chosen(dtype, **options), steps)
    return run


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS, ids=name)
def test_every_layout_trains_as_one_rank_does(layout: tuple[int, dict[str, Any]]) -> None:
    ranks, options = layout
    several = train(ranks, chosen("float64", **options), STEPS)
    one = one_rank("float64", STEPS, seq=options.get("seq", 12))
    check_numbers(several)
    np.testing.assert_allclose(several[0].losses, one.losses, rtol=1e-10)
    assert several[0].validation == pytest.approx(one.validation, rel=1e-10)
    for parameter, values in one.weights.items():
        # Adam divides by the root of tiny second moments, which magnifies rounding.
        np.testing.assert_allclose(several[0].weights[parameter], values, rtol=0, atol=1e-8)


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS, ids=name)
def test_gradients_of_every_layout_are_those_of_one_rank(layout: tuple[int, dict[str, Any]]) -> None:
    """With plain weights, Adam's first moments after a step are the clipped gradients times 0.1."""
    ranks, options = layout

    def moments(world: Communicator, given: dict[str, Any]) -> dict[str, np.ndarray]:
        trainer = Trainer(chosen("float64", **given), CORPUS, world)
        trainer.step()
        trainer.replica.settle()  # stages 1 and 2 are still gathering
        found: dict[str, np.ndarray] = {}
        for piece in trainer.pieces():
            if piece.name.startswith("optimizer.first_moment/"):
                box = np.full(piece.extent, np.nan)
                box.reshape(-1)[piece.begin : piece.begin + piece.values.size] = piece.values
                whole = np.full(piece.shape, np.nan)
                whole[tuple(slice(a, a + n) for a, n in zip(piece.start, piece.extent, strict=True))] = box
                put(found, piece.name, whole)
        return found

    def put(found: dict[str, np.ndarray], name: str, part: np.ndarray) -> None:
        """Add elements to what is known; what several ranks hold is the same on all of them."""
        known = found.setdefault(name, part)
        both = ~np.isnan(known) & ~np.isnan(part)
        np.testing.assert_array_equal(known[both], part[both])
        found[name] = np.where(np.isnan(known), part, known)

    (one,) = run_ranks(1, lambda world: moments(world, {"seq": options.get("seq", 12)}))
    several: dict[str, np.ndarray] = {}
    for rank in run_ranks(ranks, lambda world: moments(world, options)):
        for key, part in rank.items():
            put(several, key, part)
    assert several.keys() == one.keys()
    for key, values in one.items():
        np.testing.assert_allclose(several[key], values, rtol=0, atol=1e-10 * np.abs(values).max(), err_msg=key)


@pytest.mark.slow
@pytest.mark.parametrize("heads", [4, 3])
def test_exact_sums_have_the_same_bits_in_every_layout(heads: int) -> None:
    """Hashes of all weights after 10 steps, losses, and the validation's."""
    shape = {"heads": heads, "hidden": 24, "exact": True, "batch": 6}
    one = one_rank("float32", EXACT_STEPS, **shape)
    layouts: list[tuple[int, dict[str, Any]]] = [
        (4, {}), (4, {"zero": 1}), (3, {"zero": 2}), (4, {"zero": 3}), (4, {"zero": 3, "replicas": 2}),
        (2, {"tp": 2}), (3, {"tp": 3}), (2, {"tp": 2, "sequence_parallel": True}),
        (3, {"tp": 3, "sequence_parallel": True, "recompute": True}),
        (2, {"pp": 2, "schedule": "gpipe"}), (2, {"pp": 2}), (4, {"pp": 4}), (2, {"pp": 2, "schedule": "interleaved"}),
        (2, {"pp": 2, "schedule": "zb-h1"}), (2, {"pp": 2, "schedule": "zb-v"}),
        (8, {"pp": 2, "tp": 2}), (8, {"pp": 2, "tp": 2, "zero": 3, "schedule": "interleaved"}),
        (8, {"pp": 2, "tp": 2, "zero": 2, "schedule": "zb-h1", "sequence_parallel": True}),
    ]  # fmt: skip
    for ranks, options in layouts:
        several = train(ranks, chosen("float32", **shape, **options), EXACT_STEPS)
        check_numbers(several)
        assert (several[0].digest, several[0].losses) == (one.digest, one.losses), (ranks, options)
        assert several[0].validation == one.validation


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, 3])
def test_large_exact_sums_are_cut_among_the_ranks(ranks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    shape = {"heads": 3, "hidden": 24, "exact": True}
    one = one_rank("float32", 3, **shape)
    monkeypatch.setattr("parallel.axis.GATHERED_BELOW", 0)
    several = train(ranks, chosen("float32", **shape, tp=ranks), 3)
    check_numbers(several)
    assert several[0].digest == one.digest


@pytest.mark.slow
@settings(max_examples=12, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.data())
def test_any_layout_of_up_to_8_ranks(data: st.DataObject) -> None:
    def draw(name: str, *values: Any) -> Any:
        return data.draw(st.sampled_from(values), label=name)

    tp, pp = draw("tp", 1, 2, 3), draw("pp", 1, 2)
    cp = draw("cp", 1, 2) if tp * pp <= 4 else 1
    dp = draw("dp", *range(1, 8 // (tp * pp * cp) + 1))
    options = {
        "tp": tp, "pp": pp, "cp": cp, "zero": draw("zero", 0, 1, 2, 3), "micro_batches": 2, "batch": 2 * dp + 1,
        "schedule": draw("schedule", "gpipe", "1f1b", "interleaved", "zb-h1", "zb-v"),
        "sequence_parallel": tp > 1 and draw("sequence_parallel", False, True), "seq": 24,
        "recompute": draw("recompute", False, True), "kv_heads": draw("kv_heads", None, 3), "heads": 3, "hidden": 12,
        "dtype": draw("dtype", "float64", "bfloat16"), "exact": cp == 1 and draw("exact", False, True),
    }  # fmt: skip
    several = train(dp * pp * cp * tp, chosen(**options), 2)
    check_numbers(several)
    (one,) = train(1, replace(chosen(**options), tp=1, pp=1, cp=1, zero=0, sequence_parallel=False, recompute=False), 2)
    if options["exact"] and options["dtype"] != "bfloat16":
        assert several[0].digest == one.digest
    tolerance = 1e-10 if options["dtype"] == "float64" else 3e-2
    np.testing.assert_allclose(several[0].losses, one.losses, rtol=tolerance)


@pytest.mark.slow
@pytest.mark.parametrize("exact", [False, True])
def test_a_checkpoint_of_one_layout_goes_on_in_any_other(tmp_path: Path, exact: bool) -> None:
    shape = chosen("float32" if exact else "float64", exact=exact, micro_batches=2)

    def save(world: Communicator) -> None:
        options = {"pp": 2, "tp": 2, "zero": 3, "schedule": "zb-v", "sequence_parallel": True}
        trainer = Trainer(replace(shape, **options), CORPUS, world)
        for _ in range(2):
            trainer.step()
        checkpoint.save(str(tmp_path), world, trainer.pieces(), trainer.metadata(), trainer.steps)

    run_ranks(8, save)
    (one,) = train(1, shape, STEPS)
    others: list[tuple[int, dict[str, Any]]] = [
        (1, {}), (3, {"tp": 3}), (4, {"pp": 2, "schedule": "interleaved", "zero": 1}), (4, {"tp": 4, "sequence_parallel": True}),
        (2, {"zero": 2}),
    ]  # fmt: skip
    for ranks, options in others:
        for losses in go_on(ranks, replace(shape, **options), tmp_path, STEPS - 2):
            if exact:
                assert losses == one.losses[2:]
            else:
                np.testing.assert_allclose(losses, one.losses[2:], rtol=1e-10)


@pytest.mark.slow
@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_tensor_parallelism_sends_the_published_volumes(sequence_parallel: bool) -> None:
    """8·(t − 1)/t·A a layer and micro-batch, and what the ends of the model send, for sizes above any small message."""
    ranks, layers, samples, micro_batches = 2, 3, 8, 2
    options = {"hidden": 64, "seq": 64, "layers": layers, "heads": 4, "dropout": 0.0, "validation_batches": 1}

    def rank(world: Communicator) -> tuple[int, int]:
        shape = chosen("float32", tp=ranks, sequence_parallel=sequence_parallel, micro_batches=micro_batches, **options)
        trainer = Trainer(shape, CORPUS, world)
        trainer.step()
        return accounting.traffic(trainer)["tensor"], accounting.expected_traffic(trainer, 0)["tensor"]

    stream = samples // micro_batches * 64 * 64 * 4
    tokens = samples // micro_batches * 64
    a_layer = 8 * (ranks - 1) * stream // ranks
    in_loss = 3 * ring_bytes("all_reduce", tokens * 4, ranks)
    # The embedding adds up once forward, and the head's input once backward; sequence-parallel ones are counterparts.
    ends = 2 * ring_bytes("all_reduce", stream, ranks)
    copied = 0
    if sequence_parallel:
        per_layer = 4 * 64 + 2 * 64  # two normalisations and two biases
        copied = ring_bytes("all_reduce", (layers * per_layer + 2 * 64 + 64 * 64) * 4, ranks)
    for sent, expected in run_ranks(ranks, rank):
        assert sent == expected
        assert sent == micro_batches * (layers * a_layer + in_loss + ends) + copied


@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_ranks_with_unequal_parts_have_the_same_buckets(sequence_parallel: bool) -> None:
    """Weights of several buckets, of which three ranks have 2, 1 and 1 heads."""
    ranks, options = 3, {"hidden": 160, "layers": 3, "dropout": 0.0, "validation_batches": 1, "batch": 3}

    def rank(world: Communicator) -> list[list[str]]:
        trainer = Trainer(chosen("float32", tp=ranks, sequence_parallel=sequence_parallel, **options), CORPUS, world)
        trainer.step()
        trainer.weights_sha256()
        return [[slot.parameter.name for slot in unit.layout.slots] for unit in trainer.replica.units]

    buckets, *others = run_ranks(ranks, rank)
    assert len(buckets) > 1
    assert all(other == buckets for other in others)


@pytest.mark.parametrize("exact", [False, True])
def test_a_skipped_step_sends_what_the_formulas_say(exact: bool) -> None:
    def rank(world: Communicator) -> tuple[int, dict[str, int], dict[str, int]]:
        trainer = Trainer(chosen("float16", exact=exact), CORPUS, world)
        trainer.loss_scale = LossScale(2.0**40, 1000)
        with np.errstate(all="ignore"):
            trainer.step()
        return trainer.skipped, accounting.traffic(trainer), accounting.expected_traffic(trainer, 0)

    for skipped, sent, expected in run_ranks(2, rank):
        assert skipped == 1
        assert sent == expected


@pytest.mark.parametrize(
    ("change", "ranks", "message"),
    [
        ({"tp": 8}, 8, "tp8 cuts attention by heads, of which there are 4: give at most tp4, or more --heads"),
        ({"tp": 4, "kv_heads": 2}, 4, "tp4 cuts attention by heads, of which there are 2: give at most tp2, or more --kv-heads"),
        ({"pp": 8}, 8, "pp8 with 1 stages a rank takes 8 layers, but there are 4: give --layers 8, or fewer ranks or chunks"),
        ({"pp": 4, "schedule": "interleaved", "micro_batches": 4}, 4, "pp4 with 2 stages a rank takes 8 layers"),
        ({"pp": 2, "schedule": "interleaved", "micro_batches": 3}, 2, "--schedule interleaved: .* multiple"),
        ({"pp": 2, "schedule": "zb-v", "chunks": 3}, 2, "--schedule zb-v: "),
        ({"pp": 2, "schedule": "pipedream"}, 2, "--schedule pipedream: .*1f1b"),
        ({"pp": 2, "stage_layers": "4"}, 2, "--stage-layers must be 2 numbers from 1 that add up to --layers 4, got 4"),
        ({"pp": 2, "stage_layers": "4,x"}, 2, "--stage-layers must be 2 numbers"),
        ({"pp": 2, "stage_layers": "4,0"}, 2, "--stage-layers must be 2 numbers from 1"),
        ({"tp": 2}, 3, "tp 2, pp 1 and cp 1 take 2 ranks, which do not divide 3"),
        ({"sequence_parallel": True}, 2, "--sequence-parallel is for layers that are cut: give a layout with tp2 or more"),
        ({"sequence_parallel": True, "tp": 2, "seq": 11}, 2, "--sequence-parallel cuts --seq 11 into 2 equal parts, .* give 10"),
        ({"cp": 2, "exact": True}, 2, "--exact is not for context parallelism: give a layout without cp"),
        ({"cp": 8}, 8, "cp8 cuts each sequence into 16 blocks, but --seq is 12"),
        ({"tp": 17, "heads": 17, "hidden": 17, "exact": True}, 17, "--exact cuts layers into 16 pieces: tp17 is more"),
        ({"pp": 2, "micro_batches": 5}, 4, "--micro-batches is 5, but a rank has only 4 sequences"),
        ({"chunks": -1}, 1, "--chunks must be a finite number of at least 0, got -1"),
        ({"chunks": 2}, 1, "--chunks is for pipelines: give a layout with pp2 or more as well"),
        ({"schedule": "pipedream"}, 2, "--schedule pipedream: unknown schedule 'pipedream'; expected one of .*gpipe"),
    ],
)  # fmt: skip
def test_a_layout_that_does_not_fit_says_what_would(change: dict[str, Any], ranks: int, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        chosen("float32", **change).check(ranks)


@given(st.integers(1, 40), st.integers(1, 8), st.floats(0, 5))
def test_layers_are_balanced(layers: int, stages: int, head_cost: float) -> None:
    stages = min(stages, layers)
    counts = balance(layers, stages, head_cost)
    assert sum(counts) == layers
    assert min(counts) >= 1
    costs = [*counts[:-1], counts[-1] + head_cost]
    for stage in range(stages):  # no layer could go elsewhere and make the dearest stage cheaper
        if counts[stage] > 1:
            for other in range(stages):
                moved = list(costs)
                moved[stage] -= 1
                moved[other] += 1
                assert max(moved) >= max(costs) - 1e-9
