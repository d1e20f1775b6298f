"""The training benchmark: its ranks as threads, its arithmetic, one real run, and torch's model beside ours."""

import json
import os
import socket
import subprocess
import sys
import threading
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from bench.harness.jobs import Job, absent, command
from bench.harness.protocol import Channel
from bench.train import main
from bench.training.contestants import LAYOUTS, RIVALS, TORCH, groups, names
from bench.training.driver import Trainee, measure
from bench.training.ours import MODES, Hushable, Switch, contestant
from bench.training.table import HEADER, Measured, line, rows, summary
from bench.training.worker import Specification, Worker
from collectives.testing import run_ranks
from parallel.configuration import TrainingConfiguration

ROOT = Path(__file__).parents[2]
TINY = TrainingConfiguration(layers=4, hidden=16, heads=2, seq=12, batch=8, steps=100, warmup=2)


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text"
    path.write_bytes(b"the quick brown fox jumps over the lazy dog; " * 40)
    return str(path)


@contextmanager
def job(name, ranks, text):
    """A job whose ranks are threads."""
    pairs = [socket.socketpair() for _ in range(ranks)]
    specification = Specification("", name, [0], "", text, TINY)
    assert Specification.decode(specification.encode()) == specification

    def rank(comm):
        Channel(pairs[comm.rank][1]).serve(Worker(contestant(name, comm), specification).steps)

    threads = threading.Thread(target=run_ranks, args=(ranks, rank))
    threads.start()
    channels = {number: Channel(pair[0]) for number, pair in enumerate(pairs)}
    found = Job(name, channels, {name: "ours"}, ranks=ranks)
    try:
        yield found
    finally:
        found.leave()
        threads.join()


@pytest.mark.parametrize("mode", MODES)
def test_every_mode_learns_what_one_rank_does(mode, text):
    notes = []
    with job("alone", 1, text) as one, job(mode, 2, text) as two:
        measured = measure([one, two], learn=6, rounds=2, steps=1, say=notes.append)
    assert notes == []
    ((ranks, several), (_, single)) = measured[mode], measured["alone"]
    assert ranks == 2
    np.testing.assert_allclose(several.losses, single.losses, atol=1e-5)
    assert several.losses[-1] < several.losses[0]
    assert len(several.losses) == 6
    assert len(several.seconds) == len(several.alone) == len(several.waits) == len(single.seconds) == 2
    assert single.alone == []
    assert 0 < several.before <= several.peak


def test_a_mode_that_fails_is_left_out(monkeypatch, text):
    def fails(*_):
        raise RuntimeError("not today")

    monkeypatch.setitem(MODES, "broken", fails)
    notes = []
    with job("broken", 2, text) as broken:
        assert measure([broken], learn=1, rounds=1, steps=1, say=notes.append) == {}
    assert notes == ["broken is left out on 2 ranks: RuntimeError: not today"]


def test_a_hushed_communicator_carries_nothing():
    def rank(comm):
        switch = Switch()
        world = Hushable(comm, switch)
        axis, other = world.dup(), world.split(comm.rank)
        x, out = np.full(4, axis.rank, np.float32), np.full(8, 7, np.float32)
        axis.all_reduce(x)
        switch.hushed = True
        sent = axis.stats.bytes_sent
        assert axis.all_reduce(x, async_op=True).wait() is x
        assert axis.all_gather(x, out) is out
        assert axis.all_gather(x).shape == (2, 4)
        assert axis.reduce_scatter(x).shape == (2,)
        assert axis.all_gather_v(x[: 1 + axis.rank], [1, 2]).shape == (3,)
        assert axis.reduce_scatter_v(x, [1, 3]).shape == (1 + 2 * axis.rank,)
        assert other.all_reduce(x) is x
        assert axis.all_to_all(x).tolist() == x.tolist()
        assert axis.send(x, 1 - axis.rank) is None
        assert axis.recv(out, 1 - axis.rank, async_op=True).wait() is out
        assert axis.sendrecv(x, 1 - axis.rank, out, 1 - axis.rank) is out
        assert not out.any()
        assert axis.stats.bytes_sent == sent > 0
        switch.hushed = False
        return axis.all_reduce(x)[0]

    assert run_ranks(2, rank) == [2, 2]


def test_every_contestant_is_in_a_layout_and_has_a_rival_there():
    assert {"alone", "torch"}.union(*LAYOUTS.values()) == set(names()) == set(RIVALS)
    for layout, members in LAYOUTS.items():
        rivals = {RIVALS[name] for name in members if layout != "exact" or name.endswith("-exact")}
        assert rivals <= set(members)


def test_groups():
    assert groups([], []) == {"dp": ["alone", *LAYOUTS["dp"], "torch"]}
    assert groups([], ["zero0", "tp"]) == {"": ["zero0", "tp"]}
    assert groups(["tp", "1f1b"], []) == {
        "tp": ["alone", "tp", "torch-tp", "torch"], "1f1b": ["alone", "1f1b", "torch-1f1b", "torch"],
    }  # fmt: skip
    assert groups(["tp", "gpipe"], ["tp", "gpipe"]) == {"tp": ["tp"], "gpipe": ["gpipe"]}


