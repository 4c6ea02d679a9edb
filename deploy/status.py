"""`tandem status`: one screen about a run, live. Both sides' throughput, who waits for whom, queue and lag, weights,
actors, the reward's curve, the last events, and what to change.

Reads the files of the run directory and nothing else, so it works beside a run of any process, and after its end.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from deploy.dashboard.jsonl_tail import JsonlTail
from deploy.progress import describe_end, describe_phase, evals_line, minutes, sparkline, step_bar
from learner.telemetry.events import read_events
from learner.telemetry.rates import Rates, lately, over_time, unbroken
from learner.telemetry.sample import SERVING, ActorSample, Sample
from learner.telemetry.timeline import TimelineReader
from protocol.config import Recipe, load_recipe
from protocol.rundir import RunDir, read_json
from protocol.scaling import Member, read_members, read_wish

EVERY_S = 1.0
KEPT_SAMPLES = 2400
LATELY_S = 30.0
"""Present rates are means over so many seconds: groups come in bursts."""
HISTORY_S = 900.0
"""What a sparkline covers at most, of a run that goes on."""
POINTS = 40
SHOWN_EVENTS = 6
SHOWN_ACTORS = 12
SILENT_S = 15.0
"""Without a new sample for so long, and for SILENT_SAMPLES times as long as there should be one, the learner is said to
be silent."""
SILENT_SAMPLES = 3
COLOURS = {
    "training": "green", "generating": "green", "waiting": "yellow", "publishing": "blue", "updating": "blue",
    "evaluating": "cyan", "saving": "magenta", "starting": "bright_black", "draining": "bright_black",
    "other": "bright_black", "gone": "red",
}  # fmt: skip
BAR = 24
CURVES = {
    "reward_mean": ("reward", "{:.3f}"),
    "entropy": ("entropy", "{:.2f} nats"),
    "completion_tokens_mean": ("length", "{:.0f} tokens"),
    "nll": ("loss", "{:.3f} nats"),
}
"""Column of metrics.jsonl -> name and form."""


class Curve:
    """The newest values of a figure."""

    def __init__(self) -> None:
        self.shown: deque[float] = deque(maxlen=POINTS)
        self.count = 0
        """Of all values there were."""

    def add(self, value: float) -> None:
        self.shown.append(value)
        self.count += 1


class RunWatch:
    """What the files of a run say, kept between two looks."""

    def __init__(self, run: RunDir) -> None:
        self.run = run
        self.recipe: Recipe = load_recipe(run.recipe)
        self.samples: deque[Sample] = deque(maxlen=KEPT_SAMPLES)
        self.curves: dict[str, Curve] = {}
        """Column of metrics.jsonl (`CURVES`) -> what is drawn of it."""
        self._timeline, self._metrics = TimelineReader(run.timeline), JsonlTail(run.metrics)
        self.look()

    def look(self) -> None:
        """Read what is new."""
        found = list(self._timeline.new())
        if self._timeline.replaced:
            self.samples.clear()
        self.samples.extend(found)
        self.status: dict[str, Any] = read_json(self.run.status) or {}
        rows, replaced = self._metrics.new()
        if replaced:
            self.curves = {}
        for row in rows:
            for key in CURVES:
                if row.get(key) is not None:
                    self.curves.setdefault(key, Curve()).add(row[key])
        self.events = read_events(self.run.events, SHOWN_EVENTS)
        self.members: dict[str, Member] = {member.name: member for member in read_members(self.run)}
        wish = read_wish(self.run)
        self.wanted = wish.actors if wish else None
        self.alive = self.run.is_held("learner") or self.run.is_held("launcher")  # which may be starting it again

    @property
    def newest(self) -> Sample | None:
        return self.samples[-1] if self.samples else None

    def recent(self) -> list[Sample]:
        """What sparklines are drawn of: the last while of a run that goes on, all of one that has ended."""
        newest, samples = self.newest, unbroken(self.samples)
        if newest is None or not self.alive:
            return list(samples)
        return [sample for sample in samples if newest.t - sample.t <= HISTORY_S]


def show(run: RunDir, console: Console, once: bool = False, clock: Callable[[], float] = time.time) -> None:
    """Show a run until it ends or Ctrl-C; once, where nobody watches or nothing goes on."""
    watch = RunWatch(run)
    if once or not console.is_terminal or not watch.alive:
        console.print(screen(watch, clock()))
        return
    with Live(screen(watch, clock()), console=console, screen=True, auto_refresh=False) as live:
        try:
            while watch.alive:
                time.sleep(EVERY_S)
                watch.look()
                live.update(screen(watch, clock()), refresh=True)
        except KeyboardInterrupt:
            pass
    console.print(screen(watch, clock()))


def screen(watch: RunWatch, now: float) -> RenderableType:
    """One screen, at most 100 columns wide."""
    parts = [_heading(watch, now)]
    if watch.newest is not None:
        parts += [Text(), _sides(watch), Text(), _flow(watch)]
    if watch.curves:
        parts += [Text(), _curves(watch)]
    if watch.newest is not None and (watch.newest.actors or watch.members):
        parts += [Text(), _actors(watch)]
    if watch.events:
        parts += [Text(), _events(watch)]
    recipe = watch.recipe
    began = watch.status.get("started_at")
    ended = now if watch.alive else watch.status.get("written_at", now)
    elapsed = f"{minutes(ended - began)} elapsed" if began else "not started"
    left = f", about {minutes(watch.status['left_s'])} left" if watch.alive and watch.status.get("left_s") else ""
    title = f"tandem · {watch.run.path.name} · {recipe.method} · {recipe.model.path}"
    return Panel(Group(*parts), title=title, subtitle=elapsed + left, border_style="blue", width=None)


def _heading(watch: RunWatch, now: float) -> RenderableType:
    """What goes on, what is waited for and since when, and the advice."""
    status, newest = watch.status, watch.newest
    rows: list[RenderableType] = []
    if not watch.alive:
        rows.append(Text(describe_end(status), style="bold"))
    else:
        rows.append(Text(describe_phase(status) or "starting", style="bold"))
        if status.get("waiting_for"):
            rows.append(
                Text(f"waiting {status.get('waited_s', 0.0):.0f} s for {status['waiting_for']}", style="yellow")
            )
        age = now - newest.t if newest is not None else 0.0
        if age > max(SILENT_S, SILENT_SAMPLES * watch.recipe.metrics.sample_every_s):
            rows.append(Text(f"no word from the learner for {age:.0f} s", style="red"))
        elif age < -SILENT_S:
            rows.append(Text(f"the learner's clock is {-age:.0f} s ahead, or was set back since", style="yellow"))
    if status.get("error"):
        rows.append(Text(str(status["error"]), style="red"))
    if status.get("guard"):
        rows.append(Text(f"guard, {status['guard']}", style="red"))
    if status.get("steps"):
        rows.append(step_bar(status))
    if newest is not None and newest.advice is not None:
        rows.append(Text.assemble(("advice   ", "dim"), (newest.advice.text, "bold")))
    return Group(*rows)


def _sides(watch: RunWatch) -> RenderableType:
    """Throughput of both sides, and what each does with its time."""
    recent = watch.recent()
    history = over_time(recent, POINTS)
    served = [sample for sample in recent if any(actor.state in SERVING for actor in sample.actors.values())] or recent
    whole = Rates.between(served[0], served[-1])
    now = (lately(recent, LATELY_S) if watch.alive else whole) or whole
    table = Table.grid(padding=(0, 2))
    table.add_row(
        Text(), Text("tokens/s", "dim"), Text(f"last {minutes(whole.seconds)}", "dim"), Text("time", "dim"), Text()
    )
    for name, rate, shares in (("rollout", "drawn_tokens", now.actors), ("learner", "trained_tokens", now.learner)):
        values = [getattr(rates, rate) for rates in history]
        line = Text(sparkline(values, high=max([*values, 1e-9])), "cyan")
        table.add_row(name, f"{getattr(now, rate):,.0f}", line, bar(shares), shares_text(shares))
    return table


def bar(shares: Mapping[str, float], width: int = BAR) -> Text:
    """Shares of a time as one bar of coloured blocks."""
    text, drawn, total = Text(), 0, 0.0
    for name, share in shares.items():
        total += share
        cells = round(total * width) - drawn
        text.append("█" * cells, COLOURS.get(name, "white"))
        drawn += cells
    return text


def shares_text(shares: Mapping[str, float]) -> Text:
    """The largest parts in words, in the bar's colours."""
    largest = sorted(shares.items(), key=lambda item: -item[1])[:3]
    parts = [(f"{name} {share:.0%}", COLOURS.get(name, "white")) for name, share in largest if share >= 0.005]
    return Text("  ").join(Text(text, colour) for text, colour in parts)


