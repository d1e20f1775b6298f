"""Several ranks train as one does, send what the formula says, and hold the same weights."""

from __future__ import annotations

import numpy as np
import pytest

from collectives import Communicator
from collectives.testing import run_ranks
from parallel.data import Corpus
from parallel.formulas import all_reduce_bytes, data_parallel_memory, share
from parallel.train import ConfigurationError, Trainer, TrainingConfiguration, parse_layout

STEPS = 5
TEXT = np.frombuffer(b"the quick brown fox jumps over the lazy dog; " * 40, np.uint8)
CORPUS = Corpus(TEXT[:1500], TEXT[1500:], 1)


def configuration(dtype: str, batch: int, micro_batches: int = 1) -> TrainingConfiguration:
    return TrainingConfiguration(
        layers=1, hidden=16, heads=2, seq=12, batch=batch, micro_batches=micro_batches, steps=STEPS, lr=3e-3,
        warmup=2, dtype=dtype, validation_batches=2,
    )  # fmt: skip


def train(ranks: int, chosen: TrainingConfiguration) -> list[tuple[list[float], float, np.ndarray, str, int, int]]:
    def rank(world: Communicator) -> tuple[list[float], float, np.ndarray, str, int, int]:
        gradients, metrics = world.dup(), world.dup()
        trainer = Trainer(chosen, CORPUS, gradients, metrics)
        losses = [trainer.step().loss for _ in range(STEPS)]
        loss, sent = trainer.validate(), gradients.stats.bytes_sent
        calls = gradients.stats.calls["all_reduce"]
        return losses, loss, trainer.parameters.values, trainer.weights_sha256(), sent, calls

    return run_ranks(ranks, rank, algorithms={"all_reduce": "ring"})


def ring_bytes(elements: int, itemsize: int, ranks: int, rank: int) -> int:
    """Each half of the ring sends every chunk but one: the rank's own, and its successor's."""
    kept = len(share(elements, ranks, rank)) + len(share(elements, ranks, (rank + 1) % ranks))
    return (2 * elements - kept) * itemsize


@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "tolerance"), [("float64", 1e-12), ("float32", 1e-5)])
@pytest.mark.parametrize(("ranks", "batch", "micro_batches"), [(2, 4, 2), (3, 7, 2), (4, 4, 1), (4, 10, 2)])
def test_ranks_train_as_one_does(ranks: int, batch: int, micro_batches: int, dtype: str, tolerance: float) -> None:
    ((losses, loss, weights, _, sent, _),) = train(1, configuration(dtype, batch))
    assert sent == 0
    assert losses[-1] < losses[0]
    several = train(ranks, configuration(dtype, batch, micro_batches))
    assert len({digest for *_, digest, _, _ in several}) == 1
    for number, (others, other, values, _, sent, calls) in enumerate(several):
        np.testing.assert_allclose(others, losses, rtol=tolerance, atol=tolerance)
        assert other == pytest.approx(loss, rel=tolerance)
        # Adam divides by the root of tiny second moments, which magnifies rounding.
        np.testing.assert_allclose(values, weights, rtol=0, atol=100 * tolerance)
        assert calls == STEPS
        assert sent == STEPS * ring_bytes(weights.size, weights.itemsize, ranks, number)


def test_a_shares_gradients_sum_to_those_of_the_whole_batch() -> None:
    def rank(world: Communicator) -> np.ndarray:
        trainer = Trainer(configuration("float64", 5), CORPUS, world, world)
        windows = CORPUS.batch(0, 0, trainer.replica.samples(5), 12)
        trainer.replica.accumulate(windows, 5 * 12, 1)
        return trainer.parameters.gradients

    (whole,) = run_ranks(1, rank)
    np.testing.assert_allclose(sum(run_ranks(2, rank)), whole, rtol=1e-11, atol=1e-16)


def test_ranks_whose_weights_differ_are_named() -> None:
    def rank(world: Communicator) -> str:
        trainer = Trainer(configuration("float32", 4), CORPUS, world, world)
        if world.rank == 1:
            trainer.parameters.values[0] += 1
        with pytest.raises(RuntimeError, match="hold different weights after 0 steps") as caught:
            trainer.weights_sha256()
        return str(caught.value)

    messages = run_ranks(2, rank)
    assert "rank 0 and ranks [1]" in messages[0]
    assert "rank 1 and ranks [0]" in messages[1]


@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("elements", [1 << 17, 100_003])
def test_all_ranks_send_two_p_minus_one_buffers(ranks: int, elements: int) -> None:
    def rank(world: Communicator) -> int:
        world.all_reduce(np.ones(elements, np.float32))
        return world.stats.bytes_sent

    sent = run_ranks(ranks, rank)
    assert sum(sent) == all_reduce_bytes(elements, 4, ranks)
    if elements % ranks == 0:
        assert set(sent) == {2 * (ranks - 1) * elements * 4 // ranks}


@pytest.mark.parametrize("ranks", [1, 2, 3, 5])
@pytest.mark.parametrize("elements", [0, 1, 2, 7, 30])
def test_measured_bytes_equal_the_formula_for_any_count(ranks: int, elements: int) -> None:
    def rank(world: Communicator) -> int:
        world.all_reduce(np.ones(elements, np.float32))
        return world.stats.bytes_sent

    ring = run_ranks(ranks, rank, algorithms={"all_reduce": "ring"})
    assert ring == [ring_bytes(elements, 4, ranks, number) for number in range(ranks)]
    assert sum(ring) == all_reduce_bytes(elements, 4, ranks)


def test_shares_are_runs_whose_lengths_differ_by_at_most_one() -> None:
    for count in range(12):
        for parts in range(1, 6):
            runs = [share(count, parts, index) for index in range(parts)]
            assert [number for run in runs for number in run] == list(range(count))
            assert max(map(len, runs)) - min(map(len, runs)) <= 1


def test_memory_is_what_the_formula_says() -> None:
    def rank(world: Communicator) -> None:
        trainer = Trainer(configuration("float32", 4), CORPUS, world, world)
        assert trainer.memory() == data_parallel_memory(trainer.parameters.size, 4)

    run_ranks(1, rank)


def test_generation_repeats_and_continues_the_prompt() -> None:
    def rank(world: Communicator) -> tuple[bytes, bytes]:
        trainer = Trainer(configuration("float32", 4), CORPUS, world, world)
        return trainer.generate(20, b"ab"), trainer.generate(20, b"ab")

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
        ({"dtype": "float16"}, 1, "--dtype must be float32 or float64, got float16"),
    ],
)
def test_a_training_that_cannot_be_is_refused(change: dict[str, object], ranks: int, message: str) -> None:
    chosen = TrainingConfiguration(**{**vars(configuration("float32", 4)), **change})
    with pytest.raises(ConfigurationError, match=message):
        chosen.check(ranks)


def test_layouts() -> None:
    assert parse_layout("dp4") == 4
    for text in ("dp0", "dp", "4", "tp2", "dp4 "):
        with pytest.raises(ConfigurationError, match="is not known; expected dp and a number of ranks"):
            parse_layout(text)
