"""What happened when on a rank: computing, waiting, and collectives on their way; written as a Chrome trace, or drawn."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Sequence

    from collectives import Communicator, Work

TRACKS = ("compute", "waiting", "communication")


@dataclass(frozen=True)
class Event:
    """Something that took from `began` to `ended`, in seconds of this host's monotonic clock."""

    track: str
    name: str
    began: float
    ended: float


class Timeline:
    """The events of one rank."""

    def __init__(self) -> None:
        self._events: list[Event] = []
        self._works: list[tuple[str, Work[object], float]] = []

    def add(self, track: str, name: str, began: float, ended: float) -> None:
        """Note an event of one of TRACKS, with times of `time.perf_counter`."""
        self._events.append(Event(track, name, began, ended))

    def follow(self, name: str, work: Work[object]) -> None:
        """Note a collective that has just been started; when it began and ended is asked of it later."""
        self._works.append((name, work, time.perf_counter()))

    def clear(self) -> None:
        """Forget everything; what is on its way is not noted."""
        self._events.clear()
        self._works.clear()

    def events(self) -> list[Event]:
        """All events; the collectives that were followed must be done."""
        for name, work, started in self._works:
            began, ended = work.interval or (started, started)
            self._events.append(Event("communication", name, began, ended))
        self._works.clear()
        return self._events

    def seconds(self, track: str) -> float:
        """The time in which something of a track was going on."""
        spans = sorted((event.began, event.ended) for event in self.events() if event.track == track)
        total, until = 0.0, float("-inf")
        for began, ended in spans:
            total += max(0.0, ended - max(began, until))
            until = max(until, ended)
        return total


def gather(timeline: Timeline, communicator: Communicator) -> list[list[Event]]:
    """Return the events of every rank, on every rank. The clocks are those of one host."""
    mine = np.frombuffer(json.dumps([vars(event) for event in timeline.events()]).encode(), np.uint8)
    lengths = [int(n) for n in communicator.all_gather(np.array([mine.size], np.int64)).ravel()]
    everything = communicator.all_gather_v(mine, lengths).tobytes()
    ends = np.cumsum(lengths)
    return [
        [Event(**event) for event in json.loads(everything[end - length : end])]
        for end, length in zip(ends, lengths, strict=True)
    ]


def last_steps(ranks: Sequence[Sequence[Event]], steps: int) -> list[list[Event]]:
    """The events of the last forward passes, so many, and of what came after the first of them."""
    first = ("forward 0", "forward 0.0")
    starts = [[e.began for e in events if e.name in first][-steps:] for events in ranks]
    begin = min((times[0] for times in starts if times), default=0.0)
    return [[event for event in events if event.began >= begin] for events in ranks]


def chrome_trace(ranks: Sequence[Sequence[Event]]) -> dict[str, object]:
    """Return the trace as Perfetto and chrome://tracing read it: a process for each rank, a thread for each track."""
    zero = min((event.began for events in ranks for event in events), default=0.0)
    entries: list[dict[str, object]] = []
    for rank, events in enumerate(ranks):
        entries.append({"ph": "M", "name": "process_name", "pid": rank, "args": {"name": f"rank {rank}"}})
        for number, track in enumerate(TRACKS):
            entries.append({"ph": "M", "name": "thread_name", "pid": rank, "tid": number, "args": {"name": track}})
        entries.extend(
            {
                "ph": "X",
                "name": event.name,
                "cat": event.track,
                "pid": rank,
                "tid": TRACKS.index(event.track),
                "ts": (event.began - zero) * 1e6,
                "dur": (event.ended - event.began) * 1e6,
            }
            for event in events
        )
    return {"traceEvents": entries, "displayTimeUnit": "ms"}


def draw(path: str | Path, ranks: Sequence[Sequence[Event]], title: str) -> None:
    """Draw the tracks of all ranks above one another, in milliseconds."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    colors = {"compute": "tab:blue", "waiting": "tab:red", "communication": "tab:green"}
    zero = min((event.began for events in ranks for event in events), default=0.0)
    figure = Figure(figsize=(10, 1 + 0.9 * len(ranks)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    rows = [(rank, track) for rank in range(len(ranks)) for track in TRACKS]
    for row, (rank, track) in enumerate(rows):
        events = [event for event in ranks[rank] if event.track == track]
        bars = [((event.began - zero) * 1e3, (event.ended - event.began) * 1e3) for event in events]
        axes.broken_barh(bars, (row - 0.4, 0.8), facecolors=colors[track], edgecolor="white", linewidth=0.3)
    axes.set(xlabel="ms", title=title, yticks=range(len(rows)), yticklabels=[f"rank {r} {t}" for r, t in rows])
    axes.invert_yaxis()
    figure.savefig(path, dpi=110)
