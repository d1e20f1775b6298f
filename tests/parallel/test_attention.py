"""Attention with grouped queries against a loop over repeated heads, and in a ring of ranks against that of one."""

from __future__ import annotations

import os
import subprocess
import sys
import tracemalloc
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from collectives import Communicator
from collectives.testing import run_ranks
from parallel import accounting, checkpoint
from parallel.__main__ import main
from parallel.autograd import (
    Operation,
    SavedBytes,
    Tensor,
    attention,
    check_gradients,
    count_saved_bytes,
    no_gradient,
    vjps,
)
from parallel.configuration import ConfigurationError, TrainingConfiguration
from parallel.data import Corpus
from parallel.formulas import gpt_parameters, ring_attention_bytes, share
from parallel.nn import GPT, CausalSelfAttention, GPTConfiguration
from parallel.request import Options
from parallel.train import Trainer, generate

ROOT = Path(__file__).parents[2]
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
    assert model.blocks[0].attention.packed.weight.shape == (16 + 8 * (groups or 4), 16)
    assert model.parameter_count() == gpt_parameters(2, 16, 7, 11, key_width=4 * (groups or 4))


@pytest.mark.slow
@pytest.mark.parametrize("recompute", [False, True])
def test_a_training_with_groups_holds_what_the_formulas_say_and_learns_what_one_rank_does(recompute: bool) -> None:
    def rank(world: Communicator) -> list[float]:
        trainer = Trainer(replace(TRAINING, recompute=recompute, zero=3 if world.size > 1 else 0), CORPUS, world)
        losses = [trainer.step().loss for _ in range(TRAINING.steps)]
        assert asdict(accounting.memory(trainer)) == asdict(accounting.expected_memory(trainer))
        assert accounting.traffic(trainer) == accounting.expected_traffic(trainer, 0)
        generate(dict(trainer.parameters()), TRAINING, 3)
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


def in_ring(ranks: int, heads: int, groups: int, wrap: Callable[[Communicator], Any] = lambda axis: axis) -> Operation:
    """The attention of whole sequences, each computed by a ring of ranks."""

    def run(packed: np.ndarray, g: np.ndarray | None) -> np.ndarray:
        def rank(axis: Communicator) -> tuple[np.ndarray, np.ndarray]:
            mine = attention.positions(packed.shape[1], ranks, axis.rank)
            leaf = Tensor(packed[:, mine], requires_gradient=g is not None)
            result = vjps.ring_attention(leaf, heads=heads, groups=groups, axis=wrap(axis), sequence=packed.shape[1])
            if g is None:
                return mine, result.data
            result.backward(g[:, mine])
            return mine, leaf.gradient

        whole = None
        for mine, part in run_ranks(ranks, rank):
            whole = np.full((*packed.shape[:2], part.shape[-1]), np.nan, packed.dtype) if whole is None else whole
            whole[:, mine] = part
        return whole

    return Operation(
        "in_ring",
        lambda packed: (run(packed.data, None), (packed.data,)),
        (lambda g, saved: run(saved[0], g),),
    )


def check_ring(ring: Operation, packed: np.ndarray, heads: int, groups: int, tolerance: float = 1e-12) -> None:
    found = []
    for operation in (ring, lambda leaf: vjps.causal_attention(leaf, heads=heads, groups=groups)):
        leaf = Tensor(packed, requires_gradient=True)
        result = operation(leaf)
        result.backward(draw(5, *result.shape).astype(packed.dtype))
        found.append((result.data, leaf.gradient))
    for several, one in zip(*found, strict=True):
        assert several.dtype == one.dtype
        np.testing.assert_allclose(several, one, rtol=tolerance, atol=tolerance * max(1, np.abs(one).max()))