def test_a_loss_that_only_some_ranks_know_is_that_of_the_others():
    trainee = Trainee(Job("pipeline"))
    trainee.ask = lambda do, **_: [{"losses": [None, None]}, {"losses": [3.0, 2.0]}] if do == "run" else []
    trainee.learn(2)
    assert trainee.measured.losses == [3.0, 2.0]


def table():
    measured = {
        "alone": (1, Measured([5.0, 4.0], [0.1])),
        "zero0": (2, Measured([5.0, 3.0], [0.3, 0.2, 0.1], [0.1, 0.1, 0.1], [0.01, 0.02, 0.03], 1 << 20, 3 << 20)),
        "torch": (1, Measured([5.0, 4.5], [0.3])),
        "ddp": (2, Measured([5.0, 3.25], [0.4], [0.3], peak=6 << 20)),
        "fsdp2": (2, Measured([5.0, 3.0], [0.8], [0.3])),
    }
    return rows(measured, tokens=100, cores=2)


def test_columns():
    alone, zero0, torch, ddp, fsdp2 = table()
    assert zero0.milliseconds == pytest.approx(200)
    assert zero0.tokens_per_second == pytest.approx(1000)
    assert [row.rival for row in (alone, zero0, torch, ddp, fsdp2)] == ["torch", "ddp", "torch", "ddp", "ddp"]
    assert [row.ratio for row in (alone, zero0, torch, ddp, fsdp2)] == pytest.approx([3, 2, 1, 1, 0.5])
    assert [row.memory for row in (zero0, ddp)] == pytest.approx([0.5, 1])
    assert [row.fsdp2 for row in (zero0, ddp, fsdp2)] == pytest.approx([4, 2, 1])
    assert [row.scaling for row in (zero0, ddp)] == pytest.approx([0.5, 0.75])
    assert alone.scaling is alone.fsdp2 is alone.unhidden_milliseconds is torch.difference is ddp.difference is None
    assert alone.memory is None
    assert zero0.unhidden_milliseconds == pytest.approx(100)
    assert zero0.waits_milliseconds == pytest.approx(20)
    assert [row.difference for row in (alone, zero0, fsdp2)] == [0.5, 0.25, 0.25]


def test_a_layout_is_compared_with_its_own_peer_and_exact_sums_with_the_same_without():
    measured = {
        "tp": (2, Measured([5.0], [0.2])),
        "tp-exact": (2, Measured([5.0], [0.5])),
        "torch-tp": (2, Measured([4.5], [0.6])),
        "dp-exact": (2, Measured([5.0], [0.5])),
    }
    tp, tp_exact, torch_tp, dp_exact = rows(measured, tokens=100, cores=2, layout="tp")
    assert (tp.rival, tp.ratio, tp.difference) == ("torch-tp", pytest.approx(3), 0.5)
    assert (tp_exact.rival, tp_exact.ratio) == ("tp", pytest.approx(0.4))
    assert (torch_tp.rival, torch_tp.ratio) == ("torch-tp", 1)
    assert dp_exact.rival is dp_exact.ratio is None
    assert {row.layout for row in (tp, tp_exact, torch_tp)} == {"tp"}


def test_ranks_beyond_the_cores_share_them():
    (_, four) = rows({"alone": (1, Measured([1.0], [0.1])), "zero0": (4, Measured([1.0], [0.2]))}, 100, cores=2)
    assert four.scaling == pytest.approx(1)
    assert four.ratio is four.difference is None


def test_lines_stand_under_their_headings():
    heading, text = HEADER.splitlines()[0], line(table()[1])
    assert len(text) == len(heading)
    for column in heading.split():
        end = heading.index(column) + len(column)
        assert text[end - 1] != " ", column
        assert text[end : end + 1] in ("", " "), column


def test_summary():
    assert summary(table()).splitlines()[2:] == [
        "| 1 | dp | alone | torch | 3.00 |  |  |  | 0 |",
        "| 2 | dp | zero0 | ddp | 2.00 | 4.00 | 0.50 | 0.50 | 3 |",
    ]


def test_summary_tells_what_exact_sums_cost_and_one_rank_once():
    measured = {
        "alone": (1, Measured([5.0], [0.1])),
        "zero0": (2, Measured([5.0], [0.2])),
        "dp-exact": (2, Measured([5.0], [0.5])),
    }
    lines = summary([*table(), *rows(measured, 100, 2, "exact")]).splitlines()
    assert sum("alone" in line for line in lines) == 1
    assert lines[-2:] == ["", "- dp-exact takes 2.50 times as long as zero0 on 2 ranks"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--ranks", "1"], "expected numbers from 2"),
        (["--with", "zero7"], f"there is no contestant zero7; there are: {', '.join(names())}"),
        (["--layouts", "dp,sp"], f"there is no layout sp; there are: {', '.join(LAYOUTS)}, all"),
        (["--heads", "3"], "--heads must divide --hidden"),
        (["--rounds", "0"], "must be at least 1"),
    ],
)
def test_wrong_requests(arguments, message, capsys):
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
    assert message in capsys.readouterr().err


