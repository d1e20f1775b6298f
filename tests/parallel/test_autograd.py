"""Every row of the table against central differences, and the engine's own rules."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from collectives.testing import run_ranks
from parallel.autograd import (
    FEATURES,
    PARTIAL,
    SEQUENCE,
    TABLE,
    GradientError,
    Operation,
    Placement,
    SavedBytes,
    Tensor,
    across,
    check_gradients,
    count_saved_bytes,
    no_gradient,
    recompute,
    vjps,
)
from parallel.axis import Axis

Draw = Callable[..., np.ndarray]

# One case a row, for any number of sequences, positions, heads and elements a head.
CASES: dict[str, Callable[[Draw, int, int, int, int], None]] = {
    "add": lambda draw, b, s, _h, e: check_gradients(vjps.add, draw(b, s, e), draw(s, e)),
    "linear": lambda draw, b, s, h, e: check_gradients(vjps.linear, draw(b, s, e), draw(h, e), draw(h)),
    "project": lambda draw, b, s, h, e: check_gradients(vjps.project, draw(b, s, e), draw(h, e)),
    "embedding": lambda draw, b, s, h, e: check_gradients(
        lambda table: vjps.embedding(table, tokens=tokens(b, s, h)), draw(h, e)
    ),
    "layer_norm": lambda draw, b, s, _h, e: check_gradients(
        vjps.layer_norm, draw(b, s, e + 1), draw(e + 1), draw(e + 1)
    ),
    "gelu": lambda draw, b, s, _h, e: check_gradients(vjps.gelu, 3 * draw(b, s, e), draw(e)),
    "dropout": lambda draw, b, s, _h, e: check_gradients(
        lambda x: vjps.dropout(x, probability=0.4, key=(1, 2), runs=((b * s, 3),), row_stride=e), draw(b, s, e)
    ),
    "causal_attention": lambda draw, b, s, h, e: check_gradients(
        lambda packed: vjps.causal_attention(packed, heads=h), draw(b, s, 3 * h * e)
    ),
    "ring_attention": lambda draw, b, s, h, e: run_ranks(
        1,
        lambda axis: check_gradients(
            lambda packed: vjps.ring_attention(packed, heads=h, axis=axis, sequence=s), draw(b, s, 3 * h * e)
        ),
    ),
    "cross_entropy": lambda draw, b, s, h, _e: check_gradients(
        lambda logits: vjps.cross_entropy(logits, targets=tokens(b, s, h), scale=0.3), draw(b, s, h)
    ),
    "copy_to_ranks": lambda draw, b, s, _h, e: alone(
        lambda axis: check_gradients(lambda x: across.copy_to_ranks(x, axis=axis), draw(b, s, e))
    ),
    "sum_over_ranks": lambda draw, b, s, _h, e: alone(
        lambda axis: check_gradients(lambda x: across.sum_over_ranks(placed(x, PARTIAL), axis=axis), draw(b, s, e))
    ),
    "gather_sequence": lambda draw, b, s, _h, e: alone(
        lambda axis: check_gradients(lambda x: across.gather_sequence(placed(x, SEQUENCE), axis=axis), draw(b, s, e))
    ),
    "scatter_sequence": lambda draw, b, s, _h, e: alone(
        lambda axis: check_gradients(lambda x: across.scatter_sequence(placed(x, PARTIAL), axis=axis), draw(b, s, e))
    ),
    "project_and_sum": lambda draw, b, s, h, e: alone(
        lambda axis: check_gradients(
            lambda x, w: across.project_and_sum(placed(x, FEATURES), placed(w, FEATURES), axis=axis),
            draw(b, s, e),
            draw(h, e),
        )
    ),
    "vocabulary_cross_entropy": lambda draw, b, s, h, _e: alone(
        lambda axis: check_gradients(
            lambda x: across.vocabulary_cross_entropy(
                placed(x, FEATURES), targets=tokens(b, s, h), scale=0.3, axis=axis, cut=axis.cut(h)
            ),
            draw(b, s, h),
        )
    ),
}


def alone(run: Callable[[Axis], None]) -> None:
    """Rows that cross ranks, on one rank; tests/parallel/test_tensor_parallel.py has them on several."""
    run_ranks(1, lambda comm: run(Axis(comm)))


def placed(x: Tensor, placement: Placement) -> Tensor:
    x.placement = placement
    return x


def tokens(sequences: int, positions: int, vocabulary: int) -> np.ndarray:
    return np.arange(sequences * positions).reshape(sequences, positions) * 7 % vocabulary


@pytest.mark.slow
@pytest.mark.parametrize("name", TABLE)
def test_every_row_agrees_with_central_differences(name: str) -> None:
    sizes = st.integers(1, 3)

    @settings(max_examples=12, deadline=None, derandomize=True)
    @given(sizes, sizes, sizes, sizes, st.integers(0, 2**32 - 1))
    def check(sequences: int, positions: int, heads: int, elements: int, seed: int) -> None:
        draw = np.random.default_rng(seed).standard_normal
        CASES[name](lambda *shape: draw(shape), sequences, positions, heads, elements)

    check()


def test_a_table_of_many_rows_is_scattered_to(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vjps, "_ONE_HOT_LIMIT", 2)
    check_gradients(lambda t: vjps.embedding(t, tokens=np.array([[3, 1], [3, 3]])), np.ones((5, 2)))


def gelu(x: Tensor) -> Tensor:
    return vjps.gelu(x, Tensor(np.zeros(x.shape[-1], x.data.dtype)))


def test_gelu_of_a_strided_array_is_that_of_its_copy() -> None:
    x = np.random.default_rng(0).standard_normal((3, 4, 5)).T
    np.testing.assert_array_equal(gelu(Tensor(x)).data, gelu(Tensor(x.copy())).data)
    check_gradients(gelu, x)


def test_the_check_finds_a_wrong_product() -> None:
    doubled = Operation("doubled", lambda x: (x.data * 2, ()), (lambda g, _saved: g * 2.001,))
    with pytest.raises(GradientError, match=r"input 0, element \(0,\): .* central differences"):
        check_gradients(doubled, np.ones(3))


def test_a_result_used_several_times_receives_all_its_gradients() -> None:
    check_gradients(lambda x: vjps.add(vjps.add(gelu(x), x), gelu(vjps.add(x, x))), np.ones((2, 3)))


def test_gradients_are_added_to_an_array_that_is_already_there() -> None:
    x = Tensor(np.ones(3), requires_gradient=True)
    x.gradient = storage = np.full(3, 10.0)
    vjps.add(x, x).backward(np.array([1.0, 2.0, 3.0]))
    assert x.gradient is storage
    np.testing.assert_array_equal(storage, [12, 14, 16])


def test_a_leaf_does_not_share_its_gradient_with_the_caller() -> None:
    x, y = (Tensor(np.ones(2), requires_gradient=True) for _ in range(2))
    weights = np.ones(2)
    vjps.add(x, y).backward(weights)
    x.gradient += 1
    np.testing.assert_array_equal(y.gradient, [1, 1])
    np.testing.assert_array_equal(weights, [1, 1])


def test_no_gradient_records_nothing() -> None:
    x = Tensor(np.ones((1, 2)), requires_gradient=True)
    with no_gradient():
        result = gelu(x)
    assert result.node is None
    with pytest.raises(ValueError, match="without a record"):
        result.backward()


def test_backward_refuses_a_second_use_and_a_missing_gradient() -> None:
    x = Tensor(np.ones((1, 2)), requires_gradient=True)
    inner = gelu(x)
    outer = vjps.add(inner, inner)
    with pytest.raises(ValueError, match="wants a gradient of that shape"):
        outer.backward()
    outer.backward(np.ones((1, 2)))
    with pytest.raises(ValueError, match="used up"):
        outer.backward(np.ones((1, 2)))
    with pytest.raises(ValueError, match="gelu was used up"):
        inner.backward(np.ones((1, 2)))


def test_wrong_operands_are_named() -> None:
    x = Tensor(np.ones((2, 3)))
    with pytest.raises(TypeError, match="gelu takes 2 tensors, got 1"):
        vjps.gelu(x)
    with pytest.raises(ValueError, match=r"add: .*\(2,\).*\(2, 3\)"):
        vjps.add(x, Tensor(np.ones(2)))


def test_a_float32_computation_stays_in_float32() -> None:
    rng = np.random.default_rng(0)
    x = Tensor(rng.standard_normal((2, 3, 12)).astype(np.float32), requires_gradient=True)
    weight = Tensor(np.ones(12, np.float32))
    bias = Tensor(np.zeros(12, np.float32))
    packed = vjps.linear(x, Tensor(np.eye(36, 12, dtype=np.float32)), Tensor(np.zeros(36, np.float32)))
    y = vjps.layer_norm(gelu(vjps.causal_attention(packed, heads=2)), weight, bias)
    assert y.data.dtype == np.float32
    loss = vjps.cross_entropy(y, targets=tokens(2, 3, 12))
    loss.backward()
    assert loss.data.dtype == np.float64
    assert x.gradient.dtype == np.float32


class Listener:
    """A sink that notes what it hears."""

    def __init__(self) -> None:
        self.storage: dict[Tensor, np.ndarray] = {}
        self.heard: list[Tensor] = []

    def place(self, leaf: Tensor) -> np.ndarray:
        self.storage[leaf] = np.full(leaf.shape, np.nan)
        return self.storage[leaf]

    def complete(self, leaf: Tensor) -> None:
        assert np.isfinite(self.storage[leaf]).all()
        self.heard.append(leaf)


def test_a_sink_places_gradients_and_hears_of_each_once_when_it_is_complete() -> None:
    listener = Listener()
    x, y, unused = (Tensor(np.ones(3), requires_gradient=True) for _ in range(3))
    x.sink = y.sink = unused.sink = listener
    vjps.add(vjps.add(x, y), gelu(x)).backward(np.ones(3))
    assert sorted(listener.heard, key=id) == sorted([x, y], key=id)
    assert x.gradient is listener.storage[x]
    assert x.gradient[0] > 1.5


def test_recomputed_gradients_are_those_of_one_pass_and_less_is_kept() -> None:
    rng = np.random.default_rng(0)
    weight, bias = (Tensor(rng.standard_normal(shape), requires_gradient=True) for shape in ((6, 6), (6,)))
    start = rng.standard_normal((4, 6))

    def layer(x: Tensor) -> Tensor:
        return vjps.add(x, vjps.gelu(vjps.project(x, weight), bias))

    found = []
    for again in (False, True):
        x = Tensor(start, requires_gradient=True)
        weight.gradient = bias.gradient = None
        ledger, y = SavedBytes(), x
        with count_saved_bytes(ledger):
            for _ in range(5):
                y = recompute(layer, y) if again else layer(y)
            kept = ledger.now
            y.backward(np.ones((4, 6)))
        assert ledger.now == 0
        found.append((x.gradient, weight.gradient, bias.gradient, kept, ledger.peak))
    for once, twice in zip(found[0][:3], found[1][:3], strict=True):
        np.testing.assert_array_equal(once, twice)
    assert found[0][3] == 2 * found[1][3] == found[0][4]
    assert found[1][4] < found[0][4]
    with pytest.raises(ValueError, match="x requires no gradient"):
        recompute(layer, Tensor(start))
