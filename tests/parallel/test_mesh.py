"""The mesh: which rank is where, and which communicators it gets."""

from __future__ import annotations

import math
import platform
import threading

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from collectives import Communicator
from collectives.testing import run_ranks
from parallel.mesh import AXES, Mesh, MeshError, layout_name, parse_layout


def test_layouts_name_axes_in_any_order() -> None:
    assert parse_layout("dp4") == {"dp": 4, "pp": 1, "cp": 1, "tp": 1}
    assert parse_layout("tp2, pp3 ,dp4") == {"dp": 4, "pp": 3, "cp": 1, "tp": 2}
    assert layout_name(parse_layout("tp2,pp3,dp1")) == "pp3,tp2"
    assert layout_name(parse_layout("dp1")) == "dp1"


@pytest.mark.parametrize("text", ["dp0", "dp", "4", "xp2", "dp4,", "", "dp-1", "dp2;tp2", "DP2"])
def test_what_is_no_layout_is_refused(text: str) -> None:
    with pytest.raises(MeshError, match="is not known: expected axes among dp, pp, cp, tp, .* such as dp2,tp2,pp2"):
        parse_layout(text)


def test_an_axis_that_comes_twice_is_refused() -> None:
    with pytest.raises(MeshError, match="'dp2,tp2,dp2' gives dp twice"):
        parse_layout("dp2,tp2,dp2")


@given(st.lists(st.integers(1, 4), min_size=4, max_size=4))
def test_names_can_be_read_back(sizes: list[int]) -> None:
    layout = dict(zip(AXES, sizes, strict=True))
    assert parse_layout(layout_name(layout)) == layout


def world_ranks(communicator: Communicator, rank: int) -> list[int]:
    return [int(n) for n in communicator.all_gather(np.array([rank])).ravel()]


@pytest.mark.parametrize(
    "sizes", [{"dp": 2, "pp": 2, "tp": 2}, {"cp": 3, "tp": 2}, {"pp": 4}, {"dp": 2, "cp": 2, "pp": 2}]
)
def test_every_axis_is_a_communicator_of_ranks_that_differ_along_it(sizes: dict[str, int]) -> None:
    def rank(world: Communicator) -> dict[str, int]:
        mesh = Mesh(world, **sizes)
        for axis in AXES:
            communicator = getattr(mesh, axis)
            assert communicator.size == sizes.get(axis, 1)
            assert communicator.rank == mesh.coordinates[axis]
            along = mesh.along(axis, world.rank)
            assert along[mesh.coordinates[axis]] == world.rank
            assert along == world_ranks(communicator, world.rank)
            assert [mesh.place(rank)[axis] for rank in along] == list(range(communicator.size))
        data = mesh.axis("dp", "cp")
        assert data.size == sizes.get("dp", 1) * sizes.get("cp", 1)
        return mesh.coordinates

    found = run_ranks(math.prod(sizes.values()), rank)
    shape = [sizes.get(axis, 1) for axis in AXES]
    for number, coordinates in enumerate(found):  # tp innermost, dp outermost
        place = 0
        for size, axis in zip(shape, AXES, strict=True):
            place = place * size + coordinates[axis]
        assert place == number


def test_a_layout_for_other_ranks_says_what_would_fit() -> None:
    def rank(world: Communicator) -> None:
        with pytest.raises(MeshError, match="dp2,tp2 is for 4 ranks, but there are 6: dp3 would fit"):
            Mesh(world, dp=2, tp=2)
        with pytest.raises(MeshError, match="pp4 is for 4 ranks, but there are 6, which 4 does not divide"):
            Mesh(world, pp=4)
        with pytest.raises(MeshError, match="axis tp has 0 ranks; expected at least 1"):
            Mesh(world, tp=0)

    run_ranks(6, rank)


def test_neighbours_along_tp_share_a_host_however_ranks_are_numbered(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ranks 0 and 2 on one host, 1 and 3 on another, as a launcher places them that goes round the hosts."""
    names: dict[int, str] = {}

    def rank(world: Communicator) -> tuple[dict[str, int], str]:
        names[threading.get_ident()] = f"host {world.rank % 2}"
        world.barrier()
        mesh = Mesh(world, dp=2, tp=2)
        return mesh.coordinates, mesh.describe()

    monkeypatch.setattr(platform, "node", lambda: names[threading.get_ident()])
    found = run_ranks(4, rank)
    assert [(c["dp"], c["tp"]) for c, _ in found] == [(0, 0), (1, 0), (0, 1), (1, 1)]
    assert found[0][1].splitlines() == [
        "rank 0  host 0  dp 0 tp 0",
        "rank 1  host 1  dp 1 tp 0",
        "rank 2  host 0  dp 0 tp 1",
        "rank 3  host 1  dp 1 tp 1",
        "dp: 2 ranks, across hosts",
        "tp: 2 ranks, within a host",
    ]
