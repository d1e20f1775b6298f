"""Pipeline schedules: proved for every size, timed against the published formulas, faults caught, tables and pictures."""

import sys
from collections import Counter
from dataclasses import replace
from fractions import Fraction
from graphlib import CycleError, TopologicalSorter
from inspect import getfile
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from parallel.__main__ import main
from parallel.schedules import (
    SCHEDULES,
    Action,
    Kind,
    Schedule,
    ScheduleError,
    build,
    expected_idle,
    expected_in_flight,
    most_in_flight,
    times,
    verify,
)
from parallel.schedules.actions import backward, forward, input_gradient, weight_gradient
from parallel.schedules.drawing import draw
from parallel.schedules.registry import schedule as register
from parallel.schedules.table import round_robin

NAMES = list(SCHEDULES)


def chunk_counts(name):
    return range(1, 5) if SCHEDULES[name].any_chunks else [SCHEDULES[name].chunks]


def sizes(name, ranks, largest):
    return range(ranks, largest + 1, ranks) if name == "interleaved" else range(1, largest + 1)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_every_schedule_is_proved_and_idles_and_holds_what_is_published(name):
    """For 1–16 ranks and 1–64 micro-batches, at unit costs of a chunk."""
    for ranks in range(1, 17):
        for chunks in chunk_counts(name):
            for micro_batches in sizes(name, ranks, 64):
                schedule = build(name, ranks, micro_batches, chunks)
                verify(schedule)
                plan = times(schedule, chunks, chunks, chunks)
                idle = expected_idle(name, ranks, chunks, chunks, chunks, chunks, micro_batches)
                case = (name, ranks, chunks, micro_batches)
                for rank in range(ranks):
                    assert plan.idle(rank) == idle, case
                    assert most_in_flight(schedule, rank) == expected_in_flight(
                        name, ranks, rank, micro_batches, chunks
                    ), case


COSTS = [
    (1, 1, 1),
    (1, 2, 1),
    (5, 7, 3),
    (9, 2, 1),
    (1, 9, 0),
    (Fraction(2, 3), Fraction(5, 7), Fraction(1, 2)),
    (1, 4, 1),
]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("costs", COSTS, ids=str)
def test_idle_time_at_other_costs(name, costs):
    if name == "zb-v":
        costs = (costs[1],) * 3
    for ranks in (1, 2, 3, 4, 8):
        for chunks in chunk_counts(name):
            for micro_batches in sizes(name, ranks, 2 * ranks + 1):
                plan = times(build(name, ranks, micro_batches, chunks), *costs)
                expected = expected_idle(name, ranks, chunks, *costs, micro_batches)
                assert {plan.idle(rank) for rank in range(ranks)} == {expected}
                assert {plan.work(rank) for rank in range(ranks)} == {micro_batches * sum(costs)}
                if name != "zb-v":
                    assert plan.total == plan.period == micro_batches * sum(costs) + expected


@pytest.mark.parametrize("ranks", [1, 2, 4, 7])
def test_the_published_formulas_as_integers(ranks):
    """Those of the papers, written out once more, with enough micro-batches."""
    f, b_i, w = 3, 5, 2
    steps = ranks - 1
    assert expected_idle("gpipe", ranks, 1, f, b_i, w) == expected_idle("1f1b", ranks, 1, f, b_i, w) == steps * 10
    assert expected_idle("interleaved", ranks, 4, f, b_i, w) == Fraction(steps * 10, 4)
    assert expected_idle("zb-h1", ranks, 1, f, b_i, w) == steps * (f + b_i - w)
    assert expected_idle("zb-v", ranks, 2, 6, 6, 6) == 0
    assert [expected_in_flight("1f1b", ranks, r, 64, 1) for r in range(ranks)] == [ranks - r for r in range(ranks)]


def test_zero_bubble_holds_from_so_many_micro_batches_on():
    for ranks in (2, 3, 4, 8):
        idle = {m: times(build("zb-h1", ranks, m), 3, 5, 2).idle(0) for m in range(1, 3 * ranks)}
        assert {m for m in idle if idle[m] == (ranks - 1) * (3 + 5 - 2)} == set(range(ranks, 3 * ranks))
        idle = {m: times(build("zb-v", ranks, m)).idle(0) for m in range(1, 3 * ranks)}
        assert {m for m in idle if idle[m] == 0} == set(range(2 * ranks - 1, 3 * ranks))


