"""What is kept of a benchmark beside its table: the machine, the notes, and everything as JSON."""

from __future__ import annotations

import argparse
import json
import os
import platform
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any


class Notes:
    """Prints each note once, and keeps it."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def __call__(self, note: str) -> None:
        """Print it, unless that was done."""
        if note not in self.lines:
            self.lines.append(note)
            print(f"# {note}", flush=True)

    def machine(self) -> None:
        """Say what the numbers are measured on, and whether it was quiet."""
        about = machine()
        self(f"{about['processor']}, {about['cores']} cores; load {os.getloadavg()[0]:.1f} at the start")


def machine() -> dict[str, str | int]:
    """What the numbers were measured on."""
    model = platform.machine()
    for text in Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else ():
        if text.startswith("model name"):
            model = text.partition(":")[2].strip()
            break
    return {"processor": model, "cores": len(os.sched_getaffinity(0)), "python": platform.python_version()}


def write(arguments: argparse.Namespace, notes: Notes, rows: Sequence[Any]) -> None:
    """Write everything to the file of `--json`, if there is one; the rows are dataclasses."""
    if arguments.json:
        record = {
            "machine": machine(),
            "arguments": vars(arguments),
            "notes": notes.lines,
            "rows": [asdict(row) for row in rows],
        }
        Path(arguments.json).write_text(json.dumps(record, indent=1) + "\n")
