"""The live view of a run in a terminal: what is waited for, then step, reward, tokens/s, lag, version, time left.

A terminal gets a panel that is drawn anew; a pipe or a log gets one line for each change. Reads the learner's
status.json, nothing else.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from deploy.working import LINE_EVERY_S, WORTH_SAYING_S, Working
from learner.telemetry.events import note_event


class View(Protocol):
    """Shows people what goes on. The launcher feeds it."""

    def note(self, text: str) -> None:
        """A line that stays: something that happened once."""

    def doing(self, what: str) -> AbstractContextManager[object]:
        """Within: that is what the launcher itself is busy with, and how long already."""

    def update(self, status: dict[str, Any]) -> None:
        """The learner's present state, and the launcher's figures of its actors."""


class RecordedView:
    """Another view, whose notes are also kept in events.jsonl."""

    def __init__(self, view: View, events: Path) -> None:
        self._view, self._events = view, events

    def note(self, text: str) -> None:
        note_event(self._events, "launcher", text)
        self._view.note(text)

    def doing(self, what: str) -> AbstractContextManager[object]:
        note_event(self._events, "launcher", what)
        return self._view.doing(what)

    def update(self, status: dict[str, Any]) -> None:
        self._view.update(status)


SPARKS = "▁▂▃▄▅▆▇█"
LONG_WAIT_S = 10.0
"""A step is a wait and a calculation; a log line names the wait when it is a long one."""


def sparkline(values: list[float], low: float = 0.0, high: float = 1.0) -> str:
    """One block character for each value, from `low` (empty) to `high` (full)."""
    span = max(high - low, 1e-9)
    return "".join(SPARKS[min(len(SPARKS) - 1, max(0, int((value - low) / span * len(SPARKS))))] for value in values)


def minutes(seconds: float) -> str:
    """Seconds as m:ss."""
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"


class ProgressView:
    """Used as a context manager by the commands; `launch` feeds it."""

    def __init__(self, console: Console, title: str) -> None:
        self.console = console
        self.title = title
        self.began = time.monotonic()
        self._note = ""
        self._doing: tuple[str, float] | None = None
        self._status: dict[str, Any] = {}
        self._live = (
            Live(get_renderable=self._panel, console=console, refresh_per_second=4) if console.is_terminal else None
        )
        self._printed: tuple[Any, ...] = ()
        self._printed_at = 0.0
        self._guard = ""

    def __enter__(self) -> ProgressView:
        if self._live:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live:
            self._live.stop()

    def note(self, text: str) -> None:
        """A line that stays: something that happened once."""
        self._note = text
        line = Text.assemble((minutes(time.monotonic() - self.began), "dim"), f" {text}")
        self.console.print(line, soft_wrap=True)

    @contextmanager
    def doing(self, what: str) -> Iterator[None]:
        self.note(what)
        self._doing = (what, time.monotonic())
        try:
            if self._live:
                yield
            else:
                with Working(self.console) as working:
                    working.go_on(what)
                    yield
        finally:
            self._doing = None

    def update(self, status: dict[str, Any]) -> None:
        self._status = status
        if self._live is None:
            self._print_line()

    def _print_line(self) -> None:
        """For logs: a line for each new phase and step, and every 15 s while something is waited for."""
        status = self._status
        key = (status.get("phase"), status.get("step"), len(status.get("evals", {})))
        now = time.monotonic()
        if not status or (key == self._printed and now - self._printed_at < LINE_EVERY_S):
            return
        self._printed, self._printed_at = key, now
        clock = minutes(now - self.began)
        if status.get("guard") and status["guard"] != self._guard:
            self._guard = status["guard"]
            self.console.print(f"{clock} guard, {self._guard}", highlight=False, soft_wrap=True)
        self.console.print(f"{clock} {describe(status)}", highlight=False, soft_wrap=True)

    def _panel(self) -> RenderableType:
        status = self._status
        elapsed = minutes(time.monotonic() - self.began)
        rows: list[RenderableType] = [Text(describe_phase(status) or self._note or "starting", style="bold")]
        if self._doing:
            what, since = self._doing
            rows.append(Text(f"{what} ({time.monotonic() - since:.0f} s)", style="yellow"))
        if status.get("waiting_for"):
            waited = status.get("waited_s", 0.0)
            rows.append(Text(f"waiting {waited:.0f} s for {status['waiting_for']}", style="yellow"))
        rows += [Text(f"{name} is pending: {why}", "yellow") for name, why in status.get("actors_pending", {}).items()]
        if status.get("step") or status.get("phase") == "training":
            rows += [Text(), step_bar(status), _figures(status)]
        if status.get("evals"):
            rows.append(Text("held-out reward: " + evals_line(status["evals"]), style="cyan"))
        if status.get("guard"):
            rows.append(Text(f"guard, {status['guard']}", style="red"))
        left = f", about {minutes(status['left_s'])} left" if status.get("left_s") else ""
        return Panel(Group(*rows), title=f"tandem · {self.title}", subtitle=f"{elapsed}{left}", border_style="blue")


LINE_FIGURES = {
    "reward_mean": "reward {:.3f}",
    "nll": "loss {:.3f}",
    "kept_completions": "kept {:.0f}",
    "dpo_accuracy": "preferred {:.2f}",
    "rollout_tokens_per_s": "rollout {:.0f} tok/s",
    "learner_tokens_per_s": "learner {:.0f} tok/s",
    "lag_mean": "lag {:.2f}",
    "version": "version {:.0f}",
    "rollbacks": "rollbacks {:.0f}",
}
"""Figures of a step in a line for a log, where there are any."""


ENDS = {
    "finished": "finished",
    "stopped": "stopped; it can be resumed",
    "stopped by the guard": "stopped by the guard",
    "failed": "failed",
}
"""The learner's last phases, and how people are told that a run has ended in them."""


