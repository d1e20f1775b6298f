"""Boxes, ranges and conversions: every element in its place, every value rounded once."""

from __future__ import annotations

from fractions import Fraction

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from parallel.checkpoint import CheckpointError, Piece
from parallel.checkpoint.dtypes import convert, fingerprint
from parallel.checkpoint.pieces import Box, Overlaps, Region, uncovered
from parallel.checkpoint.saving import assign

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
SHAPES = st.lists(st.integers(0, 5), max_size=4).map(tuple)


@st.composite
def boxes(draw: st.DrawFn, shape: tuple[int, ...]) -> Box:
    bounds = [sorted((draw(st.integers(0, n)), draw(st.integers(0, n)))) for n in shape]
    return Box(tuple(a for a, _ in bounds), tuple(b - a for a, b in bounds))


def members(box: Box, shape: tuple[int, ...]) -> set[int]:
    numbers = np.arange(np.prod(shape, dtype=int)).reshape(shape)
    return set(numbers[(*box.within(Box((0,) * len(shape), shape)), ...)].ravel().tolist())


@given(st.data())
def test_the_parts_of_a_range_are_its_elements_in_order(data: st.DataObject) -> None:
    shape = data.draw(SHAPES)
    box = data.draw(boxes(shape))
    begin, end = sorted((data.draw(st.integers(0, box.size)), data.draw(st.integers(0, box.size))))
    numbers = np.arange(np.prod(shape, dtype=int)).reshape(shape)
    values = numbers[(*box.within(Box((0,) * len(shape), shape)), ...)].ravel()[begin:end]
    parts = Region("x", shape, "int64", box.start, box.extent, begin, end - begin).parts()
    assert len(parts) <= max(1, 2 * len(shape) - 1)
    assert sum(part.box.size for part in parts) == end - begin
    assert [part.offset for part in parts] == [sum(p.box.size for p in parts[:n]) for n in range(len(parts))]
    for part in parts:
        np.testing.assert_array_equal(
            part.view(values, part.box), numbers[(*part.box.within(Box((0,) * len(shape), shape)), ...)]
        )


@given(st.data())
def test_boxes_without_others_are_differences_of_sets(data: st.DataObject) -> None:
    shape = data.draw(SHAPES)
    wanted = data.draw(boxes(shape))
    others = data.draw(st.lists(boxes(shape), max_size=4))
    left = uncovered(wanted, others)
    expected = members(wanted, shape).difference(*(members(box, shape) for box in others))
    assert sum(box.size for box in left) == len(expected)
    assert set().union(*(members(box, shape) for box in left)) == expected
    overlapping = [n for n, box in enumerate(others) if members(box, shape) & members(wanted, shape)]
    assert Overlaps(others, len(shape)).of(wanted) == overlapping
    assert [n for n, box in enumerate(others) if wanted.intersection(box)] == overlapping


