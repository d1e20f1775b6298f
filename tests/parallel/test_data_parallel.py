"""Several ranks train as one does, send what the formula says, and hold the same weights."""

from __future__ import annotations

from dataclasses import astuple, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from collectives import CommunicationError, Communicator
from collectives.testing import run_ranks
from parallel import checkpoint
from parallel.autograd import Tensor, vjps
from parallel.buffers import Lent
from parallel.configuration import ConfigurationError, TrainingConfiguration
from parallel.data import Corpus
from parallel.data_parallel import DataParallel, MissingGradientError
from parallel.formulas import model_state, ring_bytes, share, step_calls
from parallel.nn import GPT, Draws, GPTConfiguration, Linear, Parameter
from parallel.sharding import Sharding
from parallel.train import Trainer, generate
from parallel.units import Pool
from tests.parallel import layouts
from tests.parallel.layouts import CORPUS, TEXT, Run, check_numbers, configuration

STEPS = 5


def train(ranks: int, chosen: TrainingConfiguration, steps: int = STEPS) -> list[Run]:
    return layouts.train(ranks, chosen, steps)


@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "tolerance"), [("float64", 1e-12), ("float32", 1e-5)])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize(("ranks", "batch", "micro_batches"), [(2, 4, 2), (3, 7, 2), (4, 10, 1)])
def test_ranks_train_as_one_does(
    ranks: int, batch: int, micro_batches: int, stage: int, dtype: str, tolerance: float
) -> None:
    (one,) = train(1, configuration(dtype, batch))
    assert set(one.sent.values()) == {0}
    assert one.losses[-1] < one.losses[0]
    several = train(ranks, configuration(dtype, batch, zero=stage, micro_batches=micro_batches))
    check_numbers(several)
    np.testing.assert_allclose(several[0].losses, one.losses, rtol=tolerance, atol=tolerance)
    assert several[0].validation == pytest.approx(one.validation, rel=tolerance)
    for name, values in one.weights.items():
        # Adam divides by the root of tiny second moments, which magnifies rounding.
        np.testing.assert_allclose(several[0].weights[name], values, rtol=0, atol=100 * tolerance)


@pytest.mark.slow
@pytest.mark.parametrize(("stage", "buffers"), [(0, 2), (1, 2), (2, 2), (3, 3)])
@pytest.mark.parametrize("ranks", [2, 3])
def test_large_units_send_the_published_volumes(ranks: int, stage: int, buffers: int) -> None:
    """Each buffer is (p − 1)/p of the parameters; computed here from the count of parameters alone."""
    steps, chosen = 2, configuration(zero=stage, layers=2, hidden=64, validation_batches=1)
    for run in train(ranks, chosen, steps):
        assert run.sent == run.expected
        padded = run.memory.optimizer // 8 * (1 if stage == 0 else ranks)  # two moments of 4 bytes
        gathered = 4 * padded * (ranks - 1) // ranks
        validations = gathered if stage == 3 else 0
        assert run.sent["gather"] + run.sent["reduce"] == steps * buffers * gathered + validations


