"""`python -m collectives tune` on real ranks, and that the next job goes by what it found."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from collectives.costs import LinkCosts, costs_file, load, save

ROOT = Path(__file__).parents[2]
EXPLAIN = "import collectives as cc; comm = cc.init(); print(comm.explain('all_reduce', 64).costs)"


def run(cache, *arguments):
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("COLLECTIVES_", "OMPI_", "PMIX_", "PMI_"))}
    return subprocess.run(
        [sys.executable, "-m", "collectives", *arguments],
        env=kept | {"PYTHONPATH": str(ROOT), "XDG_CACHE_HOME": str(cache)},
        capture_output=True, text=True, timeout=100, stdin=subprocess.DEVNULL,
    )  # fmt: skip


@pytest.mark.slow
def test_tuning_measures_and_keeps(tmp_path):
    done = run(tmp_path, "tune")
    assert done.returncode == 0, done.stderr
    found = load(costs_file(tmp_path))
    for name in ("tcp", "shm"):
        costs = found[name]
        assert f"{name}: {costs}" in done.stdout
        assert 1e-8 < costs.call + costs.message < 0.1
        assert 1e-12 < costs.byte < 1e-6
        assert 1e-12 < costs.reduced_byte < 1e-7
    assert found["shm"].call < found["tcp"].call


@pytest.mark.slow
@pytest.mark.parametrize("transport", ["tcp", "shm"])
def test_a_job_goes_by_the_file_of_rank_zero(tmp_path, transport):
    program = tmp_path / "program.py"
    program.write_text(EXPLAIN)
    costs = LinkCosts(1e-3, 2e-3, 3e-3, 4e-9, 5e-9)
    save(costs_file(tmp_path), {transport: costs})
    done = run(tmp_path, "run", "-n", "2", "--env", f"COLLECTIVES_TRANSPORT={transport}", str(program))
    assert sorted(done.stdout.splitlines()) == [f"[{rank}] {costs}" for rank in range(2)], done.stderr
    costs_file(tmp_path).write_text("{")
    done = run(tmp_path, "run", "-n", "2", "--env", f"COLLECTIVES_TRANSPORT={transport}", str(program))
    assert done.returncode == 0
    assert done.stderr.count("the built-in costs serve until then") == 1
