"""Collectives that are planned once and called many times; over shared memory see programs/random_collectives.py."""

import numpy as np
import pytest

import collectives as cc
from collectives.testing import run_ranks


def test_plans_give_the_same_results_every_time():
    def rank(comm):
        x = np.arange(12.0) + comm.rank
        plan, total = comm.plan_all_reduce(x), comm.all_reduce(np.arange(12.0) + comm.rank)
        assert plan() is x
        assert np.array_equal(x, total)
        x[:] = 1
        plan.start()
        assert np.array_equal(plan.wait(), np.full(12, comm.size))
        gather = comm.plan_all_gather(np.full(3, comm.rank))
        assert gather() is gather()
        assert np.array_equal(gather(), [[r] * 3 for r in range(comm.size)])
        blocks = np.arange(comm.size * 2) + comm.rank
        scatter = comm.plan_reduce_scatter(blocks, op=cc.ReduceOp.MAX)
        assert np.array_equal(scatter(), np.arange(2) + 2 * comm.rank + comm.size - 1)
        assert np.array_equal(comm.plan_all_to_all(blocks)()[::2], 2 * comm.rank + np.arange(comm.size))
        y = np.full(5, comm.rank)
        assert np.array_equal(comm.plan_broadcast(y, 1)(), np.ones(5))

    run_ranks(3, rank)


def test_strided_arrays_and_premultiplied_sums_are_read_anew():
    def rank(comm):
        wide = np.zeros((4, 6))
        x = wide[:, ::2]
        plan = comm.plan_all_reduce(x, cc.ReduceOp.premultiplied_sum(0.5))
        for value in (2, 6):
            x[:] = value
            plan()
            assert (x == value / 2 * comm.size).all()
        assert (wide[:, 1::2] == 0).all()

    run_ranks(2, rank)


def test_misuse_of_plans():
    def rank(comm):
        with pytest.raises(TypeError, match="BAND does not reduce"):
            comm.plan_all_reduce(np.ones(2), cc.ReduceOp.BAND)()
        plan = comm.plan_all_reduce(np.ones(2))
        with pytest.raises(RuntimeError, match="never started"):
            plan.wait()
        if comm.rank == 0:
            plan.start()
            with pytest.raises(RuntimeError, match="still under way"):
                plan.start()
            comm.send(np.ones(1), 1)
            plan.wait()
        else:
            comm.recv(np.ones(1), 0)
            plan()

    run_ranks(2, rank)
