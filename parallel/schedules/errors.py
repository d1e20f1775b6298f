"""What is raised where a pipeline schedule is wrong."""

from __future__ import annotations


class ScheduleError(ValueError):
    """A pipeline schedule is wrong: `rank`, `position` in its row and `action` say where (None: nowhere in particular)."""

    def __init__(
        self, message: str, rank: int | None = None, position: int | None = None, action: object | None = None
    ) -> None:
        self.rank, self.position, self.action = rank, position, action
        named = (("rank", rank), ("position", position), ("action", action))
        place = ", ".join(f"{name} {value}" for name, value in named if value is not None)
        super().__init__(f"{place}: {message}" if place else message)
