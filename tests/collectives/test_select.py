"""What a schedule costs by the model, what is chosen by it, and where the costs come from."""

import json
import warnings
from itertools import pairwise

import numpy as np
import pytest

import collectives as cc
from collectives.algorithms import find, registered
from collectives.costs import DEFAULTS, CostsError, LinkCosts, agree_on_costs, costs_file, load, save
from collectives.predict import predict
from collectives.select import LARGE_MESSAGE, MODELLED_RANKS, bytes_sent, choose, ranking
from collectives.spec import COLLECTIVES
from collectives.testing import run_ranks

SLICE = 512 * 1024
LATENCY = LinkCosts(0.0, 1.0, 0.0, 0.0, 0.0)
MESSAGES = LinkCosts(0.0, 0.0, 1.0, 0.0, 0.0)
BYTES = LinkCosts(0.0, 0.0, 0.0, 1.0, 0.0)
ENTRIES = registered()


def seconds(collective, name, size, costs, nbytes=1024, slice_bytes=SLICE):
    return predict(find(collective, name).schedule(size, 0), nbytes, costs, slice_bytes)


@pytest.mark.parametrize(
    ("collective", "name", "hops"),
    [
        ("all_reduce", "ring", 14), ("all_reduce", "one_hop", 1), ("all_reduce", "direct", 2),
        ("all_reduce", "recursive_doubling", 3), ("all_reduce", "halving_doubling", 6), ("all_gather", "bruck", 3),
        ("broadcast", "chain", 7), ("broadcast", "binomial", 3), ("all_to_all", "bruck", 3), ("scan", "chain", 7),
        ("reduce", "binomial", 3), ("gather", "binomial", 3), ("scatter", "binomial", 3),
    ],
)  # fmt: skip
def test_hops_of_eight_ranks(collective, name, hops):
    """With a latency alone, a schedule takes as long as its longest way has hops."""
    assert seconds(collective, name, 8, LATENCY) == hops


def test_messages_and_bytes_take_their_turn():
    assert seconds("all_reduce", "one_hop", 8, MESSAGES) == 7
    assert seconds("all_to_all", "pairwise", 8, MESSAGES) == 7
    assert seconds("all_reduce", "ring", 8, BYTES, 800) == pytest.approx(2 * 7 * 100)
    assert seconds("all_reduce", "halving_doubling", 8, BYTES, 800) == pytest.approx(2 * 7 * 100)
    assert seconds("all_reduce", "direct", 8, BYTES, 800) == pytest.approx(2 * 7 * 100)
    assert seconds("reduce", "direct", 8, BYTES, 800) == 7 * 800
    assert seconds("all_gather", "ring", 4, LinkCosts(3.0, 0.0, 0.0, 0.0, 0.0)) == 3


def test_a_chain_is_a_pipeline():
    """(p − 2 + slices) slices one after the other, as the docstring of the chain says."""
    assert seconds("broadcast", "chain", 8, BYTES, 1000, 1000) == 7 * 1000
    assert seconds("broadcast", "chain", 8, BYTES, 1000, 10) == pytest.approx(1000 + 6 * 10)


@pytest.mark.slow
@pytest.mark.parametrize("entry", ENTRIES, ids=lambda entry: f"{entry.collective}-{entry.name}")
def test_every_algorithm_has_a_price(entry):
    for size in (1, 2, 3, 8, 13):
        times = [predict(entry.schedule(size), nbytes, DEFAULTS["tcp"], SLICE) for nbytes in (0, 64, 1 << 20, 1 << 30)]
        assert all(a <= b for a, b in pairwise(times))
        assert np.isfinite(times).all()


def test_messages_that_are_large_send_the_fewest_bytes():
    for size in (*range(2, MODELLED_RANKS + 1), 100, 1024):
        for costs in (*DEFAULTS.values(), LATENCY, BYTES):
            name = choose("all_reduce", LARGE_MESSAGE, size, costs, SLICE, deterministic=False, even=True)
            sent = bytes_sent(find("all_reduce", name).schedule(size), size * 4096, 4)
            assert sent == (2 * (size - 1) * 4096,) * size


