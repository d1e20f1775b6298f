"""Seeing a process of this host end, whoever else still holds its sockets: a child that it forked may."""

from __future__ import annotations

import os
from pathlib import Path


def birth_of(process: int) -> str:
    """The kernel, the namespace of process numbers and the start time: the same number there and then is the same process.

    Empty where /proc does not tell.
    """
    try:
        kernel = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        namespace = Path("/proc/self/ns/pid").readlink()
        started = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        return ""
    return f"{kernel} {namespace} {started}"


def watch(process: int, birth: str) -> int | None:
    """A descriptor that becomes readable when the process ends; None for one that cannot be seen from here."""
    if not birth or not hasattr(os, "pidfd_open"):
        return None
    try:
        descriptor = os.pidfd_open(process)
    except OSError:
        return None
    if birth_of(process) != birth:  # asked while the descriptor is held, so that the number means one process
        os.close(descriptor)
        return None
    return descriptor