def test_the_ranks_of_zb_v_begin_and_end_staggered():
    plan = times(build("zb-v", 4, 8))
    assert (plan.period, plan.total) == (24, 24 + Fraction(3, 2))
    assert [(row[0][0], row[-1][1]) for row in plan.rows] == [(Fraction(r, 2), 24 + Fraction(r, 2)) for r in range(4)]


def test_sends_take_time_between_ranks_only():
    plan = times(build("zb-v", 2, 1), send=10)
    begins = {
        (rank, action.kind, action.chunk): begin
        for rank, (row, spans) in enumerate(zip(build("zb-v", 2, 1).rows, plan.rows, strict=True))
        for action, (begin, _) in zip(row, spans, strict=True)
    }
    half = Fraction(1, 2)
    assert begins[1, Kind.FORWARD, 0] == half + 10
    assert begins[1, Kind.FORWARD, 1] == 2 * half + 10  # stages 1 and 2 are on one rank
    assert begins[0, Kind.FORWARD, 1] == 3 * half + 20
    assert begins[1, Kind.INPUT_GRADIENT, 1] == 5 * half + 30


def test_times_refuse_a_negative_cost():
    with pytest.raises(ValueError, match=r"costs must not be negative; got 1, 1, -1, 0"):
        times(build("gpipe", 2, 2), weight_gradient=-1)


@given(st.integers(2, 6), st.integers(0, 8), *[st.integers(0, 9)] * 3)
def test_zb_h1_takes_what_is_published_just_where_its_condition_says(ranks, more, first, second, weights):
    plan = times(build("zb-h1", ranks, ranks + more), first, second, weights)
    published = (ranks - 1) * (first + second - weights)
    assert (plan.total - plan.work(0) == published) == (weights <= first and weights <= second)


def test_formulas_say_where_they_do_not_hold():
    with pytest.raises(
        ValueError, match=r"zb-h1: the formula of its idle time holds if W <= B_i and W <= F; got F = 1, B_i = 1, W = 2"
    ):
        expected_idle("zb-h1", 4, 1, 1, 1, 2)
    with pytest.raises(ValueError, match=r"zb-v: .* holds if F == B_i == W; got F = 1, B_i = 2, W = 1"):
        expected_idle("zb-v", 4, 2, 1, 2, 1)


TABLES = {
    ("gpipe", 3, 3, 1): """\
gpipe, 3 ranks, 3 micro-batches
rank 0  F0 F1 F2 .  .  .  .  .  .  B0--- B1--- B2---
rank 1  .  F0 F1 F2 .  .  .  B0--- B1--- B2---
rank 2  .  .  F0 F1 F2 B0--- B1--- B2---""",
    ("1f1b", 4, 8, 1): """\
1f1b, 4 ranks, 8 micro-batches
rank 0  F0 F1 F2 F3 .  .  .  .  .  .  B0--- F4 B1--- F5 B2--- F6 B3--- F7 B4--- .  B5--- .  B6--- .  B7---
rank 1  .  F0 F1 F2 .  .  .  .  B0--- F3 B1--- F4 B2--- F5 B3--- F6 B4--- F7 B5--- .  B6--- .  B7---
rank 2  .  .  F0 F1 .  .  B0--- F2 B1--- F3 B2--- F4 B3--- F5 B4--- F6 B5--- F7 B6--- .  B7---
rank 3  .  .  .  F0 B0--- F1 B1--- F2 B2--- F3 B3--- F4 B4--- F5 B5--- F6 B6--- F7 B7---""",
    ("interleaved", 2, 2, 2): """\
interleaved, 2 ranks, 2 chunks each, 2 micro-batches
rank 0  F0.0 F1.0 F0.1 F1.1 .    .    B0.1----- .    B1.1----- B0.0----- B1.0-----
rank 1  .    F0.0 F1.0 F0.1 B0.1----- F1.1 B1.1----- B0.0----- B1.0-----""",
    ("zb-h1", 2, 4, 1): """\
zb-h1, 2 ranks, 4 micro-batches
rank 0  F0 F1 .  I0 W0 F2 I1 W1 F3 I2 W2 I3 W3
rank 1  .  F0 I0 F1 I1 W0 F2 I2 W1 F3 I3 W2 W3""",
    ("zb-v", 2, 3, 2): """\
zb-v, 2 ranks, 2 chunks each, 3 micro-batches
rank 0  F0.0 F1.0 F2.0 F0.1 I0.1 W0.1 F1.1 I1.1 W1.1 I0.0 W0.0 F2.1 I2.1 I1.0 W2.1 I2.0 W1.0 W2.0
rank 1  .    F0.0 F0.1 F1.0 F1.1 I0.1 W0.1 F2.0 I0.0 W0.0 F2.1 I1.1 I1.0 I2.1 I2.0 W1.1 W1.0 W2.1 W2.0""",
    ("1f1b", 1, 1, 1): """\
1f1b, 1 rank, 1 micro-batch
rank 0  F0 B0---""",
}


