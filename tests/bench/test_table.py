"""The arithmetic of the columns."""

import pytest

from bench.harness.case import COPY, cases
from bench.harness.table import HEADER, Measured, line, rows, summary


def measured(*iterations, wrong=0):
    """From the seconds of two ranks in each iteration."""
    return Measured(list(zip(*iterations, strict=True)), wrong)


def test_time_is_the_median_of_the_slowest_rank():
    assert measured((1.0, 5.0), (4.0, 2.0), (3.0, 9.0)).time == 5.0


def table():
    results = {
        "tcp": measured((0.004, 0.003), wrong=2),
        "openmpi": measured((0.001, 0.002)),
        "gloo": measured((0.008, 0.008)),
    }
    return rows(cases()["all_reduce"], 4, 1 << 20, 1 << 18, results, measured((0.001, 0.001)))


def test_columns():
    ours, openmpi, gloo = table()
    assert (ours.size, ours.count, ours.redop, ours.root, ours.wrong) == (1 << 20, 1 << 18, "sum", -1, 2)
    assert ours.microseconds == pytest.approx(4000)
    assert ours.algbw == pytest.approx((1 << 20) / 0.004 / 1e9)
    assert ours.busbw == pytest.approx(ours.algbw * 2 * 3 / 4)
    assert ours.ratio == pytest.approx(0.002 / 0.004)
    assert openmpi.ratio is gloo.ratio is None
    assert [row.floor for row in (ours, openmpi, gloo)] == pytest.approx([1 / 4, 1 / 2, 1 / 8])


@pytest.mark.parametrize(
    ("name", "moved"),
    [
        ("all_reduce", 8), ("all_gather", 5), ("reduce_scatter", 5), ("broadcast", 4), ("reduce", 5), ("gather", 2),
        ("scatter", 2), ("all_to_all", 8), ("scan", 7), ("send_recv", 8),
    ],
)  # fmt: skip
def test_floor_counts_bytes_read_and_written(name, moved):
    (row,) = rows(cases()[name], 4, 64, 16, {"tcp": measured((1.0, 1.0))}, measured((1.0, 1.0)))
    assert row.floor == pytest.approx(moved / COPY.moved(4))
    assert row.ratio is None


def test_a_barrier_has_no_bandwidth_and_no_floor():
    (row,) = rows(cases()["barrier"], 2, 8, 0, {"tcp": measured((1e-6, 2e-6))}, None)
    assert (row.size, row.algbw, row.busbw, row.floor) == (0, 0.0, 0.0, None)


def test_lines_stand_under_their_headings():
    heading, text = HEADER.splitlines()[0], line(table()[0])
    assert len(text) == len(heading)
    for column in ("size", "with", "time", "#wrong", "ratio", "floor"):
        end = heading.index(column) + len(column)
        assert text[end - 1] != " ", column
        assert text[end : end + 1] in ("", " "), column


def test_summary_has_a_line_for_each_of_ours():
    assert summary(table()).splitlines() == [
        "| ranks | collective | with | 1M |",
        "|---|---|---|---|",
        "| 4 | all_reduce | tcp | 0.50 |",
    ]
    assert summary([]) == ""
