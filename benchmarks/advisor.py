"""Whether the advisor is right: what it says that m actors would bring, against a run with m actors.

python -m benchmarks.advisor [--seconds 20] [--counts 1,2,3,4,6] [--settings "NAME;NAME"]

The intake, the sampler, the advisor's window and its arithmetic are the real ones; actors are those of
`scale_actors.py`, each with an engine of a known speed that works on one group after the other, and the learner sleeps
for as long as a step is to take. Each setting is run with every number of actors. From the shares that the advisor saw
with n of them comes the prediction for m, for every pair that it would speak of (m at most 2 n), and from both runs'
steps a second what was true. The goal is an error of at most 20 %.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import threading
import time
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.run import machine
from benchmarks.scale import RESULTS, TIMEOUT_S
from benchmarks.scale_actors import Simulated, Swarm
from benchmarks.scale_groups import GROUP_SIZE, MEAN_TOKENS
from benchmarks.scale_learner import Learner
from learner.intake.source import Interrupted
from learner.telemetry.advisor import GROWTH, WINDOW_S, Advisor, Shares, speedup
from learner.telemetry.clock import PhaseClock
from learner.telemetry.sampler import Sampler
from protocol.messages import Heartbeat, Ticket

GROUPS_PER_STEP = 16
SLOTS = 4


@dataclass(frozen=True)
class Setting:
    train_s: float
    """Of a step without any waiting, beside a second of generation of one actor for a step."""
    max_lag: int
    window_s: float = WINDOW_S
    """Of the advisor; where it is shorter than a step, the window is of as many steps as the advisor wants."""


SETTINGS = {
    "training is quick": Setting(0.25, max_lag=1),
    "training is half of it": Setting(0.5, max_lag=1),
    "training is slow": Setting(1.2, max_lag=2),
    "both in turn": Setting(0.5, max_lag=0),
    "both in turn, a step longer than the window": Setting(0.8, max_lag=0, window_s=0.5),
}
SAMPLE_S = 0.1
"""Between two samples: as small beside a step as a second is beside steps of a run."""
TOKENS_PER_S = GROUPS_PER_STEP * GROUP_SIZE * MEAN_TOKENS / 1.0
"""Of one engine: a step's groups take one actor one second."""
GOAL = 0.2


