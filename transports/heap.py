"""A rank's shared heap: memory that the other ranks of the host have mapped too.

The memory has no name anywhere: it is a memfd, which ends with the last process that holds it. Its room is reserved by
fallocate before it is handed out, so that a lack of memory is an error here and never a SIGBUS later.
"""

from __future__ import annotations

import bisect
import ctypes
import errno
import mmap
import os
import threading
import weakref
from collections import deque
from typing import Final

from transports.errors import TransportUnavailable

PAGE: Final = mmap.PAGESIZE
_ALIGNMENT: Final = 128
_MAP_NORESERVE: Final = 0x4000
_FAILED: Final = ctypes.c_void_p(-1).value
_LIBRARY: Final = ctypes.CDLL(None, use_errno=True)
_LIBRARY.mmap.restype = ctypes.c_void_p
_LIBRARY.mmap.argtypes = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long
_LIBRARY.munmap.argtypes = ctypes.c_void_p, ctypes.c_size_t


class Mapping:
    """A memfd mapped into this process; it lives until the last reference to it is gone.

    Not by the module mmap, whose objects keep a descriptor each, which a forked child would hold too.
    """

    def __init__(self, descriptor: int, size: int) -> None:
        self.size = size
        flags, access = mmap.MAP_SHARED | _MAP_NORESERVE, mmap.PROT_READ | mmap.PROT_WRITE
        address = _LIBRARY.mmap(None, size, access, flags, descriptor, 0)
        if address == _FAILED:
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number))
        self.address: int = address
        self.memory = (ctypes.c_char * size).from_address(address)
        # Not at exit: threads of the native engine may still run then.
        weakref.finalize(self.memory, _LIBRARY.munmap, address, size).atexit = False

    def view(self, offset: int, size: int) -> memoryview:
        """The bytes from `offset` on."""
        return memoryview(self.memory).cast("B")[offset : offset + size]


class SharedHeap:
    """This rank's heap: `size` bytes of addresses, of which memory is taken only as blocks are allocated."""

    def __init__(self, size: int) -> None:
        try:
            self.descriptor = os.memfd_create("collectives", os.MFD_CLOEXEC)
        except (AttributeError, OSError) as error:
            raise TransportUnavailable(f"shared memory needs memfd_create, which Linux has: {error}") from None
        try:
            os.ftruncate(self.descriptor, size)
            self.mapping = Mapping(self.descriptor, size)
        except OSError as error:
            os.close(self.descriptor)
            raise TransportUnavailable(
                f"{size >> 20} MiB of addresses for shared memory cannot be had: {error.strerror}; see ulimit -v and -f"
            ) from None
        self._reserved = 0
        self._lock = threading.Lock()
        self._returned: deque[int] = deque()
        self._free: list[tuple[int, int]] = [(0, size)]
        self._used: dict[int, int] = {}

    def allocate(self, size: int) -> int:
        """Reserve `size` bytes and return their offset, a multiple of 128 (from 4 KiB on, of a page).

        Raises MemoryError with what is missing.
        """
        alignment = PAGE if size >= PAGE else _ALIGNMENT
        room = max(_ALIGNMENT, -(-size // _ALIGNMENT) * _ALIGNMENT)
        with self._lock:
            while self._returned:
                self._put_back(self._returned.popleft())
            for index, (start, end) in enumerate(self._free):
                offset = -(-start // alignment) * alignment
                if offset + room > end:
                    continue
                self._reserve(offset + room, size)
                self._free[index : index + 1] = [
                    part for part in ((start, offset), (offset + room, end)) if part[0] < part[1]
                ]
                self._used[offset] = room
                return offset
        raise MemoryError(f"the shared heap of {self.mapping.size >> 20} MiB has no {size} bytes in one piece left")

    def free(self, offset: int) -> None:
        """Give a block back; its memory stays with the heap, for the next one.

        Takes no lock: the garbage collector may call this at any time, also in the middle of `allocate`.
        """
        self._returned.append(offset)

    def _put_back(self, offset: int) -> None:
        start, end = offset, offset + self._used.pop(offset)
        index = bisect.bisect(self._free, (start, end))
        if index < len(self._free) and self._free[index][0] == end:
            end = self._free.pop(index)[1]
        if index > 0 and self._free[index - 1][1] == start:
            index -= 1
            start = self._free.pop(index)[0]
        self._free.insert(index, (start, end))

    def _reserve(self, end: int, size: int) -> None:
        end = min(-(-end // PAGE) * PAGE, self.mapping.size)
        if end <= self._reserved:
            return
        try:
            os.posix_fallocate(self.descriptor, self._reserved, end - self._reserved)
        except OSError as error:
            reason = "there is no memory left" if error.errno == errno.ENOSPC else error.strerror
            raise MemoryError(f"{size} bytes of shared memory cannot be reserved: {reason}") from None
        self._reserved = end

    def close(self) -> None:
        """Close the descriptor; the mapping lives on while something in it is used."""
        if self.descriptor >= 0:
            os.close(self.descriptor)
            self.descriptor = -1


def default_size() -> int:
    """The addresses that a heap spans: as much as the machine has memory."""
    return os.sysconf("SC_PHYS_PAGES") * PAGE
