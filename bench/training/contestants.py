"""Who trains: this library in each of its modes, and PyTorch in each of its own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from bench.harness import contestants as harness
from bench.training import ours
from bench.training.learner import Contestant

ALONE: Final = ("alone", "torch")
"""Those that train on one rank, whatever number of ranks the others have; they take part in every layout."""
_PAIRS: Final = {name: (name, f"torch-{name}") for name in ("tp", "gpipe", "1f1b", "interleaved")}
LAYOUTS: Final = {
    "dp": ("zero0", "zero1", "zero2", "zero3", "ddp", "fsdp2"),
    **_PAIRS,
    "exact": ("zero0", "dp-exact", "tp", "tp-exact"),
}
"""Layout -> those that are compared in it, by turns."""
TORCH: Final = ("torch", "ddp", "fsdp2", *(theirs for _, theirs in _PAIRS.values()))
RIVALS: Final = {
    **dict.fromkeys(ALONE, "torch"),
    **dict.fromkeys(LAYOUTS["dp"], "ddp"),
    **{name: pair[1] for pair in _PAIRS.values() for name in pair},
    "dp-exact": "zero0",
    "tp-exact": "tp",
}
"""Contestant -> the one that its time and memory are compared with."""


def names() -> list[str]:
    """Every contestant, ours first."""
    return ["alone", *ours.MODES, *TORCH]


def groups(layouts: Sequence[str], wanted: Sequence[str]) -> dict[str, list[str]]:
    """Layout -> who takes turns in it: of its members those that are wanted, or all where none is named.

    Without a layout those that are wanted take turns together, whichever they are; and without both those of `dp`.
    """
    if wanted and not layouts:
        return {"": list(wanted)}
    members = {layout: ("alone", *LAYOUTS[layout], "torch") for layout in layouts or ["dp"]}
    return {layout: [name for name in those if not wanted or name in wanted] for layout, those in members.items()}


def join(name: str, store: str) -> Contestant:
    """Join the other ranks of the job; raises Unavailable with the reason where that cannot be.

    `store` is a path in a folder that they share, for Gloo.
    """
    if name not in TORCH:
        return ours.join(name)
    joined = harness.join("gloo", store, crowded=False)
    from bench.training import torch_modes  # torch is here, as it joined

    return Contestant(joined.description, joined.barrier, torch_modes.BUILD[name])
