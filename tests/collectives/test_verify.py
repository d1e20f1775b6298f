import random
from dataclasses import replace

import pytest

from collectives.algorithms import registered
from collectives.errors import ScheduleError
from collectives.schedule import Kind, Ref, Schedule, copy, fold, recv, reduce, send
from collectives.spec import COLLECTIVES
from collectives.verify import verify, verify_algorithm

ENTRIES = registered()
IDS = [f"{entry.collective}-{entry.name}" for entry in ENTRIES]


@pytest.mark.slow
@pytest.mark.parametrize("entry", ENTRIES, ids=IDS)
def test_every_algorithm_is_proved(entry):
    for size in range(1, 18):
        verify_algorithm(entry, size)


def planted(schedule, rank, rows):
    """The schedule with another program for one rank."""
    return replace(schedule, make_program=lambda r: rows if r == rank else schedule.program(r))


def faults(schedule, chooser):
    """(what, schedule) with one step of one rank dropped, doubled, misdirected or moved."""
    rank = chooser.choice([r for r in range(schedule.size) if schedule.program(r)])
    rows = list(schedule.program(rank))
    step = chooser.randrange(len(rows))
    index = chooser.randrange(len(rows[step]))
    row, instruction = rows[step], rows[step][index]
    yield "dropped", planted(schedule, rank, [*rows[:step], row[:index] + row[index + 1 :], *rows[step + 1 :]])
    if instruction.kind not in (Kind.COPY, Kind.FOLD):  # once more, they write the same again
        yield "doubled", planted(schedule, rank, [*rows[: step + 1], (instruction,), *rows[step + 1 :]])
        peers = [peer for peer in range(schedule.size) if peer not in (rank, instruction.peer)]
        if peers:
            moved = replace(instruction, peer=chooser.choice(peers))
            yield (
                "misdirected",
                planted(schedule, rank, [*rows[:step], (*row[:index], moved, *row[index + 1 :]), *rows[step + 1 :]]),
            )


@pytest.mark.slow
@pytest.mark.parametrize("entry", ENTRIES, ids=IDS)
@pytest.mark.parametrize("size", [3, 4, 7])
def test_planted_faults_are_caught(entry, size):
    chooser = random.Random(f"{entry.collective} {entry.name} {size}")
    schedule = entry.schedule(size, 0)
    for _ in range(25):
        for what, faulty in faults(schedule, chooser):
            with pytest.raises(ScheduleError):
                print(what, verify(faulty, in_place=False))


@pytest.mark.parametrize("collective", ["all_reduce", "reduce_scatter", "all_gather"])
@pytest.mark.parametrize("size", [3, 4, 8])
def test_reordered_steps_are_caught(collective, size):
    schedule = next(entry for entry in ENTRIES if entry.collective == collective and entry.name == "ring").schedule(
        size, 0
    )
    for rank in range(size):
        rows = list(schedule.program(rank))
        for step in range(len(rows) - 1):
            swapped = [*rows[:step], rows[step + 1], rows[step], *rows[step + 2 :]]
            with pytest.raises(ScheduleError):
                verify(planted(schedule, rank, swapped))


def test_rank_order_is_derived():
    """What `deterministic=True` may use: reductions that are one fold in the order of the ranks, at every size."""
    found = {
        size: {
            (e.collective, e.name)
            for e in ENTRIES
            if COLLECTIVES[e.collective].reduces and verify(e.schedule(size, size - 1), in_place=False).rank_ordered
        }
        for size in (3, 4, 5, 8)
    }
    direct = {(name, "direct") for name, row in COLLECTIVES.items() if row.reduces}
    assert set(map(frozenset, found.values())) == {frozenset({("all_reduce", "one_hop"), *direct})}


