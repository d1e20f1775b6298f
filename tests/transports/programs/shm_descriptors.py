"""A rank that looks at its own descriptors, at those of a forked child and of another program that it starts."""

import fcntl
import os
import subprocess
import sys
from pathlib import Path

import collectives as cc


def descriptors(process="self"):
    found = {}
    for path in Path(f"/proc/{process}/fd").iterdir():
        try:
            found[int(path.name)] = str(path.readlink())
        except OSError:  # the one that lists them
            continue
    return {number: name for number, name in found.items() if not name.startswith("/proc/")}


before = descriptors()
comm = cc.init("shm", timeout=30)
inner = comm.split(0)
array = inner.empty(1000)
ours = {number: name for number, name in descriptors().items() if number not in before}
assert sum("memfd:collectives" in name for name in ours.values()) == 1, ours
assert all(fcntl.fcntl(number, fcntl.F_GETFD) & fcntl.FD_CLOEXEC for number in ours), ours
child = os.fork()
if child == 0:
    os._exit(0 if descriptors() == before else 1)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0, "a forked child holds descriptors of its parent's job"
listing = [
    sys.executable,
    "-c",
    "import os; print(*[os.readlink(f'/proc/self/fd/{n}') for n in range(3, 60) if os.path.exists(f'/proc/self/fd/{n}')])",
]
told = subprocess.run(listing, close_fds=False, capture_output=True, text=True, check=True).stdout
assert not [name for name in ours.values() if name in told], told
array[:] = 1
assert inner.all_reduce(array)[0] == comm.size
comm.close()
left = {number: name for number, name in descriptors().items() if number not in before}
assert not left, left
print("descriptors as they should be")
