"""What a training shows on a terminal and elsewhere."""

from __future__ import annotations

import contextlib
import os
import pty
import sys
import termios

import pytest

from parallel import progress
from parallel.train import Step


def show_on_terminal(steps: int, columns: int) -> str:
    """What `show` writes to a terminal of that width."""
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (24, columns))
    with os.fdopen(theirs, "w") as terminal, contextlib.redirect_stdout(terminal):
        show(steps)
    written = b""
    with os.fdopen(ours, "rb", buffering=0) as reader, contextlib.suppress(OSError):  # EIO: all has been read
        while data := reader.read(1 << 16):
            written += data
    return written.decode()


def show(steps: int) -> None:
    with progress.start(steps, tokens=100) as shown:
        for number in range(steps):
            shown.update(Step(loss=float(number), seconds=0.5, communication_seconds=0.1))


def test_plain_lines_hold_no_control_characters(capsys: pytest.CaptureFixture[str]) -> None:
    show(40)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 21
    assert all(line.isprintable() for line in lines)
    assert lines[0].startswith("step  1/40  loss 0.0000       200 tokens/s   20% in communication")
    assert lines[-1].startswith("step 40/40  loss 39.0000")


def test_a_terminal_gets_one_live_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "140")
    written = show_on_terminal(3, 140)
    assert "step 3/3" in written
    assert "20% in communication" in written
    assert "\x1b" in written


def test_a_terminal_without_rich_gets_plain_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "rich", None)
    written = show_on_terminal(2, 140)
    assert written.count("\n") == 2
    assert "\x1b" not in written


def test_a_terminal_of_no_size_as_under_mpirun_gets_plain_lines() -> None:
    assert "\x1b" not in show_on_terminal(2, 0)
