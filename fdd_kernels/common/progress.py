"""Show the progress of a command: a bar on a terminal that can show one, elsewhere a line every ten
seconds.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from datetime import timedelta

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.text import Text

from fdd_kernels.common.heartbeat import EVERY, Heartbeat

BAR_WIDTH = 16
TIME_WIDTH = 8


class Activity:
    """Show the progress of a task while the block runs.

    Args:
        what: the task in words, as in "distilling".
        total: number of steps; None: show the time only.
        count: format a number of steps.
        every: seconds from one line to the next where there is no bar.
        wait, clock: see `Heartbeat`.
    """

    def __init__(
        self,
        console: Console,
        what: str,
        total: int | None = None,
        *,
        count: Callable[[int], str] = str,
        every: float = EVERY,
        wait: Callable[[float], bool] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.console, self.what, self.total, self.count = console, what, total, count
        self.done, self._first_done, self.terms = 0, 0, ()
        self._heartbeat = Heartbeat(
            lambda seconds: console.print(self.line(seconds), soft_wrap=True),
            every=every,
            wait=wait,
            clock=clock,
        )
        self._bar: Progress | None = None

    def __enter__(self) -> Activity:
        if self.console.is_interactive:  # TERM=dumb is a terminal that shows no bar
            columns = (
                TextColumn("{task.description}"),
                BarColumn(bar_width=BAR_WIDTH),
                _Count(self),
                TimeRemainingColumn(),
            )
            self._bar = Progress(
                *columns, _Terms(self), console=self.console, transient=self.total is None
            )
            self._bar.start()
            self._task = self._bar.add_task(self.what, total=self.total, completed=self.done)
        elif not self.console.quiet:
            self._heartbeat.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()
        elif not self.console.quiet:
            self._heartbeat.__exit__()

    def start_at(self, done: int, total: int) -> None:
        """Begin at a later step, as a resumed run does; earlier steps do not enter the estimate of
        the remaining time.
        """
        self._first_done = done
        self.update(done, total=total)

    def update(
        self,
        done: int | None = None,
        *,
        total: int | None = None,
        terms: Sequence[str] | None = None,
    ) -> None:
        """Set the number of steps done, the total, and terms to show, the most important first."""
        self.done = self.done if done is None else done
        self.total = self.total if total is None else total
        self.terms = self.terms if terms is None else tuple(terms)
        if self._bar is not None:
            self._bar.update(self._task, completed=self.done, total=self.total)

    def counted(self) -> str:
        """Steps done and in all, or nothing without a total."""
        return f"{self.count(self.done)}/{self.count(self.total)}" if self.total is not None else ""

    def line(self, seconds: float) -> str:
        """The progress `seconds` after the start, in one line."""
        elapsed = timedelta(seconds=round(seconds))
        parts = [f"{self.what}:", self.counted() or f"{elapsed} so far"]
        made = self.done - self._first_done
        if self.total and made > 0:
            parts.append(
                f"{timedelta(seconds=round(seconds / made * (self.total - self.done)))} left"
            )
        elif self.total is not None:
            parts.append(f"{elapsed} so far")
        return " ".join(parts) + "".join(f"  {term}" for term in self.terms)


class _Count(ProgressColumn):
    """A column with the steps done and in all."""

    def __init__(self, activity: Activity) -> None:
        super().__init__()
        self.activity = activity

    def render(self, task: Task) -> Text:
        return Text(self.activity.counted(), no_wrap=True)


class _Terms(ProgressColumn):
    """A column with as many terms as fit beside the others."""

    def __init__(self, activity: Activity) -> None:
        super().__init__()
        self.activity = activity

    def render(self, task: Task) -> Text:
        activity = self.activity
        room = (
            activity.console.width
            - len(activity.what)
            - BAR_WIDTH
            - len(activity.counted())
            - TIME_WIDTH
            - 5
        )
        shown = ""
        for term in activity.terms:
            longer = f"{shown}  {term}" if shown else term
            if len(longer) > room:
                break
            shown = longer
        return Text(shown, no_wrap=True)