def _flow(watch: RunWatch) -> RenderableType:
    """Queue, leases, lag, weights."""
    sample, status = watch.newest, watch.status
    assert sample is not None
    tickets = sample.tickets
    table = Table.grid(padding=(0, 2))
    if tickets:
        lag = f"lag {status['lag_mean']:.2f} steps, at most {status['lag_max']:.0f}" if "lag_mean" in status else ""
        table.add_row(
            "groups", f"{tickets.get('queued', 0)} queued", f"{tickets.get('leased', 0)} with actors",
            f"{sample.backlog} wait for room", lag,
        )  # fmt: skip
        dropped = sum(sample.dropped.values())
        table.add_row(
            "", f"{tickets.get('trained', 0)} trained", f"{tickets.get('reissued', 0)} issued again",
            f"{tickets.get('failed', 0)} failed", f"{dropped} messages dropped" if dropped else "",
        )  # fmt: skip
    if sample.version:
        table.add_row("weights", *_weights(sample, status))
    return table


def _weights(sample: Sample, status: Mapping[str, Any]) -> list[str]:
    """Version, who is behind it, its size, and what its way took."""
    versions = [actor.version for actor in sample.actors.values() if actor.version]
    behind = sum(version < sample.version for version in versions)
    updated = [actor for actor in sample.actors.values() if actor.swaps > 1]
    slowest = (
        f"fetch {max(actor.fetch_s for actor in updated):.2f} s, pause {max(actor.pause_s for actor in updated):.2f} s"
        if updated
        else ""
    )
    delta = f", delta {status['delta_bytes'] / 1e6:.2f} MB" if status.get("delta_bytes") else ""
    size = f"{sample.dense_bytes / 1e6:,.0f} MB{delta}"
    return [f"version {sample.version}", f"{behind} of {len(versions)} behind", size, slowest]


