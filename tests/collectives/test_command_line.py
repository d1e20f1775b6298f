"""`python -m collectives list | show | verify`, as a user meets them."""

import os
import signal
import subprocess
import sys

import pytest

from collectives.__main__ import main


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("show broadcast -n 3 --root 7", "--root is 7; expected a rank, 0 to 2"),
        ("show all_reduce -n 3 --root -1", "--root is -1; expected a rank, 0 to 2"),
        ("show reduce no_such_algorithm", "reduce has no algorithm 'no_such_algorithm'"),
        ("show no_such_collective", "unknown collective 'no_such_collective'"),
        ("verify no_such_collective", "invalid choice: 'no_such_collective'"),
    ],
)
def test_a_wrong_request_is_one_line(monkeypatch, capsys, arguments, said):
    monkeypatch.setattr("sys.argv", ["collectives", *arguments.split()])
    with pytest.raises(SystemExit) as refusal:
        main()
    assert refusal.value.code == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    (line,) = captured.err.splitlines()
    assert said in line


@pytest.mark.slow
@pytest.mark.parametrize("arguments", ["list", "show all_reduce -n 9", "verify barrier -n 2"])
def test_a_reader_that_leaves_is_no_error(arguments):
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "collectives", *arguments.split()]
    done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True, timeout=60, check=False)
    os.close(writer)
    assert (done.returncode, done.stderr) == (128 + signal.SIGPIPE, "")