def describe_end(status: dict[str, Any]) -> str:
    """How a run ended of which no process lives."""
    if not status:
        return "not started"
    return ENDS.get(str(status.get("phase")), "interrupted: its learner ended without a word")


def describe_phase(status: dict[str, Any]) -> str:
    """The learner's phase in words, and since when where that is longer than a glance."""
    phase = str(status.get("phase", ""))
    if status.get("doing"):
        return f"{status['doing']}{_since(status.get('doing_since'))}"
    if phase == "warm start" and "warm_start_batch" in status:
        return (
            f"warm start (SFT): batch {status['warm_start_batch']} of {status['warm_start_batches']},"
            f" loss {status['loss']:.3f}"
        )
    unfinished = phase not in ("training", "", *ENDS)
    return f"{phase}{_since(status.get('phase_since'))}" if unfinished and not status.get("waiting_for") else phase


def _since(began: float | None) -> str:
    """How long something has been going on; "" at first."""
    seconds = time.time() - began if began else 0.0
    return f" ({seconds:.0f} s)" if seconds > WORTH_SAYING_S else ""


def describe(status: dict[str, Any]) -> str:
    """One line for a log."""
    parts = [describe_phase(status)]
    if status.get("phase") == "training" and "learner_tokens_per_s" in status:
        shown = [form.format(status[name]) for name, form in LINE_FIGURES.items() if status.get(name) is not None]
        parts = [f"step {status['step']}/{status['steps']}", *shown, f"left {minutes(status['left_s'])}"]
    if status.get("waiting_for") and (status.get("phase") != "training" or status["waited_s"] > LONG_WAIT_S):
        parts.append(f"waiting {status['waited_s']:.0f} s for {status['waiting_for']}")
    if status.get("evals") and status.get("phase") != "training":
        parts.append("held-out reward: " + evals_line(status["evals"]))
    return " · ".join(part for part in parts if part)


def evals_line(evals: dict[str, float]) -> str:
    return ", ".join(f"{name.replace('_', ' ')} {reward:.3f}" for name, reward in evals.items())


def actors_line(status: dict[str, Any]) -> str:
    """How many actors are there, of how many that are wanted where these differ."""
    there, wanted = len(status.get("actors", ())), status.get("actors_wanted", 0)
    return f"{there} actors" if there == wanted or not wanted else f"{there} of {wanted} actors"


def step_bar(status: dict[str, Any]) -> RenderableType:
    table = Table.grid(padding=(0, 1))
    step, steps = status.get("step", 0), status.get("steps", 1)
    table.add_row(f"step {step}/{steps}", ProgressBar(total=steps, completed=step, width=40))
    return table


def _figures(status: dict[str, Any]) -> RenderableType:
    """Figures of the last step, two columns."""

    def figure(key: str, form: str) -> str:
        value = status.get(key)
        return form.format(value) if isinstance(value, int | float) else "–"

    table = Table.grid(padding=(0, 2))
    if "nll" in status:
        table.add_row("loss", figure("nll", "{:.3f} nats a token"), "")
    if "dpo_accuracy" in status:
        table.add_row("preferred", figure("dpo_accuracy", "{:.2f}"), f"margin {figure('dpo_margin', '{:.3f}')}")
    if "reward_mean" in status:
        table.add_row("reward", figure("reward_mean", "{:.3f}"), sparkline(status.get("curve", [])))
    if status.get("actors"):
        table.add_row("rollout", figure("rollout_tokens_per_s", "{:.0f} tok/s"), actors_line(status))
    table.add_row(
        "learner",
        figure("learner_tokens_per_s", "{:.0f} tok/s"),
        f"{figure('train_s', '{:.1f} s')} training, {figure('wait_s', '{:.1f} s')} waiting",
    )
    if "lag_mean" in status:
        table.add_row("lag", figure("lag_mean", "{:.2f} steps"), f"max {figure('lag_max', '{:.0f}')}")
        table.add_row("weights", figure("version", "version {:.0f}"), "")
    return table
