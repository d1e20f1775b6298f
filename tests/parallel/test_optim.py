"""AdamW by hand, the schedule's corners, clipping."""

from __future__ import annotations

import math

import numpy as np
import pytest

from parallel.nn import Parameter
from parallel.optim import AdamW, LossScale, clip_scale, learning_rate
from parallel.units import Layout, Shard


def shard(values: np.ndarray, decayed: int, parts: int = 1, index: int = 0) -> Shard:
    """Part `index` of a unit of so many elements, of which the first `decayed` decay."""
    parameters = [Parameter((decayed,), decay=True), Parameter((values.size * parts - decayed,))]
    layout = Layout("unit", parameters, parts)
    part = slice(index * values.size, (index + 1) * values.size)
    moments = np.zeros_like(values), np.zeros_like(values)
    return Shard(layout, part, values, np.empty_like(values), None, *moments)


def test_adamw_is_the_papers_formula() -> None:
    rng = np.random.default_rng(0)
    values, decayed = rng.standard_normal(10), 7
    unit = shard(values, decayed)
    gradients = unit.gradient
    optimizer = AdamW([unit], betas=(0.8, 0.9), epsilon=1e-3, weight_decay=0.2)
    expected = [float(v) for v in values]
    first, second = [0.0] * 10, [0.0] * 10
    for step in range(1, 5):
        gradients[:] = rng.standard_normal(10)
        rate, scale = 0.1 / step, 0.5
        for i in range(10):
            g = scale * float(gradients[i])
            first[i] = 0.8 * first[i] + 0.2 * g
            second[i] = 0.9 * second[i] + 0.1 * g * g
            if i < decayed:
                expected[i] -= rate * 0.2 * expected[i]
            expected[i] -= rate * (first[i] / (1 - 0.8**step)) / (math.sqrt(second[i] / (1 - 0.9**step)) + 1e-3)
        optimizer.step(rate, scale)
        np.testing.assert_allclose(values, expected, rtol=1e-13)
    assert optimizer.steps == 4


def test_the_rate_rises_linearly_and_falls_as_a_cosine() -> None:
    rates = [learning_rate(step, 2.0, 4, 25) for step in range(25)]
    assert rates[:4] == [0.5, 1.0, 1.5, 2.0]
    assert rates[4] == 2.0
    assert rates[14] == pytest.approx(2.0 * 0.55)
    assert rates[24] == pytest.approx(0.2)
    assert rates[4:] == sorted(rates[4:], reverse=True)
    assert learning_rate(0, 1.0, 0, 1) == 1.0


@pytest.mark.parametrize(("index", "decayed"), [(0, 10), (1, 7), (2, 0)])
def test_a_shard_decays_where_its_parameters_do(index: int, decayed: int) -> None:
    unit = shard(np.ones(10), 17, parts=3, index=index)
    unit.gradient.fill(0)
    AdamW([unit], weight_decay=0.5).step(0.1)
    np.testing.assert_allclose(unit.values, [0.95] * decayed + [1.0] * (10 - decayed))


def test_the_loss_scale_falls_on_overflow_and_rises_with_patience() -> None:
    scale = LossScale(1024.0, patience=3)
    assert [scale.update(finite) for finite in (True, False, True, True)] == [True, False, True, True]
    assert scale.value == 512
    assert scale.update(True)
    assert scale.value == 1024
    none = LossScale()
    assert none.update(False)
    assert none.value == 1


def test_clipping_brings_the_norm_to_its_limit_and_no_further() -> None:
    assert clip_scale(4.0, 1.0) == 0.25
    assert clip_scale(0.5, 1.0) == 1.0
    assert clip_scale(4.0, 0.0) == 1.0
