"""Says what a command is doing now and since when, so that nothing is silent for longer than it can be believed in.

On a terminal one line that is drawn anew; what took long stays, with its seconds. In a log a line when something
begins, and another one every 15 seconds while it lasts.
"""

from __future__ import annotations

import threading
import time
from types import TracebackType

from rich.console import Console, RenderableType
from rich.live import Live
from rich.spinner import Spinner

LINE_EVERY_S = 15.0
WORTH_SAYING_S = 2.0
"""What took longer stays on the terminal with its time."""


class Working:
    """Context manager and callable: `working("checking the data")` ends what was going on and begins that."""

    def __init__(self, console: Console, every_s: float = LINE_EVERY_S) -> None:
        self.console, self.every_s = console, every_s
        self.what = ""
        self.since = time.monotonic()
        self._live = Live(get_renderable=self._line, console=console, transient=True) if console.is_terminal else None
        self._ended = threading.Event()
        self._lock = threading.Lock()
        self._ticker = threading.Thread(target=self._tick, name="working", daemon=True)

    @property
    def seconds(self) -> float:
        """Since what goes on now began."""
        return time.monotonic() - self.since

    def __call__(self, what: str) -> None:
        """Begin something else; "": nothing."""
        with self._lock:
            self._finish()
            self.what, self.since = what, time.monotonic()
            if what and self._live is None:
                self._print(what)

    def go_on(self, what: str) -> None:
        """Begin something that somebody else has announced."""
        with self._lock:
            self.what, self.since = what, time.monotonic()

    def _finish(self) -> None:
        """Leave a line about what took long; a log has had one."""
        if self.what and (self._live is not None or self.seconds > self.every_s):
            self._print(f"{self.what} ({self.seconds:.0f} s)" if self.seconds > WORTH_SAYING_S else self.what)

    def _print(self, text: str) -> None:
        self.console.print(text, style="dim", highlight=False, soft_wrap=True)

    def _line(self) -> RenderableType:
        waited = f" ({self.seconds:.0f} s)" if self.seconds > WORTH_SAYING_S else ""
        return Spinner("dots", text=f"{self.what}{waited}") if self.what else ""

    def _tick(self) -> None:
        while not self._ended.wait(self.every_s):
            with self._lock:
                if self.what and self.seconds >= self.every_s:
                    self._print(f"{self.what}, {self.seconds:.0f} s so far")

    def __enter__(self) -> Working:
        if self._live is not None:
            self._live.start()
        else:
            self._ticker.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self("")
        self._ended.set()
        if self._live is not None:
            self._live.stop()
        else:
            self._ticker.join()