@pytest.mark.parametrize("case", TABLES, ids=lambda case: f"{case[0]}-{case[1]}x{case[2]}")
def test_tables(case):
    schedule = build(*case)
    verify(schedule)
    assert str(schedule) == TABLES[case]
    assert str(schedule).isascii()


def test_places():
    assert build("interleaved", 2, 2, 2).places == ((0, 0), (1, 0), (0, 1), (1, 1))
    schedule = build("zb-v", 3, 1)
    assert schedule.places == ((0, 0), (1, 0), (2, 0), (2, 1), (1, 1), (0, 1))
    assert [schedule.stage(rank, chunk) for rank, chunk in schedule.places] == list(range(6))


def test_schedules_are_values():
    first, second = build("zb-v", 3, 5), build("zb-v", 3, 5)
    assert first == second and hash(first) == hash(second)
    with pytest.raises(AttributeError):
        first.ranks = 4


def any_case(draw_from):
    name = draw_from(st.sampled_from(NAMES))
    ranks = draw_from(st.integers(1, 5))
    chunks = draw_from(st.sampled_from(list(chunk_counts(name))))
    return build(name, ranks, draw_from(st.sampled_from(list(sizes(name, ranks, 10)))), chunks)


@given(st.data())
def test_gradients_of_a_chunk_are_summed_in_one_order(data):
    """In that of the micro-batches, whatever the schedule, so that their bits do not depend on it."""
    schedule = any_case(data.draw)
    for row in schedule.rows:
        for chunk in range(schedule.chunks):
            for kinds in ({Kind.BACKWARD, Kind.WEIGHT_GRADIENT}, {Kind.FORWARD}, {Kind.BACKWARD, Kind.INPUT_GRADIENT}):
                order = [a.micro_batch for a in row if a.chunk == chunk and a.kind in kinds]
                assert order == list(range(schedule.micro_batches))


@given(st.data())
def test_times_are_a_timeline(data):
    """Actions of a rank do not overlap, nothing begins before what it needs has come, and nothing waits for nothing."""
    schedule = any_case(data.draw)
    costs = [data.draw(st.fractions(0, 10, max_denominator=6)) for _ in range(4)]
    plan = times(schedule, *costs)
    ends = {}
    for rank, (row, spans) in enumerate(zip(schedule.rows, plan.rows, strict=True)):
        for action, span in zip(row, spans, strict=True):
            for part in parts(action.kind):
                ends[schedule.stage(rank, action.chunk), action.micro_batch, part] = span[1]
    for rank, (row, spans) in enumerate(zip(schedule.rows, plan.rows, strict=True)):
        free = 0
        for action, (begin, end) in zip(row, spans, strict=True):
            needed = [free]
            for stage, *what in needs(schedule, rank, action):
                travel = costs[3] if schedule.places[stage][0] != rank else 0
                needed.append(ends[stage, *what] + travel)
            assert begin == max(needed) and end >= begin
            free = end
    assert plan.total == max(ends.values())


def parts(kind):
    """The parts of a micro-batch's way through a stage that a kind of action does."""
    return {Kind.FORWARD: "F", Kind.BACKWARD: "IW", Kind.INPUT_GRADIENT: "I", Kind.WEIGHT_GRADIENT: "W"}[kind]