@pytest.mark.slow
@pytest.mark.parametrize(
    ("ranks", "options"),
    [
        (4, {"zero": 1, "replicas": 2}),
        (4, {"zero": 3, "replicas": 2, "micro_batches": 2, "batch": 9}),
        (6, {"zero": 2, "replicas": 3}),
        (2, {"zero": 3, "keep_parameters": True, "micro_batches": 3}),
        (3, {"zero": 3, "keep_parameters": True, "layers": 1}),
        (2, {"zero": 3, "recompute": True}),
        (3, {"zero": 0, "recompute": True, "dropout": 0.2}),
        (3, {"zero": 2, "recompute": True, "dropout": 0.2, "micro_batches": 2}),
        (2, {"zero": 3, "layers": 1, "micro_batches": 3}),
        (2, {"zero": 3, "layers": 2, "micro_batches": 2}),
        (2, {"zero": 2, "layers": 1, "micro_batches": 2}),
        (2, {"zero": 3, "layers": 5}),
        (2, {"zero": 3, "replicas": 2, "micro_batches": 2}),
        (2, {"zero": 3, "micro_batches": 2, "seq": 152}),
        (2, {"zero": 0, "clip": 0.1}),
        (4, {"zero": 3, "clip": 0.1, "replicas": 2}),
    ],
)
def test_every_option_trains_as_one_rank_does(ranks: int, options: dict[str, Any]) -> None:
    chosen = configuration("float64", **options)
    several = train(ranks, chosen)
    check_numbers(several)
    (one,) = train(1, replace(chosen, zero=0, replicas=1, recompute=False, keep_parameters=False, micro_batches=1))
    np.testing.assert_allclose(several[0].losses, one.losses, rtol=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize(("stage", "keep"), [(0, False), (1, False), (2, False), (3, False), (3, True)])
def test_mixed_precision_follows_float32_and_holds_sixteen_bytes_a_parameter(
    stage: int, keep: bool, dtype: str
) -> None:
    several = train(2, configuration(dtype, zero=stage, micro_batches=2, keep_parameters=keep))
    check_numbers(several)
    (one,) = train(1, configuration("float32"))
    np.testing.assert_allclose(several[0].losses, one.losses, rtol=0.02)
    memory = several[0].memory
    elements = 2 * memory.parameters // (4 if stage < 3 else 2)
    parts = [1 if stage < needed else 2 for needed in (3, 2, 1)]
    assert (memory.parameters, memory.gradients, memory.optimizer) == tuple(
        size * elements // part for size, part in zip((2, 2, 12), parts, strict=True)
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    "options", [{}, {"dropout": 0.2, "recompute": True}, {"dtype": "float64"}, {"batch": 7, "keep_parameters": True}]
)
def test_exact_sums_have_the_same_bits_in_every_layout(options: dict[str, Any]) -> None:
    chosen = configuration(**{"batch": 8, "exact": True, **options})
    (one,) = train(1, chosen, steps=3)
    layouts = [(2, 0, 1), (2, 2, 1), (3, 3, 1), (4, 1, 1), (4, 3, 1), (4, 2, 2), (6, 3, 2), (5, 0, 1)]
    for ranks, stage, replicas in layouts:
        several = train(ranks, replace(chosen, zero=stage, replicas=replicas), steps=3)
        check_numbers(several)
        assert several[0].losses == one.losses
        assert several[0].validation == one.validation
        for name, values in one.weights.items():
            np.testing.assert_array_equal(several[0].weights[name], values)


@st.composite
def trainings(draw: st.DrawFn) -> tuple[int, TrainingConfiguration]:
    """Any way to hold a small model on a few ranks; of the shapes, the last has a rest of a block's size."""
    ranks, micro_batches = draw(st.integers(1, 4)), draw(st.integers(1, 3))
    stage = draw(st.integers(0, 3))
    divisors = [count for count in range(1, ranks + 1) if ranks % count == 0 and (stage or count == 1)]
    hidden, seq = draw(st.sampled_from([(16, 5), (8, 40), (24, 43)]))
    return ranks, configuration(
        draw(st.sampled_from(["float32", "float64", "bfloat16", "float16"])),
        ranks * micro_batches + draw(st.integers(0, 5)),
        zero=stage, replicas=draw(st.sampled_from(divisors)), micro_batches=micro_batches, hidden=hidden, seq=seq,
        layers=draw(st.sampled_from([1, 2, 3, 5])), exact=draw(st.booleans()), recompute=draw(st.booleans()),
        keep_parameters=draw(st.booleans()), validation_batches=1,
    )  # fmt: skip


@pytest.mark.slow
@given(trainings())
def test_every_way_to_hold_a_model_takes_what_the_formulas_say(chosen: tuple[int, TrainingConfiguration]) -> None:
    check_numbers(train(*chosen, steps=2))


@given(st.lists(st.tuples(st.booleans(), st.integers(1, 3)), max_size=30))
def test_a_pool_holds_what_was_lent_at_once(events: list[tuple[bool, int]]) -> None:
    """Buffers of two sizes are never of use for one another, those of one size are, as soon as they are given back."""
    pool, lent, out = Pool(lambda elements, dtype: np.empty(elements, dtype)), Lent(), []
    for takes, size in events:
        if takes:
            out.append(pool.take(size, np.uint8))
            lent.take(size)
        elif out:
            lent.give(out[-1].size)
            pool.give(out.pop())
    assert pool.bytes == lent.bytes


def test_a_parameter_without_a_gradient_is_named_on_all_ranks() -> None:
    class Idle(GPT):
        def __init__(self, shape: GPTConfiguration) -> None:
            super().__init__(shape)
            self.spare = Linear(3, 2)
            self.used = True

        def forward(self, tokens: np.ndarray, draws: Draws | None = None) -> Tensor:
            logits = super().forward(tokens, draws)
            return vjps.add(logits, vjps.project(Tensor(np.zeros((1, 3))), self.spare.weight)) if self.used else logits

    def rank(world: Communicator) -> str:
        model = Idle(GPTConfiguration(1, 8, 2, 4))
        model.used = False
        try:
            replica = DataParallel([model], world, Sharding(stage=0, dtype="float64"))
            replica.begin_step(1)
            with replica.backward(replica.chunks[0], None, "step 1"):
                model.loss(np.zeros((2, 5), np.uint8), 1.0).backward()
            replica.finish(4)
        except (MissingGradientError, CommunicationError) as error:
            return str(error)
        return "nothing was raised"

    for message in run_ranks(2, rank):
        assert "no gradient to spare.bias, spare.weight on rank" in message


def test_ranks_with_other_models_are_named() -> None:
    def rank(world: Communicator) -> str:
        with pytest.raises(RuntimeError, match="ranks 1 have a model with other parameters") as caught:
            DataParallel([GPT(GPTConfiguration(1 + world.rank, 8, 2, 4))], world)
        return str(caught.value)

    run_ranks(2, rank)


def test_buffers_are_those_of_rank_0() -> None:
    def rank(world: Communicator) -> np.ndarray:
        model = GPT(GPTConfiguration(1, 8, 2, 4))
        model.blocks[0].scale = np.full(3, float(world.rank + 7))
        DataParallel([model], world)
        return model.blocks[0].scale

    for found in run_ranks(3, rank):
        np.testing.assert_array_equal(found, [7, 7, 7])


@pytest.mark.slow
@pytest.mark.parametrize("exact", [False, True])
def test_a_checkpoint_goes_on_in_another_layout(tmp_path: Path, exact: bool) -> None:
    chosen = configuration("float32" if exact else "float64", 8, exact=exact, dropout=0.1)

    def save(world: Communicator) -> None:
        trainer = Trainer(replace(chosen, zero=3), CORPUS, world)
        for _ in range(2):
            trainer.step()
        checkpoint.save(str(tmp_path), world, trainer.pieces(), trainer.metadata(), trainer.steps)

    run_ranks(2, save)
    (one,) = train(1, chosen)
    for ranks, stage, replicas in ((1, 0, 1), (3, 1, 1), (4, 3, 2), (2, 2, 1)):
        for losses in layouts.go_on(ranks, replace(chosen, zero=stage, replicas=replicas), tmp_path, STEPS - 2):
            if exact:
                assert losses == one.losses[2:]
            else:
                np.testing.assert_allclose(losses, one.losses[2:], rtol=1e-12)


def test_a_checkpoint_of_another_model_or_other_data_is_refused(tmp_path: Path) -> None:
    def rank(world: Communicator) -> None:
        trainer = Trainer(configuration(), CORPUS, world)
        checkpoint.save(str(tmp_path), world, trainer.pieces(), trainer.metadata(), 0)
        with pytest.raises(checkpoint.CheckpointError, match="--hidden is 8, but the checkpoint in .* with 16"):
            Trainer(configuration(hidden=8), CORPUS, world).restore(str(tmp_path))
        with pytest.raises(checkpoint.CheckpointError, match="--data is not what the checkpoint"):
            Trainer(configuration(), Corpus(TEXT[:1499], TEXT[1500:], 1), world).restore(str(tmp_path))
        other = Trainer(configuration("float16", lr=1.0), CORPUS, world)
        assert other.restore(str(tmp_path)) == ["--lr 1.0 (was 0.003)", "--dtype float16 (was float32)"]
        assert other.loss_scale.patience
        for _ in range(STEPS):
            trainer.step()
        checkpoint.save(str(tmp_path), world, trainer.pieces(), trainer.metadata(), STEPS)
        with pytest.raises(checkpoint.CheckpointError, match="--steps is 5, and the checkpoint in .* has taken 5"):
            Trainer(configuration(), CORPUS, world).restore(str(tmp_path))
        with pytest.raises(ValueError, match="this trainer has taken 5 steps"):
            trainer.restore(str(tmp_path))

    run_ranks(1, rank)


def test_stage_3_never_draws_more_than_its_part(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = []
    draw = Parameter.initial_values

    def note(self: Parameter, seed: int, start: int, stop: int) -> np.ndarray:
        drawn.append(stop - start)
        return draw(self, seed, start, stop)

    monkeypatch.setattr(Parameter, "initial_values", note)
    model = GPT(GPTConfiguration(2, 16, 2, 8))
    run_ranks(1, lambda world: DataParallel([model], world, Sharding(stage=3)))
    whole = sum(drawn)
    drawn.clear()
    run_ranks(4, lambda world: DataParallel([GPT(GPTConfiguration(2, 16, 2, 8))], world, Sharding(stage=3)))
    assert sum(drawn) == whole == model.parameter_count()


def test_ranks_whose_weights_differ_are_named() -> None:
    def rank(world: Communicator) -> str:
        trainer = Trainer(configuration(), CORPUS, world)
        if world.rank == 1:
            trainer.replica.units[0].shard.values[0] += 1
        with pytest.raises(RuntimeError, match="hold different weights after 0 steps") as caught:
            trainer.weights_sha256()
        return str(caught.value)

    messages = run_ranks(2, rank)
    assert "rank 0 and ranks [1]" in messages[0]
    assert "rank 1 and ranks [0]" in messages[1]


def test_the_formulas_are_the_published_ones() -> None:
    reduce = {stage: step_calls(stage, False, 4, True, 1) for stage in range(4)}
    counts = {stage: {call.collective: call.times for call in calls} for stage, calls in reduce.items()}
    assert counts == {
        0: {"all_reduce": 1},
        1: {"all_gather": 1, "reduce_scatter": 1},
        2: {"all_gather": 1, "reduce_scatter": 4},
        3: {"all_gather": 8, "reduce_scatter": 4},
    }
    assert [call.times for call in step_calls(3, False, 4, False, 1)] == [4, 4]
    assert [call.what for call in step_calls(3, False, 1, True, 2)] == ["whole", "whole", "part"]
    states = [sum(astuple(model_state(stage, 4, 1000, 4, 4))) / 1000 for stage in range(4)]
    assert states == [16, 8 + 8 / 4, 4 + 12 / 4, 16 / 4]
    mixed = [sum(astuple(model_state(stage, 4, 1000, 2, 4))) / 1000 for stage in range(4)]
    assert mixed == [16, 4 + 12 / 4, 2 + 14 / 4, 16 / 4]


def uneven_ring_bytes(elements: int, itemsize: int, ranks: int, rank: int) -> int:
    """Each half of the ring sends every chunk but one: the rank's own, and its successor's."""
    kept = len(share(elements, ranks, rank)) + len(share(elements, ranks, (rank + 1) % ranks))
    return (2 * elements - kept) * itemsize


@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("elements", [1 << 17, 100_003])
def test_all_ranks_send_two_p_minus_one_buffers(ranks: int, elements: int) -> None:
    def rank(world: Communicator) -> int:
        world.all_reduce(np.ones(elements, np.float32))
        return world.stats.bytes_sent

    sent = run_ranks(ranks, rank)
    assert sum(sent) == 2 * (ranks - 1) * elements * 4
    if elements % ranks == 0:
        assert set(sent) == {ring_bytes("all_reduce", elements * 4, ranks)}


@pytest.mark.parametrize("ranks", [1, 2, 3, 5])
@pytest.mark.parametrize("elements", [0, 1, 2, 7, 30])
def test_measured_bytes_equal_the_formula_for_any_count(ranks: int, elements: int) -> None:
    def rank(world: Communicator) -> int:
        world.all_reduce(np.ones(elements, np.float32))
        return world.stats.bytes_sent

    ring = run_ranks(ranks, rank, algorithms={"all_reduce": "ring"})
    assert ring == [uneven_ring_bytes(elements, 4, ranks, number) for number in range(ranks)]
    assert sum(ring) == 2 * (ranks - 1) * elements * 4


def test_shares_are_runs_whose_lengths_differ_by_at_most_one() -> None:
    for count in range(12):
        for parts in range(1, 6):
            runs = [share(count, parts, index) for index in range(parts)]
            assert [number for run in runs for number in run] == list(range(count))
            assert max(map(len, runs)) - min(map(len, runs)) <= 1


def test_generation_repeats_and_continues_the_prompt() -> None:
    def rank(world: Communicator) -> tuple[bytes, bytes]:
        trainer = Trainer(configuration(), CORPUS, world)
        weights = dict(trainer.parameters())
        return generate(weights, trainer.configuration, 20, b"ab"), generate(weights, trainer.configuration, 20, b"ab")

    ((once, twice),) = run_ranks(1, rank)
    assert once == twice
    assert once.startswith(b"ab")
    assert len(once) == 22


@pytest.mark.parametrize(
    ("change", "ranks", "message"),
    [
        ({"batch": 3}, 4, "more ranks than data: a global --batch of 3 .* 4 ranks"),
        ({"micro_batches": 3}, 2, "--micro-batches is 3, but a rank has only 2 sequences"),
        ({"heads": 3}, 1, "--heads must divide --hidden, but 16 is no multiple of 3"),
        ({"steps": 0}, 1, "--steps must be at least 1, got 0"),
        ({"lr": float("nan")}, 1, "--lr must be a finite number of at least 0, got nan"),
        ({"dtype": "int8"}, 1, "--dtype must be float32, float64, bfloat16 or float16, got int8"),
        ({"zero": 4}, 2, "--zero must be 0, 1, 2 or 3, got 4"),
        ({"dropout": 1.0}, 1, "--dropout must be at least 0 and below 1, got 1.0"),
        ({"replicas": 2, "zero": 1}, 3, "--replicas must divide the number of ranks that .*, 3, but is 2"),
        ({"replicas": 2}, 2, "--replicas is for sharded models: give --zero 1, 2 or 3"),
    ],
)
def test_a_training_that_cannot_be_is_refused(change: dict[str, object], ranks: int, message: str) -> None:
    chosen = TrainingConfiguration(**{**vars(configuration("float32", 4, layers=1)), **change})
    with pytest.raises(ConfigurationError, match=message):
        chosen.check(ranks)