class MeasuredSwarm(Swarm):
    """Simulated actors that say how busy they were, as real ones do."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._assigned: dict[str, float] = {}
        """Actor -> seconds of work that its engine has been given."""
        self._serves_since: dict[str, float] = {}

    def _begin(self, actor: Simulated, ticket: Ticket) -> None:
        super()._begin(actor, ticket)
        seconds = self._choose(ticket, actor.version).num_tokens / self._tokens_per_s
        self._assigned[actor.name] = self._assigned.get(actor.name, 0.0) + seconds

    def _beat(self, actor: Simulated) -> None:
        if not actor.welcomed:
            return
        held, unacked = tuple(actor.held), tuple(actor.unacked)
        now = time.perf_counter()
        ahead = max(0.0, actor.engine_free_at - now)
        free = max(0, self._slots - len(held) - len(unacked))
        busy_s = max(0.0, self._assigned.get(actor.name, 0.0) - ahead)
        serving_s = now - self._serves_since.setdefault(actor.name, now) if actor.version else 0.0
        beat = Heartbeat(held, unacked, free, actor.version, "serving", 1.0, busy_s=busy_s, serving_s=serving_s)
        self._send(actor, beat)


class SleepingLearner(Learner):
    """A learner whose steps take a known time, with the clock that the real one has."""

    def __init__(self, directory: Path, actors: int, train_s: float, max_lag: int) -> None:
        self.clock, self.train_s = PhaseClock(), train_s
        self.ends: list[float] = []
        """When each step was committed."""
        super().__init__(directory, actors, keys=False, fsync=False, heartbeat_s=0.25)
        self.server.dispatcher.groups_per_step = GROUPS_PER_STEP
        self.server.dispatcher.max_lag = max_lag

    def _train(self) -> None:
        self.clock.enter("other")
        try:
            while True:
                with self.clock.of("waiting"):
                    self.source.take(TIMEOUT_S)
                with self.clock.of("training"):
                    time.sleep(self.train_s)
                step = self.server.dispatcher.step + 1
                self._publish(step)
                self.source.commit(step, self._version)
                self.ends.append(time.monotonic())
        except Interrupted:
            pass


def run(actors: int, seconds: float, setting: Setting) -> dict[str, Any]:
    """Shares, advice and steps a second of a run with so many actors. Raises ValueError where there was no advice."""
    with ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        learner = stack.enter_context(SleepingLearner(directory, actors, setting.train_s, setting.max_lag))
        names = [f"actor-{number}" for number in range(actors)]
        swarm = MeasuredSwarm(names, learner.endpoint, None, SLOTS, TOKENS_PER_S, 0.25)
        acting = threading.Thread(target=swarm.run, args=(lambda _: None,))
        acting.start()
        stack.callback(acting.join, TIMEOUT_S)
        stack.callback(swarm.stop)
        _wait_until_all_serve(swarm, actors)
        learner.source.resume_training()
        time.sleep(max(3.0, 2 * setting.train_s))  # until it goes evenly
        sampler = Sampler(learner.clock, lambda: learner.server.dispatcher.step, lambda: "", dict)
        sampler.actors = SimpleNamespace(  # type: ignore[assignment]
            server=learner.server, source=learner.source, publisher=SimpleNamespace(published=0, bytes_dense=0)
        )
        advisor, verdicts = Advisor(setting.window_s), []
        before = len(learner.ends)
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            time.sleep(SAMPLE_S)
            verdicts.append(advisor.see(sampler.take()))
        ends, shares = learner.ends[before:], advisor.window.shares
        advised = [advice for advice in verdicts if advice is not None and advice.side != "unknown"]
        if shares is None or not advised:
            raise ValueError(f"{actors} actors, {setting}: {seconds:g} s were too short for any advice")
        return {
            "actors": actors,
            "shares": shares,
            "advice": advised[-1].text,
            "side": advised[-1].side,
            "sides": sorted({advice.side for advice in advised}),
            "steps_per_s": (len(ends) - 1) / (ends[-1] - ends[0]),
        }


def _wait_until_all_serve(swarm: Swarm, actors: int) -> None:
    deadline = time.monotonic() + TIMEOUT_S
    while swarm.serving < actors:
        if time.monotonic() > deadline:
            raise TimeoutError(f"waited {TIMEOUT_S:g} s for {actors} actors to serve, {swarm.serving} do")
        time.sleep(0.05)


def predictions(found: dict[int, dict[str, Any]]) -> list[dict[str, Any]]:
    """Every pair (n, m) that the advisor would speak of: predicted and measured change of throughput."""
    pairs = []
    for n, before in found.items():
        shares: Shares = before["shares"]
        for m, after in found.items():
            if m != n and m <= GROWTH * n and (m > n) == (before["side"] == "rollout"):
                predicted = speedup(n, shares.busy, shares.waiting, m)
                measured = after["steps_per_s"] / before["steps_per_s"]
                pairs.append(
                    {
                        "from": n,
                        "to": m,
                        "predicted": predicted,
                        "measured": measured,
                        "error": predicted / measured - 1,
                    }
                )
    return pairs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=20.0, help="of each run")
    parser.add_argument("--counts", default="1,2,3,4,6")
    parser.add_argument("--settings", default="", help="of these names alone, with semicolons between them")
    options = parser.parse_args()
    settings = {name: SETTINGS[name] for name in options.settings.split(";")} if options.settings else SETTINGS
    console, rows = Console(width=150), []
    table = Table("setting", "from", "to", "predicted", "measured", "error", title="what m actors instead of n bring")
    for name, setting in settings.items():
        found = {n: run(n, options.seconds, setting) for n in map(int, options.counts.split(","))}
        for n, result in found.items():
            sides = f" (sides on the way: {', '.join(result['sides'])})" if len(result["sides"]) > 1 else ""
            console.print(f"{name}, {n} actors: {result['steps_per_s']:.2f} steps/s; {result['advice']}{sides}")
        for pair in predictions(found):
            rows.append({"setting": name} | asdict(setting) | pair)
            cells = (f"{pair['predicted']:.2f}", f"{pair['measured']:.2f}", f"{pair['error']:+.1%}")
            table.add_row(name, str(pair["from"]), str(pair["to"]), *cells)
    console.print(table)
    errors = [abs(row["error"]) for row in rows]
    within = sum(error <= GOAL for error in errors)
    spread = f"median {statistics.median(errors):.1%}, largest {max(errors):.1%}"
    console.print(f"{within} of {len(errors)} within {GOAL:.0%}; {spread}")
    command = f"python -m benchmarks.advisor --seconds {options.seconds:g} --counts {options.counts}"
    command += f' --settings "{options.settings}"' if options.settings else ""
    described = machine() | {"command": command}
    path = RESULTS / f"{described['date']}-{described['commit'] or 'uncommitted'}-advisor.json"
    path.write_text(json.dumps({"machine": described, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
