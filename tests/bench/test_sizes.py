"""Which sizes are measured, and how often."""

import pytest

from bench.harness import sizes


def test_sizes_are_read_and_written_alike():
    assert sizes.parse("8, 1K,64k,1M,2G,4036") == [8, 1024, 65536, 1 << 20, 2 << 30, 4036]
    assert ",".join(map(sizes.label, sizes.parse(sizes.DEFAULT))) == sizes.DEFAULT
    assert [sizes.label(size) for size in sizes.ODD] == ["4036", "262148", "4000012"]


@pytest.mark.parametrize("text", ["", "0", "8,", "K", "1.5M", "-8", "8T"])
def test_what_is_not_a_size_is_named(text):
    with pytest.raises(ValueError, match="is not a size"):
        sizes.parse(text)


def test_odd_sizes_are_odd():
    assert all(size % 4 == 0 and size % 4096 and size & (size - 1) for size in sizes.ODD)


def test_a_measurement_lasts_about_ten_milliseconds():
    assert [sizes.repeats(seconds) for seconds in (0.0, 1e-6, 1e-4, 0.004, 0.3)] == [1000, 1000, 100, 2, 1]


def test_larger_sizes_have_fewer_iterations():
    numbers = [sizes.iterations(size) for size in sizes.parse(sizes.DEFAULT)]
    assert numbers == sorted(numbers, reverse=True)
    assert min(numbers) >= 3