def needs(schedule, rank, action):
    stage, micro_batch = schedule.stage(rank, action.chunk), action.micro_batch
    if action.kind is Kind.FORWARD:
        return [(stage - 1, micro_batch, "F")] if stage else []
    if action.kind is Kind.WEIGHT_GRADIENT:
        return [(stage, micro_batch, "I")]
    after = [(stage + 1, micro_batch, "I")] if stage + 1 < len(schedule.places) else []
    return [(stage, micro_batch, "F"), *after]


def is_right(schedule):
    """What `verify` proves, said as a graph: every part once, and no circle of order and need."""
    done, edges = Counter(), []
    for rank, row in enumerate(schedule.rows):
        nodes = [(rank, position) for position in range(len(row))]
        edges += pairwise(nodes)
        for node, action in zip(nodes, row, strict=True):
            stage = schedule.stage(rank, action.chunk)
            done.update((stage, action.micro_batch, part) for part in parts(action.kind))
            edges += [(node, (stage, action.micro_batch, part)) for part in parts(action.kind)]
            edges += [(need, node) for need in needs(schedule, rank, action)]
    stages = range(len(schedule.places))
    if done != Counter((s, m, part) for s in stages for m in range(schedule.micro_batches) for part in "FIW"):
        return False
    graph = {}
    for before, after in edges:
        graph.setdefault(after, set()).add(before)
    try:
        TopologicalSorter(graph).prepare()
    except CycleError:
        return False
    return True


def planted(schedule, rank, row):
    return replace(schedule, rows=(*schedule.rows[:rank], tuple(row), *schedule.rows[rank + 1 :]))


@given(st.data())
def test_the_proof_agrees_with_a_graph(data):
    """On schedules of which a row has an action dropped, doubled, changed, or moved, anywhere."""
    schedule = any_case(data.draw)
    rank = data.draw(st.integers(0, schedule.ranks - 1))
    row = list(schedule.rows[rank])
    position = data.draw(st.integers(0, len(row) - 1))
    match data.draw(st.sampled_from(["drop", "double", "change", "move", "leave"])):
        case "drop":
            del row[position]
        case "double":
            row.insert(data.draw(st.integers(0, len(row))), row[position])
        case "change":
            row[position] = Action(
                data.draw(st.sampled_from(Kind)),
                data.draw(st.integers(0, schedule.chunks - 1)),
                data.draw(st.integers(0, schedule.micro_batches - 1)),
            )
        case "move":
            row.insert(data.draw(st.integers(0, len(row) - 1)), row.pop(position))
    faulty = planted(schedule, rank, row)
    try:
        verify(faulty)
        proved = True
    except ScheduleError:
        proved = False
    assert proved == is_right(faulty)


