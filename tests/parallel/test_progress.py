"""What a training shows on a terminal and elsewhere."""

from __future__ import annotations

import io

import pytest

from parallel import progress
from parallel.train import Step


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


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
    terminal = Terminal()
    monkeypatch.setattr("sys.stdout", terminal)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "140")
    show(3)
    assert "step 3/3" in terminal.getvalue()
    assert "20% in communication" in terminal.getvalue()


def test_a_terminal_without_rich_gets_plain_lines(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    terminal = Terminal()
    monkeypatch.setattr("sys.stdout", terminal)
    monkeypatch.setitem(__import__("sys").modules, "rich", None)
    show(2)
    assert terminal.getvalue().count("\n") == 2
    assert "\x1b" not in terminal.getvalue()
