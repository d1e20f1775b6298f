"""Saves a tensor as shards of column slices in the background, or loads its rows and checks them."""

import sys

import numpy as np

import collectives as cc
from parallel.checkpoint import Piece, Saver, load
from parallel.formulas import share

task, directory = sys.argv[1:]
communicator = cc.init()
whole = np.arange(60 * 50, dtype=np.float32).reshape(60, 50)
if task == "save":
    columns = share(50, communicator.size, communicator.rank)
    with Saver(directory, communicator, keep=2) as saver:
        for step in (1, 2, 3):
            values = (whole[:, columns.start : columns.stop] + step).ravel()
            half = values.size // 2
            box = ((60, 50), (0, columns.start), (60, len(columns)))
            saver.start([Piece("w", *box, 0, values[:half]), Piece("w", *box, half, values[half:])], step, step)
            values.fill(np.nan)
else:
    rows = share(60, communicator.size, communicator.rank)
    found = np.zeros((len(rows), 50), np.float64)
    piece = Piece("w", (60, 50), (rows.start, 0), found.shape, 0, found.reshape(-1))
    assert load(directory, communicator, [piece]) == 3
    np.testing.assert_array_equal(found, whole[rows.start : rows.stop] + 3)
communicator.close()
