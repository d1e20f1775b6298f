"""What records keep for backward, in bytes, and the most of it at a time as a schedule of a pipeline makes it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from parallel.schedules import Action, Kind

if TYPE_CHECKING:
    from parallel.nn import Extent


@dataclass(frozen=True)
class Shape:
    """What a rank has of one sample, and of every layer.

    `within`: positions in layers that are cut, `between`: those between them; `heads`, `groups`, `inner` and `vocabulary`: of
    attention, keys and values, the hidden layer and the logits, this rank's; `head`: elements of a head; `item`: bytes of an
    element; `ring`: attention keeps a number for each row in place of its weights.
    """

    hidden: int
    head: int
    heads: int
    groups: int
    inner: int
    vocabulary: int
    within: int
    between: int
    item: int
    ring: bool = False

    @property
    def stream(self) -> int:
        """Bytes of what goes from layer to layer."""
        return self.between * self.hidden * self.item

    @property
    def attention(self) -> int:
        """Bytes that attention keeps: queries, keys and values, and weights."""
        seen = 1 if self.ring else self.within
        return self.within * ((self.heads + 2 * self.groups) * self.head + self.heads * seen) * self.item

    @property
    def layer(self) -> int:
        """Bytes that a layer keeps.

        The input of both normalisations, their means and deviations, and what they make; what attention keeps and its result; the
        hidden layer before and after GELU. On one rank that is 14·N·D + 2·N·K + 4·N + H·N·S elements for N tokens, with
        keys of width K, in place of Korthikanti's 34 bytes + 5·H·S/D (arXiv 2205.05198, section 4.1) for other tensors.
        """
        rows = 2 * self.between * (self.hidden + 2) + 2 * self.within * self.hidden
        cut = self.within * (self.heads * self.head + 2 * self.inner)
        return (rows + cut) * self.item + self.attention

    @property
    def logits(self) -> int:
        """Bytes of the gradient of the logits, which cross-entropy keeps."""
        return self.within * self.vocabulary * self.item

    @property
    def tail(self) -> int:
        """Bytes that the last normalisation, the output head and cross-entropy keep."""
        return (self.between * (self.hidden + 2) + self.within * self.hidden) * self.item + self.logits

    def tokens(self, samples: int) -> int:
        """Bytes that the embeddings keep of so many samples: whole numbers of 64 bits for tokens, and for positions."""
        return 8 * (samples * self.within + self.between)


def most_kept(
    row: Sequence[Action], extents: Sequence[Extent], samples: Sequence[int], shape: Shape, recompute: bool
) -> int:
    """Return the most bytes that are kept at once on a rank that does the actions of `row`.

    `extents`: of the rank's chunks; `samples`: of each micro-batch. Forward adds what it keeps, backward frees it. With
    recomputation a layer keeps its input, and while backward passes through it the rest as well. The half of backward for the
    inputs frees what attention and cross-entropy keep, and all else waits for the half of the weights.
    """
    kept: dict[tuple[int, int], int] = {}
    now = most = 0
    for action in row:
        key, extent, count = (action.chunk, action.micro_batch), extents[action.chunk], samples[action.micro_batch]
        layers, again = len(extent.layers), count * (shape.layer - shape.stream)
        if action.kind is Kind.FORWARD:
            layer = shape.stream if recompute else shape.layer
            kept[key] = count * layers * layer
            kept[key] += shape.tokens(count) if extent.first else 0
            kept[key] += count * shape.tail if extent.last else 0
            now += kept[key]
            most = max(most, now)
        elif action.kind is Kind.INPUT_GRADIENT:
            freed = count * shape.logits if extent.last else 0
            now, kept[key] = now - freed, kept[key] - freed
            for _ in range(layers):
                more = again if recompute else 0
                most = max(most, now + more)
                more -= count * shape.attention
                now, kept[key] = now + more, kept[key] + more
        elif action.kind is Kind.WEIGHT_GRADIENT:
            now -= kept.pop(key)
        else:
            if recompute and layers:
                most = max(most, now - (count * shape.tail if extent.last else 0) + again)
            now -= kept.pop(key)
    return most
