"""The counter-based generator: slices, known values, distribution."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from parallel import random

STREAMS: list[Callable[[int, str, int, int], np.ndarray]] = [
    random.bits,
    random.uniform,
    random.normal,
    lambda *stream: random.integers(*stream, bound=1000),
]


@pytest.mark.parametrize("stream", STREAMS)
@given(st.integers(0, 300), st.integers(0, 300))
def test_any_slice_is_that_of_the_whole(
    stream: Callable[[int, str, int, int], np.ndarray], start: int, length: int
) -> None:
    whole = stream(5, "weights", 0, 600)
    np.testing.assert_array_equal(stream(5, "weights", start, start + length), whole[start : start + length])


def test_far_slices_need_nothing_before_them() -> None:
    far = 10**15 + 3
    np.testing.assert_array_equal(random.bits(0, "a", far, far + 5)[1:], random.bits(0, "a", far + 1, far + 5))


def test_seed_and_name_make_different_streams() -> None:
    words = {tuple(random.bits(seed, name, 0, 2)) for seed in (0, 1) for name in ("a", "b")}
    assert len(words) == 4


def test_values_are_pinned() -> None:
    """Weights of a seed must stay what they are, so that runs can be repeated with later versions."""
    assert [hex(word) for word in random.bits(0, "x", 0, 2)] == ["0xd8d7c72102b33122", "0x8fc1379777030731"]


def test_normal_numbers_are_normal() -> None:
    numbers = random.normal(1, "n", 0, 200_000)
    assert abs(numbers.mean()) < 0.01
    assert abs(numbers.std() - 1) < 0.01
    assert abs((np.abs(numbers) < 1).mean() - 0.6827) < 0.005
    assert np.isfinite(numbers).all()


def test_wrong_requests_are_errors() -> None:
    with pytest.raises(ValueError, match=r"needs 0 <= start <= stop, got \[3, 2\)"):
        random.bits(0, "x", 3, 2)
    with pytest.raises(ValueError, match=r"integers in \[0, 0\)"):
        random.integers(0, "x", 0, 1, bound=0)