FAULTS = {
    "missing": (0, [forward(0), backward(0), forward(1)], "rank 0: micro-batch 1 ends with its forward in chunk 0"),
    "missing whole": (1, [forward(0), backward(0)], "rank 1: micro-batch 1 ends with nothing in chunk 0"),
    "doubled": (
        1, [forward(0), forward(0), backward(0), forward(1), backward(1)],
        "rank 1, position 1, action F0.0: the micro-batch must have had nothing in this chunk, and has had its forward",
    ),
    "backward first": (1, [backward(0), forward(0), forward(1), backward(1)], "rank 1, position 0, action B0.0: .* has had nothing"),
    "weights first": (
        1, [forward(0), weight_gradient(0), input_gradient(0), forward(1), backward(1)],
        "rank 1, position 1, action W0.0: .* must have had the input half of its backward .* has had its forward",
    ),
    "a half twice": (
        1, [forward(0), backward(0), weight_gradient(0), forward(1), backward(1)],
        "rank 1, position 2, action W0.0: .* has had all of it",
    ),
    "a half missing": (
        0, [forward(0), forward(1), input_gradient(0), backward(1)],
        "rank 0: micro-batch 0 ends with the input half of its backward in chunk 0; the rest is missing",
    ),
    "no such chunk": (0, [forward(0, 1)], r"rank 0, position 0, action F0.1: there are chunks 0 to 0 and micro-batches 0 to 1"),
    "no such micro-batch": (0, [forward(2)], r"rank 0, position 0, action F2.0: there are chunks 0 to 0"),
    "deadlock": (
        0, [forward(0), backward(0), forward(1), backward(1)],
        "action B0.0: deadlock: rank 0 waits with B0.0 for stage 1 of rank 1; rank 1 waits with F1.0 for stage 0 of rank 0",
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", FAULTS)
def test_planted_faults_are_named(what):
    rank, row, message = FAULTS[what]
    gpipe = build("gpipe", 2, 2)
    verify(gpipe)
    with pytest.raises(ScheduleError, match=message) as caught:
        verify(planted(gpipe, rank, row))
    assert caught.value.rank == rank


def test_swapped_rows_are_a_deadlock():
    schedule = build("1f1b", 2, 4)
    with pytest.raises(ScheduleError, match="deadlock: rank 0 waits with B0.0 for stage 1 of rank 1") as caught:
        verify(replace(schedule, rows=schedule.rows[::-1]))
    assert (caught.value.rank, caught.value.position, caught.value.action) == (0, 1, backward(0))


PLACES = {
    "taken twice": (
        ((0, 0), (0, 0), (1, 1), (0, 1)),
        "rank 0: virtual stage 1 is at chunk 0, which is taken, or is not there",
    ),
    "not there": (
        ((0, 0), (2, 0), (1, 1), (0, 1)),
        "rank 2: virtual stage 1 is at chunk 0, which is taken, or is not there",
    ),
    "too few": (((0, 0), (1, 0), (1, 1)), "rank 0: chunk 1 is no virtual stage"),
    "of another schedule": (round_robin(2, 2), "deadlock"),
}


@pytest.mark.parametrize("what", PLACES)
def test_wrong_places_are_caught(what):
    places, message = PLACES[what]
    with pytest.raises(ScheduleError, match=message):
        verify(replace(build("zb-v", 2, 4), places=places))


def test_impossible_tables_are_caught():
    with pytest.raises(ScheduleError, match="there are 1 rows for 2 ranks"):
        verify(replace(build("gpipe", 2, 2), rows=build("gpipe", 1, 2).rows))
    with pytest.raises(ScheduleError, match="impossible: 0 ranks, 1 chunks, 1 micro-batches"):
        verify(Schedule("none", 0, 1, 1, (), ()))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("2f2b", 4, 8), r"unknown schedule '2f2b'; expected one of 1f1b, gpipe, interleaved, zb-h1, zb-v"),
        (("gpipe", 0, 8), r"gpipe: the number of ranks must be at least 1, got 0"),
        (("1f1b", 4, 0), r"1f1b: the number of micro-batches must be at least 1, got 0"),
        (("interleaved", 4, 8, 0), r"interleaved: the number of chunks must be at least 1, got 0"),
        (("1f1b", 4, 8, 2), r"1f1b: chunks a rank must be 1, got 2; any number fits interleaved"),
        (("zb-v", 4, 8, 1), r"zb-v: chunks a rank must be 2, got 1"),
        (("interleaved", 4, 6), r"interleaved: .* must be a multiple of the 4 ranks, such as 4 or 8; got 6"),
        (("interleaved", 4, 3), r"interleaved: .* must be a multiple of the 4 ranks, such as 4; got 3"),
    ],
)
def test_what_does_not_fit_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        build(*arguments)


def test_a_new_schedule_is_found_everywhere(capsys):
    def one_by_one(ranks, micro_batches, chunks):
        """One micro-batch after the other."""
        row = tuple(action for number in range(micro_batches) for action in (forward(number), backward(number)))
        return Schedule("one-by-one", ranks, chunks, micro_batches, (row,) * ranks, round_robin(ranks))

    try:
        register("one-by-one", idle="M * (p - 1) * (F + B)", in_flight="1")(one_by_one)
        with pytest.raises(ValueError, match="there is a schedule 'one-by-one' already"):
            register("one-by-one", idle="0", in_flight="1")(one_by_one)
        schedule = build("one-by-one", 3, 4)
        verify(schedule)
        assert times(schedule).idle(1) == expected_idle("one-by-one", 3, 1, micro_batches=4) == 24
        assert main(["schedules", "list"]) == 0
        assert "one-by-one" in capsys.readouterr().out
    finally:
        del SCHEDULES["one-by-one"]