def test_what_is_chosen():
    def chosen(collective, nbytes, size, costs=DEFAULTS["tcp"], deterministic=False, even=True):
        return choose(collective, nbytes, size, costs, SLICE, deterministic=deterministic, even=even)

    assert chosen("all_reduce", 8, 8, LATENCY) == "one_hop"
    assert chosen("all_reduce", 8, 8, MESSAGES) == "recursive_doubling"
    assert chosen("broadcast", 1 << 28, 8) == "chain"
    assert chosen("all_to_all", 64, 16, MESSAGES) == "bruck"
    assert chosen("all_to_all", 64, 16, MESSAGES, even=False) != "bruck"
    for name, row in COLLECTIVES.items():
        if row.reduces:
            assert {chosen(name, n, 7, deterministic=True) for n in (0, 1000, 1 << 30)} <= {"one_hop", "direct"}


def test_choices_are_looked_up():
    ranking.cache_clear()
    for nbytes in range(4096, 8192, 100):
        choose("all_reduce", nbytes, 4, DEFAULTS["tcp"], SLICE, deterministic=False, even=True)
    assert ranking.cache_info().misses == 1


@pytest.mark.parametrize("count", [1, 5, 1000, 100_003])
@pytest.mark.parametrize("size", [1, 2, 3, 4, 7])
def test_explained_bytes_are_what_is_sent(size, count):
    def rank(comm):
        explained = comm.explain("all_reduce", count * 4)
        comm.all_reduce(np.ones(count, np.float32))
        assert comm.stats.bytes_sent == explained.bytes_sent[comm.rank]
        return explained

    explained = run_ranks(size, rank)
    assert len(set(explained)) == 1
    text = str(explained[0])
    assert text.startswith(f"all_reduce of {count * 4:,} bytes over {size} ranks by inproc: {explained[0].algorithm}, ")
    names = {explained[0].algorithm, *(c.name for c in explained[0].runners_up), *(n for n, _ in explained[0].left_out)}
    assert names == {entry.name for entry in registered("all_reduce")}
    assert all(name in text for name in names)


def test_explaining_says_what_is_wrong():
    with cc.init() as comm:
        with pytest.raises(ValueError, match="unknown collective 'reduce_all'"):
            comm.explain("reduce_all", 8)
        with pytest.raises(ValueError, match="root is 1"):
            comm.explain("reduce", 8, root=1)


def test_costs_are_kept(tmp_path):
    path = costs_file(tmp_path)
    assert load(path) == {}
    save(path, {"tcp": LATENCY})
    save(path, {"mpi": BYTES})
    assert load(path) == {"tcp": LATENCY, "mpi": BYTES}
    assert [file.name for file in path.parent.iterdir()] == ["tune.json"]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "cannot be read"),
        ("[]", "damaged"),
        ('{"version": 7}', "version is 7, expected 1"),
        ('{"version": 1}', "'transports' is missing"),
        ('{"version": 1, "transports": {"tcp": {"call": 1}}}', "'latency' is missing"),
        (json.dumps({"version": 1, "transports": {"tcp": dict.fromkeys(LinkCosts.__slots__, -1)}}), "call is -1"),
        (json.dumps({"version": 1, "transports": {"tcp": dict.fromkeys(LinkCosts.__slots__, "x")}}), "call is 'x'"),
    ],
)
def test_a_damaged_file_is_a_warning_and_the_defaults_serve(tmp_path, text, said):
    path = costs_file(tmp_path)
    path.parent.mkdir()
    path.write_text(text)
    with pytest.raises(CostsError, match=said):
        load(path)
    with pytest.warns(RuntimeWarning, match=f"{path}.*{said}.*python -m collectives tune"):
        assert agree_on_costs(tmp_path, "tcp", 0, lambda numbers: None) == DEFAULTS["tcp"]
    save(path, {"tcp": BYTES})
    assert load(path) == {"tcp": BYTES}


def test_rank_zero_knows_for_all(tmp_path):
    save(costs_file(tmp_path), {"inproc": BYTES})

    def rank(comm):
        cache = tmp_path if comm.rank == 0 else tmp_path / "other"
        return agree_on_costs(cache, "inproc", comm.rank, comm.broadcast)

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert run_ranks(3, rank) == [BYTES] * 3
