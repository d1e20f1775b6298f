"""ZB-V, a zero-bubble schedule whose stages go down the ranks and up again."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator

from parallel.schedules.actions import Action, Kind, forward, input_gradient, weight_gradient
from parallel.schedules.registry import schedule
from parallel.schedules.table import Schedule


@schedule(
    "zb-v",
    idle="max(0, 2 * p - 1 - M, 4 * p - 1 - 4 * M) * F / 2",
    idle_if="F == B_i == W",
    in_flight="2 * min(M, p)",
    chunks=2,
)
def zb_v(ranks: int, micro_batches: int, chunks: int) -> Schedule:
    """Rank r has the stages r and 2p − 1 − r, and no idle time when F = B_i = W, in the memory of 1F1B.

    After section 6 of arXiv 2401.10241 (V-ZB in arXiv 2405.15362). From M = 2p − 1 on no rank waits between its first and its
    last action. With fewer, the first rank has M forwards for the 2p − 1 chunks of time until its second chunk comes round;
    below M = 2p/3 the way of one micro-batch down, up and back takes longer still.
    """
    places = (*((rank, 0) for rank in range(ranks)), *((rank, 1) for rank in reversed(range(ranks))))
    orders = [deque(_order(ranks, rank, micro_batches)) for rank in range(ranks)]
    return Schedule("zb-v", ranks, chunks, micro_batches, _with_weight_gradients(orders, micro_batches), places)


def _order(ranks: int, rank: int, micro_batches: int) -> Iterator[Action]:
    """Forwards and input gradients of a rank; fewer than 2p − 1 micro-batches keep the order that they have among so many."""
    down, up, back_up, back_down = (forward, 0), (forward, 1), (input_gradient, 1), (input_gradient, 0)
    phases = (
        (2 * (ranks - rank) - 1, (down,)),
        (rank, (up, down)),
        (ranks - rank, (up, back_up)),
        (max(micro_batches - 2 * ranks + 1, 0) + rank, (down, back_down, up, back_up)),
        (ranks - rank - 1, (back_down, up, back_up)),
        (rank, (back_down, back_up)),
        (ranks - rank, (back_down,)),
    )
    counts = {step: 0 for _, steps in phases for step in steps}
    for repeats, steps in phases:
        for make, chunk in steps * repeats:
            if counts[make, chunk] < micro_batches:
                yield make(counts[make, chunk], chunk)
            counts[make, chunk] += 1


def _with_weight_gradients(orders: list[deque[Action]], micro_batches: int) -> tuple[tuple[Action, ...], ...]:
    """The rows: at unit costs, a weight gradient stands wherever its rank would wait, or would hold more than 2p chunks."""
    stages = 2 * len(orders)
    rows: list[list[Action]] = [[] for _ in orders]
    late: list[deque[Action]] = [deque() for _ in orders]
    held = [0] * len(orders)
    # A micro-batch goes forward through all stages, and back: how many have come to each of these 2·2p places and the end.
    arrived = [micro_batches] + [0] * (2 * stages)
    while any(orders) or any(late):
        moved = []
        for rank, order in enumerate(orders):
            if order:
                action, ahead = order[0], order[0].kind is Kind.FORWARD
                stage = stages - 1 - rank if action.chunk else rank
                place = stage if ahead else 2 * stages - 1 - stage
                if action.micro_batch < arrived[place] and (held[rank] < stages or not ahead):
                    rows[rank].append(order.popleft())
                    moved.append(place + 1)
                    held[rank] += ahead
                    if not ahead:
                        late[rank].append(weight_gradient(action.micro_batch, action.chunk))
                    continue
            if late[rank]:
                rows[rank].append(late[rank].popleft())
                held[rank] -= 1
        for place in moved:
            arrived[place] += 1
    return tuple(map(tuple, rows))
