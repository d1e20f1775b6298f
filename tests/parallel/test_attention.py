"""Attention with grouped queries against a loop over repeated heads."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from collectives import Communicator
from collectives.testing import run_ranks
from parallel import accounting, checkpoint
from parallel.__main__ import main
from parallel.autograd import Tensor, attention, check_gradients, vjps
from parallel.data import Corpus
from parallel.formulas import gpt_parameters
from parallel.job import Options
from parallel.nn import GPT, CausalSelfAttention, GPTConfiguration
from parallel.train import ConfigurationError, Trainer, TrainingConfiguration, generate

TEXT = np.frombuffer(b"the quick brown fox jumps over the lazy dog; " * 40, np.uint8)
CORPUS = Corpus(TEXT[:1500], TEXT[1500:], 1)
TRAINING = TrainingConfiguration(
    layers=2, hidden=16, heads=4, kv_heads=2, seq=12, batch=6, steps=2, dtype="float64", validation_batches=1
)


def draw(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape)


def repeated(packed: np.ndarray, heads: int, groups: int) -> np.ndarray:
    """Attention head by head, each with its own copy of its group's keys and values."""
    sequences, positions, width = packed.shape
    rows = packed.reshape(sequences, positions, heads + 2 * groups, width // (heads + 2 * groups))
    shared = heads // groups
    hidden = np.triu(np.full((positions, positions), -np.inf), 1)
    results = []
    for head in range(heads):
        start = head // shared * (shared + 2)
        q, k, v = (rows[:, :, start + row] for row in (head % shared, shared, shared + 1))
        scores = np.einsum("bqe,bke->bqk", q, k) / np.sqrt(q.shape[-1]) + hidden
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        results.append(np.einsum("bqk,bke->bqe", weights / weights.sum(-1, keepdims=True), v))
    return np.concatenate(results, -1)


sizes = st.integers(1, 3)


@settings(max_examples=60)
@given(sizes, st.integers(1, 150), sizes, sizes, sizes, st.integers(0, 2**32 - 1))
def test_groups_share_keys_and_values(
    sequences: int, positions: int, groups: int, shared: int, size: int, seed: int
) -> None:
    heads = groups * shared
    packed = draw(seed, sequences, positions, (heads + 2 * groups) * size)
    found = vjps.causal_attention(Tensor(packed), heads=heads, groups=groups).data
    np.testing.assert_allclose(found, repeated(packed, heads, groups), rtol=1e-12, atol=1e-13)
    if shared == 1:
        np.testing.assert_array_equal(found, vjps.causal_attention(Tensor(packed), heads=heads).data)


@pytest.mark.slow
@settings(max_examples=10)
@given(st.integers(1, 2), st.integers(1, 4), st.integers(1, 2), sizes, st.integers(1, 2), st.integers(0, 2**32 - 1))
def test_gradients_of_groups_agree_with_central_differences(
    sequences: int, positions: int, groups: int, shared: int, size: int, seed: int
) -> None:
    packed = draw(seed, sequences, positions, groups * (shared + 2) * size)
    check_gradients(lambda x: vjps.causal_attention(x, heads=groups * shared, groups=groups), packed)


@pytest.mark.parametrize("run", [1, 2, 3, 64])
@pytest.mark.parametrize(("heads", "groups"), [(2, 2), (2, 1)])
def test_attention_in_runs_of_positions_is_attention(
    heads: int, groups: int, run: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    packed = draw(1, 2, 5, (heads + 2 * groups) * 2)
    whole = vjps.causal_attention(Tensor(packed), heads=heads, groups=groups).data
    monkeypatch.setattr(attention, "_RUN", run)
    in_runs = vjps.causal_attention(Tensor(packed), heads=heads, groups=groups).data
    np.testing.assert_allclose(in_runs, whole, rtol=1e-13)
    check_gradients(lambda x: vjps.causal_attention(x, heads=heads, groups=groups), packed)


@pytest.mark.parametrize("groups", [1, 2, 4, None])
def test_a_model_with_groups_has_the_parameters_that_the_formula_says(groups: int | None) -> None:
    model = GPT(GPTConfiguration(2, 16, 4, 7, 11, groups=groups))
    assert model.blocks[0].attention.packed.weight.full_shape == (16 + 8 * (groups or 4), 16)
    assert model.parameter_count() == gpt_parameters(2, 16, 7, 11, key_width=4 * (groups or 4))


@pytest.mark.slow
@pytest.mark.parametrize("recompute", [False, True])
def test_a_training_with_groups_holds_what_the_formulas_say_and_learns_what_one_rank_does(recompute: bool) -> None:
    def rank(world: Communicator) -> list[float]:
        trainer = Trainer(replace(TRAINING, recompute=recompute, zero=3 if world.size > 1 else 0), CORPUS, world)
        losses = [trainer.step().loss for _ in range(TRAINING.steps)]
        assert asdict(accounting.memory(trainer)) == asdict(accounting.expected_memory(trainer))
        assert accounting.traffic(trainer) == accounting.expected_traffic(trainer, 0)
        generate(dict(trainer.replica.parameters()), TRAINING, 3)
        return losses

    ((one,), several) = run_ranks(1, rank), run_ranks(2, rank)
    np.testing.assert_allclose(several[0], one, rtol=1e-12)


def test_a_checkpoint_is_restored_with_as_many_groups_only(tmp_path: Path) -> None:
    def rank(world: Communicator) -> None:
        trainer = Trainer(TRAINING, CORPUS, world)
        trainer.step()
        with checkpoint.Saver(str(tmp_path), world) as saver:
            saver.start(trainer.pieces(), trainer.metadata(), trainer.steps)
        Trainer(TRAINING, CORPUS, world).restore(str(tmp_path))
        for groups, number in ((None, 4), (1, 1)):
            other = Trainer(replace(TRAINING, kv_heads=groups), CORPUS, world)
            message = f"--kv-heads is {number}, but the checkpoint in .* was written with 2"
            with pytest.raises(checkpoint.CheckpointError, match=message):
                other.restore(str(tmp_path))

    run_ranks(1, rank)


def test_the_flag_for_groups_reaches_the_training(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Options] = []
    monkeypatch.setattr("parallel.__main__.prepare", seen.append)
    monkeypatch.setattr("collectives.launch", lambda *_, **__: 0)
    assert main(["train", "--data", "stdlib", "--kv-heads", "2"]) == 0
    assert main(["train", "--data", "stdlib"]) == 0
    assert [options.training.kv_heads for options in seen] == [2, None]


def test_groups_that_cannot_be_are_refused() -> None:
    message = "groups must divide heads, but 4 is no multiple of 3"
    with pytest.raises(ValueError, match=f"causal_attention: {message}"):
        vjps.causal_attention(Tensor(np.ones((1, 2, 40))), heads=4, groups=3)
    with pytest.raises(ValueError, match=f"attention: {message}"):
        CausalSelfAttention(16, 4, 0.1, 3)
    with pytest.raises(ValueError, match=message):
        GPTConfiguration(1, 16, 4, 7, groups=3)
    for kv_heads in (0, 3):
        expected = f"--kv-heads must divide --heads, but 4 is no multiple of {kv_heads}"
        with pytest.raises(ConfigurationError, match=expected):
            replace(TRAINING, kv_heads=kv_heads).check(1)
    with pytest.raises(ValueError, match="groups must be at least 1, got 0"):
        GPTConfiguration(1, 16, 4, 7, groups=0)
    with pytest.raises(
        ValueError, match=r"\(1, 2, 42\), expected a last axis of a multiple of 8: 4 queries, 2 keys and 2"
    ):
        vjps.causal_attention(Tensor(np.ones((1, 2, 42))), heads=4, groups=2)
