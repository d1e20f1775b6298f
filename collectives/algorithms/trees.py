"""Trees over ranks: the binomial tree, and the pair of binary trees in which no rank has children twice."""

from __future__ import annotations

from dataclasses import dataclass

from collectives.schedule import Buffer, Ref


@dataclass(frozen=True)
class Binomial:
    """The binomial tree of `size` ranks: the rank at position q from the root answers for positions q to q + blocks − 1."""

    size: int
    root: int

    def position(self, rank: int) -> int:
        """How many places after the root the rank comes."""
        return (rank - self.root) % self.size

    def blocks(self, rank: int) -> int:
        """How many ranks the tree below and including this one has."""
        position = self.position(rank)
        return min(position & -position, self.size - position) if position else self.size

    def parent(self, rank: int) -> int:
        """The rank one step nearer to the root."""
        position = self.position(rank)
        return (rank - (position & -position)) % self.size

    def children(self, rank: int) -> list[tuple[int, int]]:
        """(distance, rank) of the children, nearest first."""
        distances = (1 << bit for bit in range((self.blocks(rank) - 1).bit_length()))
        return [(distance, (rank + distance) % self.size) for distance in distances]

    def placed(self, buffer: Buffer, rank: int) -> list[Ref]:
        """Where the blocks that a rank answers for lie in a buffer in rank order: one range, or two where it wraps round."""
        count = self.blocks(rank)
        if rank + count <= self.size:
            return [Ref(buffer, rank, count)]
        return [Ref(buffer, rank, self.size - rank), Ref(buffer, 0, rank + count - self.size)]


def two_trees(size: int) -> list[list[int | None]]:
    """The parent of every rank in two binary trees of depth ⌈log₂ p⌉, None for the roots.

    In the first the odd ranks are leaves; the second is its mirror image or, for an odd size, the first moved by one place,
    so that (but for one rank at an odd size) nobody has children in both (Sanders, Speck and Träff, 2009).
    """

    def parent(rank: int) -> int | None:
        bit = rank & -rank
        if rank == 0:
            return None
        above = (rank ^ bit) | bit << 1
        return above if above < size else rank ^ bit

    first = [parent(rank) for rank in range(size)]
    if size % 2 == 0:
        mirrored = first[::-1]
        return [first, [None if up is None else size - 1 - up for up in mirrored]]
    moved = [first[(rank - 1) % size] for rank in range(size)]
    return [first, [None if up is None else (up + 1) % size for up in moved]]
