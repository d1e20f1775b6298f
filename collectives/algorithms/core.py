"""The core of a group: the largest power of two of its ranks, among which partners are found by flipping a bit.

Of the p ranks, the first 2·(p − q) form pairs, q being that power of two: the even one of a pair is the guest, the odd one
the host that works for both. All others work for themselves. Members of the core are numbered 0 to q − 1 in the order of
their ranks, so that neighbouring members answer for neighbouring ranks (Thakur, Rabenseifner and Gropp, 2005).
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Core:
    """The core of `size` ranks."""

    size: int

    @property
    def members(self) -> int:
        """The largest power of two up to `size`."""
        return 1 << (self.size.bit_length() - 1)

    @property
    def pairs(self) -> int:
        """How many pairs of guest and host there are."""
        return self.size - self.members

    def is_guest(self, rank: int) -> bool:
        """Whether rank + 1 works for this rank."""
        return rank < 2 * self.pairs and rank % 2 == 0

    def is_host(self, rank: int) -> bool:
        """Whether this rank works for rank − 1 as well."""
        return rank < 2 * self.pairs and rank % 2 == 1

    def member(self, rank: int) -> int:
        """The number in the core of a rank that is no guest."""
        return rank // 2 if rank < 2 * self.pairs else rank - self.pairs

    def rank(self, member: int) -> int:
        """The rank of a member."""
        return 2 * member + 1 if member < self.pairs else member + self.pairs

    def first(self, member: int) -> int:
        """The first rank that the member answers for; those of members a to b are first(a) to first(b), that excluded."""
        return 2 * member if member < self.pairs else member + self.pairs