def test_a_fold_counts_orders_and_fits():
    def program(rank):
        others = [other for other in range(3) if other != rank]
        yield (copy(IN, Ref("tmp", rank)), *(send(o, IN) for o in others), *(recv(o, Ref("tmp", o)) for o in others))
        yield (fold(Ref("tmp", 0, 3), OUT),)

    schedule = Schedule("all_reduce", "test", 3, program, scratch=lambda rank: (IN,) * 3)
    assert verify(schedule).rank_ordered
    for last, message in [
        (fold(Ref("tmp", 0, 2), OUT), "missing block 0 piece 0 of rank 2"),
        (fold(Ref("tmp", 0, 4), OUT), "3 chunks here"),
        (fold(Ref("tmp", 0, 3), Ref("tmp", 0)), "never written"),
    ]:
        faulty = planted(schedule, 1, [schedule.program(1)[0], (last,)])
        with pytest.raises(ScheduleError, match=message):
            verify(faulty)
    backwards = Schedule(
        "all_reduce", "test", 3, lambda rank: [schedule.program(rank)[0], (reduce(Ref("tmp", 1), Ref("tmp", 0)),),
        (reduce(Ref("tmp", 2), Ref("tmp", 0)),), (copy(Ref("tmp", 0), OUT),)] if rank == 1 else schedule.program(rank),
        scratch=lambda rank: (IN,) * 3,
    )  # fmt: skip
    with pytest.raises(ScheduleError, match="another order"):
        verify(backwards)
    assert "out[0] = ⊕ tmp[0:3]" in str(schedule)


def two_ranks(collective, first, second):
    return Schedule(collective, "test", 2, lambda rank: first if rank == 0 else second)


IN, OUT = Ref("in", 0), Ref("out", 0)


@pytest.mark.parametrize(
    ("message", "schedule"),
    [
        ("deadlock", two_ranks("all_reduce", [(send(1, IN),), (recv(1, OUT),)], [(send(0, IN),), (recv(0, OUT),)])),
        ("unmatched", two_ranks("all_reduce", [(copy(IN, OUT), send(1, IN))], [(copy(IN, OUT),)])),
        ("missing", two_ranks("all_reduce", [(copy(IN, OUT),)], [(copy(IN, OUT),)])),
        ("never written", two_ranks("all_reduce", [], [])),
        ("caller's input", two_ranks("all_reduce", [(copy(IN, Ref("in", 0)), copy(OUT, IN))], [])),
        ("read before", two_ranks("all_reduce", [(send(1, OUT),)], [(recv(0, OUT),)])),
        ("written twice", two_ranks("all_reduce", [(copy(IN, OUT), copy(IN, OUT))], [])),
        ("1 chunks here", two_ranks("all_reduce", [(copy(IN, Ref("out", 1)),)], [])),
        ("no peer 5", two_ranks("all_reduce", [(send(5, IN),)], [])),
    ],
)
def test_what_is_wrong_is_said(message, schedule):
    with pytest.raises(ScheduleError, match=message) as caught:
        verify(schedule, in_place=False)
    assert caught.value.rank is not None


def test_double_counting_is_caught():
    """A checker that unions what a rank holds would pass this."""
    from collectives.schedule import recv_reduce

    def program(rank):
        peer = 1 - rank
        yield (copy(IN, OUT), send(peer, IN), recv(peer, Ref("tmp", 0)))
        yield (reduce(Ref("tmp", 0), OUT),)
        yield (send(peer, IN), recv_reduce(peer, OUT, OUT))

    with pytest.raises(ScheduleError, match="too many"):
        verify(Schedule("all_reduce", "test", 2, program, scratch=lambda rank: (IN,)), in_place=False)


def test_order_of_reduction_is_compared():
    """Three ranks that add in different orders hold equal sets and different bits."""
    from collectives.schedule import recv_reduce

    def program(rank):
        a, b = (rank + 1) % 3, (rank + 2) % 3
        yield (send(a, IN), send(b, IN), recv_reduce(a, IN, OUT), recv(b, Ref("tmp", 0)))
        yield (reduce(Ref("tmp", 0), OUT),)

    with pytest.raises(ScheduleError, match="another order"):
        verify(Schedule("all_reduce", "test", 3, program, scratch=lambda rank: (IN,)), in_place=False)


def test_uneven_blocks_are_compared():
    """Block 1 must not travel through room made for block 0."""

    def program(rank):
        peer = 1 - rank
        yield (send(peer, Ref("in", peer)), recv(peer, Ref("tmp", peer)))

    with pytest.raises(ScheduleError, match="uneven"):
        verify(
            Schedule("reduce_scatter", "test", 2, program, scratch=lambda rank: (Ref("in", 0), Ref("in", 1))),
            in_place=False,
        )


def test_the_table_is_printed():
    text = str(next(e for e in ENTRIES if e.collective == "all_reduce" and e.name == "ring").schedule(2, 0))
    assert text.splitlines()[0] == "all_reduce by ring, 2 ranks, 2 chunks a block"
    assert "in[1] → 1, out[0] ← 1 ⊕ in[0]" in text
