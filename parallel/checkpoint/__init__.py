"""Sharded checkpoints that know nothing of how a training is laid out.

    save("checkpoints", communicator, [Piece.whole("weight", weight)], {"seed": 1}, step=100)
    metadata = load("checkpoints", communicator, [Piece.whole("weight", weight)])

Each rank saves its pieces of global tensors into a file of its own, and any number of ranks loads any other
pieces of them. See `save`, `Saver` for the background, `load`, and `folder` for what lies on the disk.
"""

from parallel.checkpoint.agreement import CheckpointError
from parallel.checkpoint.folder import latest, steps
from parallel.checkpoint.loading import export, load, read_metadata
from parallel.checkpoint.pieces import Piece
from parallel.checkpoint.saving import Saver, save

__all__ = ["CheckpointError", "Piece", "Saver", "export", "latest", "load", "read_metadata", "save", "steps"]