def test_a_schedule_is_one_short_file():
    files = [Path(getfile(recipe.make)) for recipe in SCHEDULES.values()]
    assert len(set(files)) == len(files)
    assert all(len(file.read_text().splitlines()) < 80 for file in files)


def test_list_prints_the_formulas(capsys):
    assert main(["schedules", "list"]) == 0
    out = capsys.readouterr().out
    for recipe in SCHEDULES.values():
        assert recipe.summary.endswith(".")
        line = next(line for line in out.splitlines() if line.startswith(f"{recipe.name} "))
        assert str(recipe.idle) in line and str(recipe.in_flight) in line


def test_show_prints_table_idle_time_and_memory(capsys):
    assert main(["schedules", "show", "1f1b", "--stages", "4", "--micro-batches", "8"]) == 0
    out = capsys.readouterr().out
    assert out.startswith(TABLES["1f1b", 4, 8, 1])
    assert [line.split() for line in out.splitlines() if "%" in line] == [
        [str(rank), "24", "9", "27.3%", "37.5%", str(4 - rank)] for rank in range(4)
    ]
    assert "A step takes 33 where step follows step, and 33 until" in out
    assert "Idle by the formula (p - 1) * (F + B): 9;" in out


def test_show_takes_chunks(capsys):
    assert main(["schedules", "show", "interleaved", "--stages", "2", "--micro-batches", "4", "--chunks", "4"]) == 0
    assert "Idle by the formula (p - 1) * (F + B) / v: 0.75;" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("show 1f1b --chunks 2", "error: 1f1b: chunks a rank must be 1, got 2"),
        ("show nothing", "error: unknown schedule 'nothing'; expected one of 1f1b, gpipe"),
        ("show gpipe --stages 0", "error: gpipe: the number of ranks must be at least 1, got 0"),
        ("show gpipe --out a.txt", "error: --out a.txt: the name must end in .png, .svg or .pdf"),
        ("show gpipe --out no/a.png", "error: --out no/a.png: there is no folder no"),
    ],
)
def test_show_refuses_in_one_line(arguments, message, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert main(["schedules", *arguments.split()]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.startswith(message) and captured.err.count("\n") == 1


def test_show_wants_a_command(capsys):
    with pytest.raises(SystemExit) as caught:
        main(["schedules"])
    assert caught.value.code == 2
    assert "(see python -m parallel schedules --help)" in capsys.readouterr().err


def test_a_missing_matplotlib_is_said(monkeypatch, capsys, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert main(["schedules", "show", "gpipe", "--out", str(tmp_path / "a.png")]) == 2
    assert "matplotlib is missing; install the extra 'train', or leave --out out" in capsys.readouterr().err


@pytest.mark.slow
def test_show_draws(capsys, tmp_path):
    path = tmp_path / "schedule.png"
    assert main(["schedules", "show", "zb-v", "--stages", "2", "--micro-batches", "3", "--out", str(path)]) == 0
    assert capsys.readouterr().out.endswith(f"wrote {path}\n")
    assert path.read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_what_was_measured_is_drawn_under_the_plan(tmp_path):
    """At 20 ms a unit, with waiting of 10 ms before each action: the scale comes from the actions alone."""
    schedule = build("1f1b", 2, 3)
    plan = times(schedule)
    measured = [
        [(action, 5 + 0.03 * float(begin), 5 + 0.03 * float(begin) + 0.02 * float(end - begin)) for action, (begin, end) in zip(row, spans, strict=True)]
        for row, spans in zip(schedule.rows, plan.rows, strict=True)
    ]  # fmt: skip
    draw(tmp_path / "both.svg", schedule, measured, plan)
    text = (tmp_path / "both.svg").read_text()
    for label in (
        "rank 0",
        "rank 1",
        "measured",
        "measured, ms",
        "forward",
        "backward",
        "1f1b, 2 ranks, 3 micro-batches",
    ):
        assert f"<!-- {label} -->" in text
    assert "input gradient" not in text
    assert text.count("<!-- 2 -->") >= 8  # micro-batch 2, forward and backward, planned and measured, on two ranks


def test_nothing_measured_yet_is_drawn_empty(tmp_path):
    draw(tmp_path / "none.svg", build("gpipe", 1, 1), [[]])
    assert "<!-- measured -->" in (tmp_path / "none.svg").read_text()
