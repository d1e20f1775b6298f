"""Every case's data and calls, on ranks that are threads."""

import ast
from pathlib import Path

import numpy as np
import pytest

from bench.harness.case import cases, total, values
from collectives.testing import run_ranks

NAMES = {
    "all_gather", "all_reduce", "all_to_all", "barrier", "broadcast", "gather", "reduce", "reduce_scatter", "scan", "scatter",
    "send_recv",
}  # fmt: skip


def test_every_collective_has_a_case():
    assert set(cases()) == NAMES


@pytest.mark.parametrize("name", sorted(NAMES))
def test_files_are_short_and_say_what_their_size_is(name):
    path = Path(__file__).parents[2] / "bench" / f"{name}.py"
    assert len(path.read_text().splitlines()) < 45
    assert name == "barrier" or "S is the size" in ast.get_docstring(ast.parse(path.read_text())) or name == "send_recv"


@pytest.mark.parametrize("name", sorted(NAMES))
@pytest.mark.parametrize("size", [2, 3])
def test_our_call_gives_what_is_expected(name, size):
    case = cases()[name]
    count = case.count(4036, size)

    def rank(comm):
        given, expected = case.data(comm.rank, comm.size, count)
        x = given.copy()
        out = x if case.in_place else np.full_like(expected, -1)
        case.ours(comm, x, out)
        return np.array_equal(out[: len(expected)], expected)

    assert all(run_ranks(size, rank))


def test_counts():
    assert cases()["all_reduce"].count(8, 4) == 2
    assert cases()["all_gather"].count(8, 4) == 4
    assert cases()["all_gather"].count(4036, 3) == 1008
    assert cases()["barrier"].count(8, 4) == 0


def test_values():
    assert np.array_equal(total(3, 100), values(0, 100) + values(1, 100) + values(2, 100))
    assert not np.array_equal(values(0, 100), values(1, 100))