@pytest.mark.slow
@settings(max_examples=40)
@given(st.integers(1, 4), st.integers(1, 300), sizes, st.integers(1, 2), sizes, sizes, st.integers(0, 2**32 - 1))
def test_a_ring_attends_as_one_rank_does(
    ranks: int, sequence: int, sequences: int, groups: int, shared: int, size: int, seed: int
) -> None:
    packed = draw(seed, sequences, sequence, groups * (shared + 2) * size)
    check_ring(in_ring(ranks, groups * shared, groups), packed, groups * shared, groups)


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
@pytest.mark.parametrize("sequence", [1, 3, 7, 8, 130])
def test_a_ring_attends_to_short_and_odd_sequences(ranks: int, sequence: int) -> None:
    packed = 3 * draw(sequence, 2, sequence, 20)
    check_ring(in_ring(ranks, 3, 1), packed, 3, 1)
    check_ring(in_ring(ranks, 3, 1), packed.astype(np.float32), 3, 1, tolerance=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(("ranks", "sequence", "heads", "groups"), [(1, 3, 2, 1), (2, 5, 2, 1), (3, 7, 2, 2)])
def test_gradients_of_a_ring_agree_with_central_differences(ranks: int, sequence: int, heads: int, groups: int) -> None:
    check_gradients(in_ring(ranks, heads, groups), draw(0, 1, sequence, heads + 2 * groups))


class LateAxis:
    """Does with arrays what it may at the worst time: spoils at once what is received into, and reads what is sent at a wait.

    That is the send's, or one for a receive with its tag, which might wait for ever otherwise.
    """

    def __init__(self, axis: Communicator) -> None:
        self.axis, self.rank, self.size = axis, axis.rank, axis.size
        self.unsent: dict[int, list[tuple[np.ndarray, int]]] = {}

    def send(self, x: np.ndarray, peer: int, tag: int, async_op: bool) -> SimpleNamespace:
        self.unsent.setdefault(tag, []).append((x, peer))
        return SimpleNamespace(done=lambda: False, wait=lambda: self.flush(tag))

    def recv(self, x: np.ndarray, peer: int, tag: int, async_op: bool) -> SimpleNamespace:
        x[...] = np.nan

        def wait() -> np.ndarray:
            self.flush(tag)
            return self.axis.recv(x, peer, tag)

        return SimpleNamespace(done=lambda: False, wait=wait)

    def flush(self, tag: int) -> None:
        for x, peer in self.unsent.pop(tag, ()):
            self.axis.send(x, peer, tag)


@pytest.mark.parametrize("ranks", [2, 3, 4, 5])
def test_no_buffer_is_touched_while_a_message_has_it(ranks: int) -> None:
    check_ring(in_ring(ranks, 2, 1, LateAxis), draw(0, 2, 37, 8), 2, 1)


@pytest.mark.slow
@pytest.mark.parametrize("transport", ["shm", "tcp"])
def test_processes_attend_in_a_ring(transport: str) -> None:
    program = str(Path(__file__).parent / "programs" / "ring_attention.py")
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "COLLECTIVES_TRANSPORT": transport,
        "OPENBLAS_NUM_THREADS": "1",
    }
    done = subprocess.run(
        [sys.executable, "-m", "collectives", "run", "-n", "3", program],
        cwd=ROOT, capture_output=True, text=True, timeout=60, check=False, env=environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


def test_the_steps_of_three_ranks_are_those_of_the_table() -> None:
    steps = [[(step.source, step.queries, step.keys) for step in attention.ring_steps(3, rank)] for rank in range(3)]
    assert steps == [
        [(0, (0, 5), (0, 5)), (2, (5,), (2, 3)), (1, (5,), (1, 4))],
        [(1, (1, 4), (1, 4)), (0, (1, 4), (0,)), (2, (4,), (2, 3))],
        [(2, (2, 3), (2, 3)), (1, (2, 3), (1,)), (0, (2, 3), (0,))],
    ]


@pytest.mark.parametrize("ranks", range(1, 10))
def test_every_rank_multiplies_as_many_blocks_and_together_the_triangle(ranks: int) -> None:
    everyone = [attention.ring_steps(ranks, rank) for rank in range(ranks)]
    for rank, steps in enumerate(everyone):
        assert [len(step.products) for step in steps] == [3] + [2] * (ranks - 1)
        assert sum(query == key for step in steps for query, key in step.products) == 2
        assert [step.source for step in steps] == [(rank - distance) % ranks for distance in range(ranks)]
    counted = Counter(product for steps in everyone for step in steps for product in step.products)
    assert counted == {(query, key): 1 for query in range(2 * ranks) for key in range(query + 1)}


@pytest.mark.parametrize(("ranks", "sequence"), [(1, 200), (2, 3), (2, 301), (3, 5), (3, 384), (4, 130)])
def test_the_tiles_of_all_ranks_are_the_causal_triangle(ranks: int, sequence: int) -> None:
    seen, areas = np.zeros((sequence, sequence), int), []
    for rank in range(ranks):
        places, area = attention.positions(sequence, ranks, rank), []
        for step in attention.ring_steps(ranks, rank):
            keys = attention.positions(sequence, ranks, step.source)
            tiles = attention.ring_tiles(step, sequence, ranks)
            for run, those in tiles:
                queries, visible = np.meshgrid(places[run], keys[those], indexing="ij")
                np.add.at(seen, (queries, visible), (visible <= queries) | (not step.causal))
            area.append(sum(len(places[run]) * len(keys[those]) for run, those in tiles))
        areas.append(area)
    np.testing.assert_array_equal(seen, np.tril(np.ones_like(seen)))
    if sequence % (2 * ranks * attention._RUN) == 0:
        assert areas == areas[:1] * ranks


def test_positions_are_two_blocks_of_each_rank() -> None:
    assert [attention.positions(9, 2, rank).tolist() for rank in range(2)] == [[0, 1, 2, 7, 8], [3, 4, 5, 6]]
    assert [attention.positions(2, 2, rank).tolist() for rank in range(2)] == [[0], [1]]
    for ranks in range(1, 6):
        for sequence in range(30):
            shares = [attention.positions(sequence, ranks, rank).tolist() for rank in range(ranks)]
            assert sorted(place for places in shares for place in places) == list(range(sequence))
            assert shares == [sorted(places) for places in shares]


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
@pytest.mark.parametrize("sequence", [5, 24, 49])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_a_ring_sends_what_the_formula_says(ranks: int, sequence: int, dtype: type) -> None:
    heads, groups, size, samples = 4, 2, 3, 2

    def rank(axis: Communicator) -> tuple[int, int]:
        packed = np.ones((samples, len(attention.positions(sequence, ranks, axis.rank)), 8 * size), dtype)
        leaf = Tensor(packed, requires_gradient=True)
        result = vjps.ring_attention(leaf, heads=heads, groups=groups, axis=axis, sequence=sequence)
        forward = axis.stats.bytes_sent
        result.backward(np.ones_like(result.data))
        return forward, axis.stats.bytes_sent - forward

    item, width = np.dtype(dtype).itemsize, groups * size
    sent = run_ranks(ranks, rank)
    assert sent == [ring_attention_bytes(ranks, number, samples, sequence, width, item) for number in range(ranks)]
    held = 2 * samples * sequence * width * item  # all keys and values
    assert np.sum(sent, axis=0).tolist() == [(ranks - 1) * held, 2 * (ranks - 1) * held]
    if sequence % (2 * ranks) == 0:
        assert set(sent) == {((ranks - 1) * held // ranks, 2 * (ranks - 1) * held // ranks)}


def test_a_ring_keeps_a_number_for_each_row_and_no_weights() -> None:
    def rank(axis: Communicator) -> tuple[int, int]:
        leaf = Tensor(draw(0, 2, 20, 8 * 3), requires_gradient=True)
        ledger = SavedBytes()
        with count_saved_bytes(ledger):
            vjps.ring_attention(leaf, heads=4, groups=2, axis=axis, sequence=40)
        return ledger.peak, 2 * 20 * (8 * 3 + 4 * 3 + 4) * 8

    for kept, expected in run_ranks(2, rank):
        assert kept == expected


@pytest.mark.slow
def test_a_ring_has_the_scores_of_a_run_at_a_time() -> None:
    def rank(axis: Communicator) -> int:
        leaf = Tensor(draw(0, 1, 1024, 3 * 4), requires_gradient=True)
        tracemalloc.start()
        vjps.ring_attention(leaf, heads=1, axis=axis, sequence=1024).backward(np.ones((1, 1024, 4)))
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return peak

    assert run_ranks(1, rank)[0] < 1024 * 1024 * 8 / 3


@pytest.mark.parametrize("block", range(6))
def test_nothing_is_multiplied_with_keys_of_later_blocks(block: int) -> None:
    packed, poisoned = draw(0, 1, 12, 3), share(12, 6, block)
    packed[:, poisoned.start : poisoned.stop] = np.nan
    with no_gradient():
        found = in_ring(3, 1, 1)(Tensor(packed)).data
    assert np.isfinite(found[:, : poisoned.start]).all()
    assert np.isnan(found[:, poisoned.stop :]).all()


def test_a_share_of_another_rank_is_refused() -> None:
    def rank(axis: Communicator) -> None:
        message = f"packed has 4 positions, but rank {axis.rank} of 2 holds 5 of a sequence of 10"
        with pytest.raises(ValueError, match=message):
            vjps.ring_attention(Tensor(np.ones((1, 4, 3))), heads=1, axis=axis, sequence=10)
        with pytest.raises(ValueError, match="ring_attention: groups must divide heads, but 4 is no multiple of 3"):
            vjps.ring_attention(Tensor(np.ones((1, 5, 40))), heads=4, groups=3, axis=axis, sequence=10)

    run_ranks(2, rank)
