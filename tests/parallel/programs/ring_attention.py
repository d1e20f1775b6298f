"""Attends in the ring of all ranks, with messages large enough to be read in place, and compares with one rank."""

import numpy as np

import collectives as cc
from parallel.autograd import Tensor, attention, vjps

HEADS, GROUPS, SEQUENCE = 4, 2, 601
communicator = cc.init()
rng = np.random.default_rng(0)
mine = attention.positions(SEQUENCE, communicator.size, communicator.rank)
for _ in range(3):
    packed, g = rng.standard_normal((2, SEQUENCE, 8 * 16)), rng.standard_normal((2, SEQUENCE, HEADS * 16))
    whole, part = (Tensor(array, requires_gradient=True) for array in (packed, packed[:, mine]))
    expected = vjps.causal_attention(whole, heads=HEADS, groups=GROUPS)
    expected.backward(g)
    found = vjps.ring_attention(part, heads=HEADS, groups=GROUPS, axis=communicator, sequence=SEQUENCE)
    found.backward(g[:, mine])
    np.testing.assert_allclose(found.data, expected.data[:, mine], rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(part.gradient, whole.gradient[:, mine], rtol=1e-12, atol=1e-11)
communicator.close()
