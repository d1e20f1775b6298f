"""The allocator of a rank's shared heap."""

import errno
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from transports.errors import TransportUnavailable
from transports.heap import PAGE, Mapping, SharedHeap

SIZE = 16 * PAGE


def room(size):
    """What a block of `size` bytes takes."""
    return max(128, -(-size // 128) * 128)


def descriptors():
    return {path.name for path in Path("/proc/self/fd").iterdir()}


def alignment(size):
    return PAGE if size >= PAGE else 128


def fits(used, size):
    """Whether there is a gap for `size` bytes between blocks {offset: room}."""
    start = 0
    for offset, length in [*sorted(used.items()), (SIZE, 0)]:
        if -(-start // alignment(size)) * alignment(size) + room(size) <= offset:
            return True
        start = offset + length
    return False


SIZES = st.one_of(st.integers(0, 1000), st.integers(PAGE - 2, PAGE + 2), st.integers(PAGE, SIZE + 1))


@given(st.lists(st.one_of(SIZES, st.floats(0, 1, exclude_max=True)), max_size=60))
def test_blocks_are_apart_aligned_and_whole(steps):
    """A number of bytes allocates a block; a fraction frees the one that lies there in the list of blocks."""
    heap = SharedHeap(SIZE)
    used, contents = {}, {}
    for number, step in enumerate(steps):
        if isinstance(step, float):
            if used:
                offset = sorted(used)[int(step * len(used))]
                assert bytes(heap.mapping.view(offset, len(contents[offset]))) == contents.pop(offset)
                del used[offset]
                heap.free(offset)
            continue
        try:
            offset = heap.allocate(step)
        except MemoryError as error:
            assert f"no {step} bytes in one piece" in str(error)
            assert not fits(used, step)
            continue
        assert offset % alignment(step) == 0
        assert 0 <= offset <= offset + room(step) <= SIZE
        assert all(offset + room(step) <= other or other + length <= offset for other, length in used.items())
        used[offset] = room(step)
        contents[offset] = bytes([number]) * step
        heap.mapping.view(offset, step)[:] = contents[offset]
    for offset, content in contents.items():
        assert bytes(heap.mapping.view(offset, len(content))) == content
        heap.free(offset)
    assert heap.allocate(SIZE) == 0  # what is free has become one piece again
    heap.close()


def test_an_exhausted_heap_stays_usable():
    heap = SharedHeap(SIZE)
    blocks = [heap.allocate(PAGE) for _ in range(SIZE // PAGE)]
    for size in (0, 1, PAGE, SIZE):
        with pytest.raises(MemoryError, match=f"has no {size} bytes in one piece left"):
            heap.allocate(size)
    heap.free(blocks[3])
    heap.free(blocks[5])
    with pytest.raises(MemoryError):
        heap.allocate(2 * PAGE)
    heap.free(blocks[4])
    assert heap.allocate(3 * PAGE) == blocks[3]
    heap.close()


@pytest.mark.parametrize(("number", "said"), [(errno.ENOSPC, "there is no memory left"), (errno.EIO, "Input/output")])
def test_memory_that_cannot_be_reserved_is_an_error_and_no_loss(monkeypatch, number, said):
    def fail(*_):
        raise OSError(number, os.strerror(number))

    heap = SharedHeap(SIZE)
    first = heap.allocate(100)
    with monkeypatch.context() as without_memory:
        without_memory.setattr(os, "posix_fallocate", fail)
        for _ in range(3):
            with pytest.raises(MemoryError, match=f"{2 * PAGE} bytes of shared memory cannot be reserved: {said}"):
                heap.allocate(2 * PAGE)
        second = heap.allocate(100)  # on the page that is reserved already
        assert second == first + 128
    assert heap.allocate(2 * PAGE) == PAGE
    for offset in (first, second, PAGE):
        heap.free(offset)
    assert heap.allocate(SIZE) == 0
    heap.close()


def test_memory_is_taken_only_as_blocks_are_allocated():
    heap = SharedHeap(1 << 40)
    assert os.fstat(heap.descriptor).st_blocks == 0
    heap.allocate(10 * PAGE)
    assert 10 * PAGE <= os.fstat(heap.descriptor).st_blocks * 512 <= 4 << 20  # a huge page at most
    heap.close()
    heap.close()
    heap.mapping.view(0, 1)[0] = 1  # the mapping outlives the descriptor


def test_a_machine_without_memfd_says_so(monkeypatch):
    monkeypatch.delattr(os, "memfd_create")
    with pytest.raises(TransportUnavailable, match="shared memory needs memfd_create"):
        SharedHeap(SIZE)


def test_addresses_that_cannot_be_had_leave_no_descriptor():
    before = descriptors()
    with pytest.raises(TransportUnavailable, match="MiB of addresses for shared memory cannot be had: .*; see ulimit"):
        SharedHeap(1 << 62)
    assert descriptors() == before


def addresses():
    return [line for line in Path("/proc/self/maps").read_text().splitlines() if "memfd:collectives" in line]


def test_a_mapping_lives_as_long_as_something_in_it_is_used():
    others = addresses()
    heap = SharedHeap(SIZE)
    offset = heap.allocate(100)
    other = Mapping(heap.descriptor, SIZE)
    view = heap.mapping.view(offset, 100)
    view[:3] = b"abc"
    heap.close()
    assert len(addresses()) == len(others) + 2
    del heap
    assert bytes(view[:3]) == bytes(other.view(offset, 3)) == b"abc"
    del view
    assert len(addresses()) == len(others) + 1
    del other
    assert addresses() == others