def _curves(watch: RunWatch) -> RenderableType:
    """What the run learns, step by step."""
    table = Table.grid(padding=(0, 2))
    for key, (name, form) in CURVES.items():
        if key not in watch.curves:
            continue
        shown, count = [*watch.curves[key].shown], watch.curves[key].count
        is_share = key == "reward_mean" and min(shown) >= 0 and max(shown) <= 1
        line = sparkline(shown, *((0.0, 1.0) if is_share else (min(shown), max(shown))))
        covers = f"steps {count - len(shown) + 1} to {count}"
        table.add_row(name, form.format(shown[-1]), Text(line, "cyan"), Text(covers, "dim"))
    if watch.status.get("evals"):
        table.add_row("held out", Text(), Text(evals_line(watch.status["evals"]), "cyan"), Text())
    return table


def _actors(watch: RunWatch) -> RenderableType:
    """A row each; those of the launcher's that are not there yet, too."""
    sample = watch.newest
    assert sample is not None
    rates = lately(watch.recent(), LATELY_S)
    table = Table(box=None, padding=(0, 2), header_style="dim", pad_edge=False)
    for column in ("actor", "state", "version", "tok/s", "tickets", "memory", ""):
        table.add_column(column, justify="right" if column in ("version", "tok/s", "tickets", "memory") else "left")
    absent = {name: member for name, member in watch.members.items() if name not in sample.actors}
    rows = [*sample.actors.items()]
    for name, actor in rows[:SHOWN_ACTORS]:
        table.add_row(
            name, *_actor_cells(actor, rates.tokens_of.get(name, 0.0) if rates else 0.0, watch.members.get(name))
        )
    for name, member in list(absent.items())[: max(0, SHOWN_ACTORS - len(rows))]:
        table.add_row(name, Text(member.state, "bright_black"), "", "", "", "", Text(member.why, "yellow"))
    hidden = len(rows) + len(absent) - table.row_count
    serving = sum(actor.state in SERVING for actor in sample.actors.values())
    wanted = "" if watch.wanted is None else f" of {watch.wanted} wanted"
    more = f", {hidden} more not shown" if hidden > 0 else ""
    return Group(table, Text(f"{serving} actors serve{wanted}{more}", "dim"))


def _actor_cells(actor: ActorSample, tokens: float, member: Member | None) -> list[RenderableType]:
    words = actor.phase if actor.state in ("starting", "draining") else ""
    node = member.node if member and member.node else ""
    return [
        Text(actor.state, COLOURS.get(actor.state, "white")), str(actor.version or ""), f"{tokens:,.0f}",
        str(actor.held), f"{actor.rss_bytes / 1e9:.1f} GB" if actor.rss_bytes else "", Text(words or node, "dim"),
    ]  # fmt: skip


def _events(watch: RunWatch) -> RenderableType:
    table = Table.grid(padding=(0, 2))
    for event in watch.events:
        at = time.strftime("%H:%M:%S", time.localtime(event["t"]))
        colour = {"warning": "yellow", "error": "red", "critical": "red"}.get(event["kind"], "")
        table.add_row(Text(at, "dim"), Text(str(event["text"]), colour, overflow="ellipsis", no_wrap=True))
    return table
