"""What is shown while a training runs: a live line on a terminal with rich, plain lines anywhere else."""

from __future__ import annotations

import os
import sys
import time
from typing import TYPE_CHECKING, Protocol, Self, TextIO

if TYPE_CHECKING:
    from types import TracebackType

    from parallel.train import Step


class Progress(Protocol):
    """Shows the steps of a training; a context manager, so that the terminal is left in order."""

    def __enter__(self) -> Self: ...
    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...
    def update(self, step: Step) -> None:
        """Show one more step."""
        ...


def start(steps: int, tokens: int, first: int = 0) -> Progress:
    """Return the progress display for this standard output: `steps` steps of `tokens` tokens each, `first` taken before."""
    if _is_watched(sys.stdout):
        try:
            return LiveProgress(steps, tokens, first)
        except ImportError:
            pass  # rich is an extra; plain lines say the same
    return PlainProgress(steps, tokens, first)


def _is_watched(stream: TextIO) -> bool:
    """Whether a terminal shows `stream`: Open MPI gives rank 0 one of no size, wherever its output goes."""
    try:
        return stream.isatty() and os.get_terminal_size(stream.fileno()).columns > 0
    except OSError:
        return False


class _Rates:
    """The numbers of the display: a moving average of speed and of the share of time in communication."""

    def __init__(self, tokens: int) -> None:
        self.tokens, self.seconds, self.communication, self.done = tokens, 0.0, 0.0, 0

    def add(self, step: Step) -> None:
        keep = 0.9 if self.done else 0.0
        self.seconds = keep * self.seconds + (1 - keep) * step.seconds
        self.communication = keep * self.communication + (1 - keep) * step.communication_seconds
        self.done += 1

    def text(self, loss: float) -> str:
        share = self.communication / self.seconds
        return f"loss {loss:6.4f}  {self.tokens / self.seconds:8,.0f} tokens/s  {share:4.0%} in communication"


class PlainProgress:
    """About twenty lines over the whole training, without control characters."""

    def __init__(self, steps: int, tokens: int, first: int = 0) -> None:
        self.steps, self.first, self.rates, self.began = steps, first, _Rates(tokens), time.perf_counter()
        self.every = max(1, steps // 20)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        sys.stdout.flush()

    def update(self, step: Step) -> None:
        """Print a line if this step is the first, the last, or one of every so many."""
        self.rates.add(step)
        done = self.first + self.rates.done
        if self.rates.done == 1 or done == self.steps or done % self.every == 0:
            elapsed = time.perf_counter() - self.began
            number = f"{done:{len(str(self.steps))}}/{self.steps}"
            print(f"step {number}  {self.rates.text(step.loss)}  {elapsed:4.0f} s", flush=True)


class LiveProgress:
    """One line that is redrawn, with a bar and the time that is left."""

    def __init__(self, steps: int, tokens: int, first: int = 0) -> None:
        from rich import progress

        self.rates = _Rates(tokens)
        self.bar = progress.Progress(
            progress.TextColumn("step {task.completed}/{task.total}"),
            progress.BarColumn(bar_width=None),
            progress.TextColumn("{task.description}"),
            progress.TimeRemainingColumn(),
            expand=True,
        )
        self.task = self.bar.add_task("", total=steps, completed=first)

    def __enter__(self) -> Self:
        self.bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.bar.stop()

    def update(self, step: Step) -> None:
        """Redraw the line."""
        self.rates.add(step)
        self.bar.update(self.task, advance=1, description=self.rates.text(step.loss))
