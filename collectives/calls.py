"""The fingerprint of a call: what a rank believes it is taking part in, as the 24 bytes that label its messages."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

from collectives.spec import COLLECTIVES
from kernels import ReduceOp, dtypes
from transports.base import LABEL_BYTES

_FORMAT: Final = struct.Struct("<BBBxIQII")
assert _FORMAT.size == LABEL_BYTES
_KINDS: Final = (*COLLECTIVES, "send/recv")
_OPS: Final = (None, *ReduceOp)


@dataclass(frozen=True, slots=True)
class Call:
    """One call as its caller made it; `blocks` are the element counts that all ranks must agree on, if uneven."""

    collective: str
    dtype: np.dtype[np.generic]
    count: int
    op: ReduceOp | None = None
    root: int = 0
    blocks: tuple[int, ...] = ()
    how: str = ""
    """Algorithm and slice size, which must agree for the messages to fit."""

    def label(self) -> bytes:
        """The fingerprint; equal on all ranks exactly if they made the same call (up to 32-bit checksums of blocks and how)."""
        return _FORMAT.pack(
            _KINDS.index(self.collective),
            dtypes.code(self.dtype),
            _OPS.index(self.op),
            self.root,
            self.count,
            _checksum_of_blocks(self.blocks),
            checksum(self.how),
        )

    def __str__(self) -> str:
        return describe(self.label())


def checksum(how: str) -> int:
    """What a label holds of a call's `how`."""
    return zlib.crc32(how.encode())


def _checksum_of_blocks(blocks: Sequence[int]) -> int:
    return zlib.crc32(struct.pack(f"<{len(blocks)}Q", *blocks)) if blocks else 0


def describe(label: bytes) -> str:
    """The call that a fingerprint stands for, in words."""
    kind, dtype, op, root, count, blocks, _ = _FORMAT.unpack(label)
    try:
        name, operation = _KINDS[kind], _OPS[op]
        text = f"{name}({dtypes.by_code(dtype)} × {count}"
    except (IndexError, ValueError):
        return f"an unknown call ({label.hex()}: another version of this library?)"
    if operation is not None:
        text += f", {operation.name}"
    if name in COLLECTIVES and COLLECTIVES[name].rooted:
        text += f", root {root}"
    if blocks:
        text += f", uneven blocks #{blocks:08x}"
    return text + ")"


def difference(ours: bytes, theirs: bytes) -> str:
    """Why two fingerprints that read the same still differ, or an empty string."""
    if describe(ours) != describe(theirs) or ours == theirs:
        return ""
    return (
        "; the calls agree, but not the algorithm or the slice size: set COLLECTIVES_SLICE_BYTES, "
        "init(algorithms=…) and init(deterministic=…) alike on all ranks"
    )