def bench_train(record, *words, timeout):
    """The rows and the notes of a real run."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("COLLECTIVES_", "OMPI_", "PMIX_", "PMI_"))}
    done = subprocess.run(
        [sys.executable, "-m", "bench", "train", *words, "--json", record],
        env=kept, cwd=ROOT, capture_output=True, text=True, timeout=timeout,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(record.read_text())
    return found["rows"], found["notes"]


@pytest.mark.slow
def test_a_real_run(tmp_path, text):
    words = "--with alone,zero0 --ranks 2 --layers 1 --hidden 16 --heads 2 --seq 12 --batch 2 --learn 3 --rounds 2 --steps 1"
    found, _ = bench_train(tmp_path / "train.json", *words.split(), "--data", text, timeout=60)
    assert [(row["contestant"], row["ranks"]) for row in found] == [("alone", 1), ("zero0", 2)]
    for row in found:
        assert row["losses"][-1] < row["losses"][0]
        assert 0 < row["before_bytes"] <= row["peak_bytes"]


def torch_program(name, *arguments, ranks=1):
    words, variables = command("gloo", ranks)
    path = os.pathsep.join([str(ROOT), *filter(None, [variables.get("PYTHONPATH")])])
    program = Path(__file__).parent / "programs" / name
    return subprocess.run(
        [*words[:-1], program, *arguments],
        env={**os.environ, **variables, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, timeout=60,
    )  # fmt: skip


needs_torch = pytest.mark.skipif(bool(absent("gloo")), reason=absent("gloo"))


@pytest.mark.slow
@needs_torch
def test_the_model_of_torch_is_ours():
    done = torch_program("torch_agrees.py")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["names"][0] == found["names"][1]
    assert found["sizes"][0] == found["sizes"][1]
    assert found["losses"][0] == pytest.approx(found["losses"][1], rel=1e-6)
    for ours, theirs in found["norms"]:
        assert ours == pytest.approx(theirs, rel=1e-4)


@pytest.mark.slow
@needs_torch
@pytest.mark.parametrize("name", [name for name in TORCH if name != "torch"])
def test_what_torch_does_hushed_communicates_nothing(name, tmp_path):
    done = torch_program("torch_is_hushed.py", name, str(tmp_path / "store"), ranks=2)
    assert done.returncode == 0, done.stdout + done.stderr


SMALL = "--hidden 24 --heads 3 --seq 12 --learn 5 --rounds 1 --steps 1 --ranks 3"


@pytest.mark.slow
@needs_torch
def test_what_torch_learns_in_every_layout_is_what_ours_does(tmp_path, text):
    theirs = [name for name in TORCH if name.startswith("torch-")]
    words = f"--with zero0,{','.join(theirs)} --layers 6 {SMALL}"
    found, _ = bench_train(tmp_path / "train.json", *words.split(), "--data", text, timeout=110)
    assert [row["contestant"] for row in found] == ["zero0", *theirs]
    for row in found:
        assert row["losses"][-1] < row["losses"][0]
        np.testing.assert_allclose(row["losses"], found[0]["losses"], atol=1e-5)
        assert row["seconds_alone"]


@pytest.mark.slow
@needs_torch
def test_both_sides_of_every_layout_learn_the_same(tmp_path, text):
    layouts = [name for name in LAYOUTS if name not in ("dp", "exact")]
    members = [name for layout in layouts for name in LAYOUTS[layout]]
    words = f"--layouts {','.join(layouts)} --with {','.join(members)} --layers 6 {SMALL}"
    found, notes = bench_train(tmp_path / "train.json", *words.split(), "--data", text, timeout=110)
    (refused,) = (note for note in notes if note.startswith("interleaved is left out on 3 ranks: "))
    assert "multiple of the 3 ranks" in refused
    assert [row["contestant"] for row in found] == [name for name in members if name != "interleaved"]
    for row in found:
        assert row["difference"] is None or row["difference"] < 1e-5


@pytest.mark.slow
@needs_torch
def test_what_cannot_be_cut_so_is_left_out(tmp_path, text):
    words = f"--with zero0,torch-tp,torch-interleaved --layers 5 {SMALL.replace('heads 3', 'heads 4')}"
    found, notes = bench_train(tmp_path / "train.json", *words.split(), "--data", text, timeout=110)
    assert [row["contestant"] for row in found] == ["zero0"]
    reasons = {name: note for note in notes for name in TORCH if note.startswith(f"{name} is left out on 3 ranks: ")}
    assert "4 heads cannot be shared out evenly among 3 ranks" in reasons["torch-tp"]
    assert "5 layers cannot be cut into 6 stages" in reasons["torch-interleaved"]
