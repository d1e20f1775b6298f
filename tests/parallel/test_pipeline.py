"""Running a pipeline: what goes wrong in a stage, what a report of it says, and its picture."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from collectives import CommunicationError, Communicator
from collectives.testing import run_ranks
from parallel import bubble
from parallel.autograd import Tensor
from parallel.nn import Block
from parallel.schedules import Kind, build
from parallel.train import Trainer
from tests.parallel.layouts import CORPUS, configuration

ROOT = Path(__file__).parents[2]
SMALL = ["--layers", "4", "--hidden", "16", "--heads", "2", "--seq", "12", "--batch", "8", "--micro-batches", "4",
         "--validation-batches", "1", "--threads", "1"]  # fmt: skip


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text"
    path.write_bytes(b"the quick brown fox jumps over the lazy dog; " * 40)
    return path


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "parallel", "train", *SMALL, *arguments]


@pytest.mark.slow
def test_a_pipeline_of_processes_prints_its_plan_beside_what_it_did(text: Path, tmp_path: Path) -> None:
    report, picture, trace = tmp_path / "report.json", tmp_path / "pipeline.png", tmp_path / "trace.json"
    words = ["--layout", "pp2,tp2", "--schedule", "zb-h1", "--sequence-parallel", "--zero", "3", "--steps", "4"]
    files = ["--report", str(report), "--timeline", str(picture), "--trace", str(trace), "--compare-steps", "3"]
    done = subprocess.run(
        command(*words, *files, "--data", str(text)), cwd=ROOT, capture_output=True, text=True, timeout=90, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "4 ranks, pp2,tp2, zb-h1 of 4 micro-batches, sequence parallel, ZeRO stage 3, float32" in done.stdout
    assert "tp: 2 ranks, within a host" in done.stdout
    assert "Pipelines (zb-h1; idle as a share of the whole time)" in done.stdout
    assert "differs" not in done.stdout
    document = json.loads(report.read_text())
    assert document["configuration"]["layout"] == "pp2,tp2"
    for row in document["pipeline"]:
        assert row["in_flight"] == row["expected_in_flight"] == 2
        assert row["idle"] == row["expected_idle"] == 1  # (p − 1)(F + B − W) at unit costs
        assert 0 < row["measured_share"] < 1
    assert picture.read_bytes().startswith(b"\x89PNG")
    names = {event["name"] for event in json.loads(trace.read_text())["traceEvents"]}
    assert {"forward 0", "backward of the inputs 3", "backward of the weights 3"} <= names


@pytest.mark.slow
@pytest.mark.parametrize("flags", [["--layout", "cp2"], ["--layout", "pp2", "--schedule", "interleaved", "--exact"]])
def test_any_layout_is_compared_with_one_rank(text: Path, tmp_path: Path, flags: list[str]) -> None:
    path = tmp_path / "report.json"
    words = [*flags, "--data", str(text), "--report", str(path), "--compare-steps", "2", "--steps", "2"]
    done = subprocess.run(command(*words), cwd=ROOT, capture_output=True, text=True, timeout=90, check=False)
    assert done.returncode == 0, done.stderr
    assert "largest difference in loss" in done.stdout
    assert ("exact sums make a step" in done.stdout) == ("--exact" in flags)
    assert json.loads(path.read_text())["configuration"]["layout"] == flags[1]


@pytest.mark.slow
def test_a_stage_that_dies_ends_the_job_and_the_others_say_in_which_action(text: Path, tmp_path: Path) -> None:
    waiting = (
        r"of micro-batch \d in stage [02] in step \d+, which waits for stage 1's \w+ of that micro-batch on rank 1"
    )
    for _ in range(5):
        found = errors_after_a_kill(text, tmp_path / "errors")
        assert "rank 1 of parallel was killed by SIGKILL" in found
        assert "PeerLost: rank 1" in found
        if re.search(waiting, found):
            return
        # It was killed between two steps, when nobody was in an action.
    pytest.fail(f"no survivor named an action: {found}")


def errors_after_a_kill(text: Path, path: Path) -> str:
    """What three stages say when the middle one is killed."""
    with path.open("w") as stream:
        launcher = subprocess.Popen(
            command("--layout", "pp3", "--steps", "1000000", "--data", str(text)), cwd=ROOT,
            stdout=subprocess.PIPE, stderr=stream, text=True,
        )  # fmt: skip
    try:
        assert launcher.stdout is not None
        assert any(line.startswith("step") for line in launcher.stdout)
        (killed,) = (pid for pid in children(launcher.pid) if b"COLLECTIVES_RANK=1\0" in environment(pid))
        os.kill(killed, signal.SIGKILL)
        began = time.monotonic()
        launcher.communicate(timeout=30)
        assert time.monotonic() - began < 10
    finally:
        launcher.kill()
    assert launcher.returncode == 128 + signal.SIGKILL
    return path.read_text()


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def environment(pid: int) -> bytes:
    return Path(f"/proc/{pid}/environ").read_bytes()


def test_an_error_in_a_stage_reaches_all_ranks_with_its_action(monkeypatch: pytest.MonkeyPatch) -> None:
    forward = Block.forward

    def failing(self: Block, x: Tensor, draws: object = None) -> Tensor:
        if self._number == 2 and counts.setdefault("calls", 0) == 2:
            raise ArithmeticError("planted")
        counts["calls"] = counts.get("calls", 0) + (self._number == 2)
        return forward(self, x, draws)

    counts: dict[str, int] = {}
    monkeypatch.setattr(Block, "forward", failing)

    def rank(world: Communicator) -> str:
        try:
            Trainer(configuration(pp=2, layers=3, micro_batches=3, stage_layers="2,1"), CORPUS, world).step()
        except (ArithmeticError, CommunicationError) as error:
            return str(error)
        return "nothing was raised"

    there, here = run_ranks(2, rank)
    assert here == "planted"
    assert "ArithmeticError: planted (in forward of micro-batch 2 in stage 1 in step 1)" in there


def test_what_is_not_as_planned_is_said() -> None:
    right = bubble.Conduct("0–1", 2, 2, 1.0, 1.0, 9.0, 0.2)
    assert bubble.differences([right]) == []
    wrong = bubble.Conduct("2", 3, 2, 2.0, 1.0, 9.0, 0.2)
    assert bubble.differences([right, wrong]) == [
        "rank 1 had 3 micro-batches in flight, the formula says 2",
        "the schedule leaves rank 1 idle for 2, but the formula says 1",
    ]
    assert "differs by +1" in bubble.conduct_table([wrong])


@pytest.mark.parametrize("name", ["gpipe", "1f1b", "interleaved", "zb-h1", "zb-v"])
def test_every_action_of_the_schedule_is_done_in_its_order(name: str) -> None:
    def rank(world: Communicator) -> None:
        trainer = Trainer(configuration(pp=2, layers=4, schedule=name, micro_batches=4), CORPUS, world)
        trainer.step()
        for row, planned in zip(
            bubble.last_actions(trainer), build(name, 2, 4, trainer.pipeline.schedule.chunks).rows, strict=True
        ):
            assert [action for action, _, _ in row] == list(planned)
            assert all(began <= ended for _, began, ended in row)
        kinds = {action.kind for action in trainer.pipeline.schedule.rows[0]}
        assert (Kind.WEIGHT_GRADIENT in kinds) == name.startswith("zb")
        assert np.isfinite(trainer.pipeline.history).all()

    run_ranks(2, rank)