@pytest.mark.parametrize(
    ("piece", "message"),
    [
        (Piece("", (2,), (0,), (2,), 0, np.zeros(2)), "a piece is named ''"),
        (Piece("__metadata__", (2,), (0,), (2,), 0, np.zeros(2)), "a piece is named '__metadata__'"),
        (Piece("x", (2, 2), (0,), (2,), 0, np.zeros(2)), r"x: start \(0,\) and extent \(2,\) are no box of .*\(2, 2\)"),
        (Piece("x", (2,), (1,), (2,), 0, np.zeros(2)), r"x: start \(1,\) and extent \(2,\) are no box"),
        (Piece("x", (2,), (-1,), (2,), 0, np.zeros(2)), "are no box"),
        (Piece("x", (4,), (0,), (4,), 3, np.zeros(2)), "x: elements 3 to 5 are no range of the 4 of its box"),
        (Piece("x", (4,), (0,), (4,), -1, np.zeros(2)), "elements -1 to 1 are no range"),
        (Piece("x", (2,), (0,), (2,), 0, np.zeros((1, 2))), "x: the values have no single axis"),
        (
            Piece("x", (2,), (0,), (2,), 0, np.zeros(2, complex)),
            "x has dtype complex128; a checkpoint stores bool, int8",
        ),
    ],
)
def test_what_cannot_be_a_piece_is_refused(piece: Piece, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        piece.region()


def test_a_whole_tensor_is_shared_and_must_be_contiguous() -> None:
    tensor = np.zeros((2, 3))
    Piece.whole("x", tensor).values[4] = 1
    assert tensor[1, 1] == 1
    with pytest.raises(ValueError, match="x is not C-contiguous"):
        Piece.whole("x", tensor.T)


def nearest(value: float, dtype: np.dtype) -> float:
    """The one of the dtype's values around `value` that is nearest to it, of two the one with an even last bit."""
    around = np.array([value], np.float64).astype(dtype)
    bits = int(around.view(np.uint16)[0])
    candidates = [b for b in (bits - 1, bits, bits + 1) if 0 <= b < 1 << 16]
    values = np.array(candidates, np.uint16).view(dtype).astype(np.float64)
    finite = [
        (abs(Fraction(v) - Fraction(value)), b & 1, v)
        for b, v in zip(candidates, values, strict=True)
        if np.isfinite(v)
    ]
    return float(min(finite)[2])


@pytest.mark.parametrize("dtype", [BFLOAT16, np.dtype(np.float16)])
@given(st.floats(-60000, 60000), st.sampled_from([0, 2**-8, 2**-9, 2**-11, 2**-12]), st.integers(-3, 3))
def test_float64_is_rounded_once(dtype: np.dtype, base: float, tie: float, ulps: int) -> None:
    value = float(np.float64(np.array(base).astype(dtype)) * (1 + tie))
    value += ulps * float(np.spacing(value))
    assert convert(np.array([value]), dtype, "x").astype(np.float64)[0] == nearest(value, dtype)


def test_rounding_through_float32_would_round_twice() -> None:
    value = np.array([1 + 2**-8 + 2**-40, -(1 + 2**-8 + 2**-40)])
    assert convert(value, BFLOAT16, "x").astype(float).tolist() == [1 + 2**-7, -(1 + 2**-7)]


def test_special_floats_stay_what_they_are() -> None:
    values = np.array([np.nan, np.inf, -np.inf, -0.0, 1e300, -1e300, 1e-300, -1e-300])
    for dtype in (BFLOAT16, np.dtype(np.float16), np.dtype(np.float32)):
        got = convert(values, dtype, "x").astype(np.float64)
        np.testing.assert_array_equal(got, [np.nan, np.inf, -np.inf, 0, np.inf, -np.inf, 0, 0])
        assert np.signbit(got[1:]).tolist() == [False, True, True, False, True, False, True]


def test_integers_become_others_that_hold_them() -> None:
    assert convert(np.array([-3, 200]), np.dtype(np.int16), "x").tolist() == [-3, 200]
    with pytest.raises(
        CheckpointError, match="x is stored as int64 with values from -3 to 200, which do not fit uint8"
    ):
        convert(np.array([-3, 200]), np.dtype(np.uint8), "x")
    for target in (np.float32, bool):
        with pytest.raises(CheckpointError, match=f"x is stored as int64 and wanted as {np.dtype(target)}"):
            convert(np.array([1]), np.dtype(target), "x")


@given(st.binary(max_size=40), st.data())
def test_a_fingerprint_shows_a_changed_byte(text: bytes, data: st.DataObject) -> None:
    values = np.frombuffer(text, np.uint8).copy()
    before = fingerprint(values)
    assert fingerprint(values[::-1][::-1]) == before
    if values.size:
        values[data.draw(st.integers(0, values.size - 1))] ^= data.draw(st.integers(1, 255))
        assert fingerprint(values) != before


@given(st.integers(1, 6), st.data())
def test_replicas_are_shared_out_evenly(ranks: int, data: st.DataObject) -> None:
    sizes = data.draw(st.lists(st.integers(0, 30), max_size=30))
    everywhere = [Region(str(n), (size,), "int8", (0,), (size,), 0, size) for n, size in enumerate(sizes)]
    writers = assign({region: range(ranks) for region in everywhere}, ranks)
    assert list(writers) == everywhere
    load = [sum(r.nbytes for r in everywhere if writers[r] == rank) for rank in range(ranks)]
    assert max(load) - min(load) <= max(sizes, default=0)
    alone = Region("alone", (100,), "int8", (0,), (100,), 0, 100)
    writers = assign({**{region: range(ranks) for region in everywhere}, alone: [ranks - 1]}, ranks)
    assert writers[alone] == ranks - 1
