"""Report regularly while something takes long. Needs the standard library only."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

EVERY = 10.0  # seconds


class Heartbeat:
    """Call `beat(seconds since the start)` regularly from another thread while the block runs.

    Args:
        every: seconds from one call to the next.
        wait: wait that many seconds and return whether the block has ended; for tests.
        clock: the time in seconds; for tests.
    """

    def __init__(
        self,
        beat: Callable[[float], None],
        *,
        every: float = EVERY,
        wait: Callable[[float], bool] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._beat, self._every, self._clock = beat, every, clock
        self._ended = threading.Event()
        self._wait = wait or self._ended.wait
        self._thread: threading.Thread | None = None

    @property
    def seconds(self) -> float:
        """Seconds since the start."""
        return self._clock() - self._started

    def __enter__(self) -> Heartbeat:
        self._started = self._clock()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._wait(self._every):
            self._beat(self.seconds)
