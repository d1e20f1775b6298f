"""AdamW by hand, the schedule's corners, clipping."""

from __future__ import annotations

import math

import numpy as np
import pytest

from parallel.optim import AdamW, clip_scale, gradient_norm, learning_rate


@pytest.mark.parametrize("block", [1 << 15, 3])
def test_adamw_is_the_papers_formula(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("parallel.optim._BLOCK", block)
    rng = np.random.default_rng(0)
    values, gradients, decayed = rng.standard_normal(10), np.empty(10), 7
    optimizer = AdamW(values, gradients, decayed, betas=(0.8, 0.9), epsilon=1e-3, weight_decay=0.2)
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


def test_the_norm_is_that_of_the_whole_buffer() -> None:
    gradients = np.random.default_rng(0).standard_normal(70_001).astype(np.float32)
    assert gradient_norm(gradients) == pytest.approx(float(np.linalg.norm(gradients.astype(np.float64))), rel=1e-6)


def test_clipping_brings_the_norm_to_its_limit_and_no_further() -> None:
    assert clip_scale(4.0, 1.0) == 0.25
    assert clip_scale(0.5, 1.0) == 1.0
    assert clip_scale(4.0, 0.0) == 1.0
