"""Makes run directories as runs leave them, second by second, and looks at their page in a browser. Not a test itself.

python -m tests.dashboard_harness make DIR [ACTORS] [SECONDS]     a made-up run, for looking at the page
python -m tests.dashboard_harness shots RUN OUT                   the README's screenshots of a run, into a directory
"""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from random import Random
from typing import Any

import msgspec
import numpy as np
from safetensors.numpy import save_file

from deploy.dashboard.server import Dashboard, open_socket
from learner.intake.journal import Journal
from learner.telemetry.advisor import Advisor
from learner.telemetry.events import note_event
from learner.telemetry.sample import LEARNER_PHASES, ActorSample, Sample
from learner.telemetry.timeline import Timeline
from protocol.messages import Completion, Group, TicketId
from protocol.rundir import RunDir, replace_file, write_json
from protocol.scaling import Member, Wish, write_members, write_wish

CHROMIUM = os.environ.get("TANDEM_CHROMIUM") or shutil.which("chromium") or shutil.which("chromium-browser") or ""
NO_BROWSER = "needs a Chromium: `apt install chromium`, or its path in TANDEM_CHROMIUM"
SHOTS = Path(os.environ.get("TANDEM_SCREENSHOTS", "build/screenshots"))
"""Where tests leave pictures of what they saw."""

RECIPE = """
name = "{name}"
method = "{method}"
steps = {steps}
[model]
path = "HuggingFaceTB/SmolLM2-360M-Instruct"
[rollout]
groups_per_step = 32
group_size = 8
max_tokens = 256
max_lag = 1
[optim]
lr = 2e-6
"""
TICK_S = 0.25
GROUP_SIZE, GROUPS_PER_STEP, JOURNALED = 8, 32, 5
TRAIN_S, PUBLISH_S, SWAP_S, SAVE_S, EVAL_S = 4.0, 0.5, 0.75, 1.5, 9.0
TOKENS_PER_S, GROUP_TOKENS = 1900.0, 1280
DENSE_BYTES = 724_000_000


class MadeRun:
    """A run that a simulation of both sides writes, with the learner's own timeline, journal and events."""

    def __init__(self, path: Path, actors: int = 2, steps: int = 250, method: str = "grpo", began: float = 0.0) -> None:
        """`began`: when it did, Unix time; 0: now."""
        self.run = RunDir(path.resolve()).create()
        self.run.recipe.write_text(RECIPE.format(name=path.name, method=method, steps=steps))
        self.steps, self.method, self.random = steps, method, Random(7)
        self.t = self.began = began or time.time()
        self.process, self.step, self.version, self.branch = 4711, 0, 1, 0
        self.phases = dict.fromkeys(LEARNER_PHASES, 0.0)
        self.phase, self.left = "starting", 3.0
        self.groups = self.queued = 0.0
        self.trained_tokens = self.weights_bytes = 0
        self.advisor = Advisor()
        self.timeline = Timeline(self.run.timeline, 0.2)
        self.journal = Journal(self.run.journal) if method == "grpo" else None
        self.actors: dict[str, dict[str, float]] = {}
        self.gone: set[str] = set()
        self.hostile = False
        """Whether completions try to be markup."""
        self.scale(actors if method == "grpo" else 0)
        if method == "grpo":
            write_wish(self.run, Wish(actors, "the recipe"))
        self.write_status()

    def scale(self, count: int) -> None:
        """So many actors are there; newcomers start."""
        wanted = [f"actor-{number}" for number in range(count)]
        for name in wanted:
            self.gone.discard(name)
            speed = 0.85 + 0.3 * self.random.random()
            new = {
                "tokens": 0,
                "serving": 0,
                "busy": 0,
                "paused": 0,
                "starts": 6 + 4 * speed,
                "speed": speed,
                "swap": 0,
            }
            self.actors.setdefault(name, new)
        for name in [name for name in self.actors if name not in wanted]:
            self.kill(name)
        write_members(self.run, [Member(name, "running", "127.0.0.1", "", "serving") for name in self.actors])

    def kill(self, name: str) -> None:
        """An actor is gone until `scale` brings it back."""
        del self.actors[name]
        self.gone.add(name)

    # --- the simulation ---

    def advance(self, seconds: float, sample_every: float = 1.0) -> None:
        """Go on for so long, and write what both sides would have."""
        due = self.t
        for _ in range(round(seconds / TICK_S)):
            self.t += TICK_S
            self.draw()
            self.learn()
            if self.t - due >= sample_every:
                due = self.t
                self.write_sample()

    def draw(self) -> None:
        """What the actors do in one tick: held back where the learner is more than a lag behind."""
        room = max(0.0, 2 * GROUPS_PER_STEP - self.queued)
        serving = [actor for actor in self.actors.values() if actor["starts"] <= 0]
        for actor in self.actors.values():
            if actor["starts"] > 0:
                actor["starts"] -= TICK_S
                continue
            actor["serving"] += TICK_S
            if actor["swap"] > 0:
                actor["swap"] -= TICK_S
                actor["paused"] += TICK_S
                actor["busy"] += TICK_S
                continue
            if room <= 1:
                actor["idle"] = 1
                continue
            actor["idle"] = 0
            share = min(1.0, room / max(1.0, 1.2 * len(serving)))
            tokens = int(TOKENS_PER_S * actor["speed"] * share * TICK_S * (0.9 + 0.2 * self.random.random()))
            actor["tokens"] += tokens
            actor["busy"] += TICK_S
            self.groups += tokens / GROUP_TOKENS
            self.queued += tokens / GROUP_TOKENS

    def learn(self) -> None:
        """What the learner does in one tick."""
        self.phases[self.phase] += TICK_S
        self.left -= TICK_S
        if self.phase == "finished" or (self.left > 0 and self.phase != "waiting"):
            return
        if self.phase == "starting":
            self.enter("evaluating", EVAL_S) if self.method == "grpo" else self.enter("training", TRAIN_S / 4)
        elif self.phase == "waiting":
            if self.queued >= GROUPS_PER_STEP:
                self.queued -= GROUPS_PER_STEP
                self.enter("training", TRAIN_S * (0.9 + 0.2 * self.random.random()))
        elif self.phase == "training":
            self.end_step()
            self.enter("publishing", PUBLISH_S) if self.method == "grpo" else self.enter("training", TRAIN_S / 4)
        elif self.phase == "publishing" and self.step % 10 == 0:
            note_event_at(self.run, self.t, "checkpoint", f"checkpoint of step {self.step} written in {SAVE_S} s")
            self.enter("saving", SAVE_S)
        elif self.phase == "evaluating":
            self.evaluation("before", 0.09)
            self.enter("waiting", 0)
        else:
            self.enter("waiting", 0)

    def enter(self, phase: str, seconds: float) -> None:
        self.phase, self.left = phase, seconds

    def end_step(self) -> None:
        self.step += 1
        self.version += 1
        self.trained_tokens += int(GROUPS_PER_STEP * GROUP_TOKENS * 0.8)
        for actor in self.actors.values():
            actor["swap"] = SWAP_S if actor["starts"] <= 0 else 0
            self.weights_bytes += int(6.5e6 * (0.8 + 0.4 * self.random.random()))
        self.write_step()
        if self.journal is not None:
            self.write_groups(self.journal)
        if self.step % 10 == 0:
            self.evaluation(f"step-{self.step:05d}", self.progress + 0.05)

    def roll_back(self, step: int) -> None:
        """Go on after an earlier step, on a new branch."""
        rows = self.run.metrics.read_text().splitlines(keepends=True)
        replace_file(self.run.metrics, "".join(rows[:step]))
        self.step, self.branch = step, self.branch + 1

    @property
    def progress(self) -> float:
        return 0.09 + 0.68 / (1 + math.exp(-(self.step - 22) / 7))

    # --- what it writes ---

    def evaluation(self, name: str, reward: float) -> None:
        reward = round(min(1.0, reward + 0.03 * (self.random.random() - 0.5)), 4)
        write_json(
            self.run.eval / f"{name}.json", {"name": name, "reward": reward, "reward_ci95": 0.045, "problems": 64}
        )

    def write_step(self) -> None:
        wobble, done = lambda size: size * (self.random.random() - 0.5), self.progress
        row: dict[str, Any] = {
            "step": self.step, "loss": 0.9 - done + wobble(0.1), "entropy": 0.92 - 0.7 * done + wobble(0.06),
            "grad_norm": 0.4 + 0.5 * self.random.random() ** 3, "lr": 2e-6 * min(1.0, self.step / 5),
            "train_s": TRAIN_S + wobble(0.6), "tokens": 32768.0,
        }  # fmt: skip
        if self.method == "grpo":
            row |= {
                "reward_mean": done + wobble(0.1), "reward_std": 0.4, "kl_k3": 0.002 + 0.002 * self.random.random(),
                "engine_gap": 0.011 + wobble(0.002), "clipped_share": 0.004 + 0.01 * self.random.random() * done,
                "importance_truncated_share": 0.001, "completion_tokens_mean": 90 + 80 * done + wobble(12),
                "truncated_completions_share": max(0.0, 0.16 - 0.15 * done + wobble(0.03)),
                "zero_variance_share": min(1.0, 0.2 + 0.35 * done + wobble(0.1)), "lag_mean": 0.8 + wobble(0.3),
                "lag_max": 1.0, "publish_s": PUBLISH_S + wobble(0.1), "wait_s": abs(wobble(1.0)),
                "version": self.version,
            }  # fmt: skip
        else:
            row["nll"] = row["loss"]
        with open(self.run.metrics, "a") as file:
            file.write(json.dumps(row) + "\n")
        self.write_status()

    def write_status(self, **end: str) -> None:
        """`end`: the learner's last words."""
        left_s = (self.steps - self.step) * (self.t - self.began) / self.step if self.step else None
        words = {"evaluating": "evaluation before", "starting": "starting"}
        write_json(self.run.status, {
            "phase": words.get(self.phase, "training"), "step": self.step, "steps": self.steps, "left_s": left_s,
            "started_at": self.began, "written_at": self.t, "waiting_for": "", "waited_s": 0.0,
        } | end)  # fmt: skip

    def write_sample(self) -> None:
        sample = Sample(
            t=self.t, process=self.process, step=self.step, version=self.version, phase=self.phase,
            phases={name: seconds for name, seconds in self.phases.items() if seconds},
            waits={"groups": self.phases["waiting"]}, groups=int(self.groups), trained_tokens=self.trained_tokens,
            tickets={} if self.method != "grpo" else {
                "issued": int(self.groups) + 12, "trained": self.step * GROUPS_PER_STEP, "queued": int(self.queued),
                "leased": 6 * len(self.actors),
            },
            backlog=max(0, 14 - 4 * len(self.actors)), versions=self.version, weights_bytes=self.weights_bytes,
            dense_bytes=DENSE_BYTES, wanted=len(self.actors) if self.method == "grpo" else None,
            started=len(self.actors), actors={
                **{name: self.actor(actor) for name, actor in self.actors.items()},
                **{name: ActorSample("gone") for name in self.gone},
            },
            memory={"resident": 3_900_000_000 + 400_000 * self.step},
        )  # fmt: skip
        self.timeline.write(msgspec.structs.replace(sample, advice=self.advisor.see(sample)), force=True)

    def actor(self, actor: dict[str, float]) -> ActorSample:
        if actor["starts"] > 0:
            return ActorSample("starting", "loading")
        state = "updating" if actor["swap"] > 0 else "waiting" if actor.get("idle") else "generating"
        return ActorSample(
            state, "serving", self.version, held=6, running=41 if state == "generating" else 0, room=64,
            tokens=int(actor["tokens"]), serving_s=actor["serving"], busy_s=actor["busy"], paused_s=actor["paused"],
            running_s=40 * actor["busy"], pause_s=0.21 + 0.03 * actor["speed"], fetch_s=0.38 + 0.1 * actor["speed"],
            swaps=self.step, rss_bytes=int(5.1e9 + 2e8 * actor["speed"]),
        )  # fmt: skip

    def write_groups(self, journal: Journal) -> None:
        """A few of the step's groups: enough to look at."""
        if not (self.run.rollouts / "tokenizer.json").exists():
            self.run.rollouts.mkdir(exist_ok=True)
            tokenizer().save(str(self.run.rollouts / "tokenizer.json"))
        groups = [made_group(self, number) for number in range(JOURNALED)]
        for group in groups:
            journal.append_group(group)
        ids = [(group.id.epoch, group.id.index) for group in groups]
        journal.append_step(self.step, self.version, ids)
        keep_logprobs(self, groups)

    def finish(self) -> None:
        """The last word of a run that has made its steps."""
        self.phase = "finished"
        self.t += 1.0
        self.evaluation("after", self.progress + 0.05)
        self.write_sample()
        self.write_status(phase="finished")
        note_event_at(self.run, self.t, "finished", f"{self.step} steps, the model is in model/")
        write_json(self.run.summary, {
            "name": self.run.path.name, "method": self.method, "steps": self.step, "wall_s": self.t - self.began,
            "rollout_tokens_per_s": 3600.0, "learner_tokens_per_s": 8192.0,
            "actors": {"max": len(self.actors), "restarted": 0},
        })  # fmt: skip

    def close(self) -> None:
        self.timeline.close()
        if self.journal is not None:
            self.journal.close()


def note_event_at(run: RunDir, t: float, kind: str, text: str) -> None:
    """As `note_event`, at a time of the simulation."""
    note_event(run.events, kind, text)
    lines = run.events.read_text().splitlines()
    lines[-1] = json.dumps(json.loads(lines[-1]) | {"t": t})
    run.events.write_text("\n".join(lines) + "\n")


# --- rollouts -----------------------------------------------------------------------------------------------------

HOSTILE = "<img src=x onerror=\"document.title='hacked'\">"
PIECES = (
    "<|im_start|>", "<|im_end|>", "user", "assistant", "\n", "What", " is", " ", "+", " +", "?", ".", ",", " =",
    "First", " add", " the", " ones", " tens", " digits", ":", " carry", " So", "The", " sum", " gives", " we",
    " Let", " me", " check", " that", " again", "</think>", "<think>", "<answer>", "</answer>", " plus", " then",
    " one", "-", HOSTILE, *map(str, range(200)),
)  # fmt: skip
LONGEST_FIRST = re.compile("|".join(map(re.escape, sorted(PIECES, key=len, reverse=True))))
NUMBER = {piece: number for number, piece in enumerate(PIECES)}


def tokenizer() -> Any:
    """Each of `PIECES` is a token."""
    from tokenizers import Tokenizer, decoders, models

    made = Tokenizer(models.WordLevel(NUMBER, unk_token="?"))
    made.decoder = decoders.Fuse()
    return made


def pieces_of(text: str) -> list[str]:
    """The tokens of a text, which must consist of such."""
    found = LONGEST_FIRST.findall(text)
    assert "".join(found) == text
    return found


def answer_to(made: MadeRun, a: int, b: int, answer: str) -> str:
    """A chain of thought with this answer."""
    ones = a % 10 + b % 10
    carry = " So we carry one, then add the tens.\n" if ones > 9 else ""
    again = f" Let me check that again. {a} plus {b} gives {answer}." if made.random.random() < 0.5 else ""
    hostile = HOSTILE if made.hostile else ""
    return f"<think>First add the ones digits: {a % 10} + {b % 10} = {ones}.{carry}{again}{hostile}"


def made_group(made: MadeRun, number: int) -> Group:
    """Sums of two numbers, thought about at length, right more often as the run goes on."""
    random = made.random
    a, b = random.randrange(10, 90), random.randrange(10, 90)
    prompt = f"<|im_start|>user\nWhat is {a} + {b}?<|im_end|>\n<|im_start|>assistant\n"
    texts, completions, logprobs = [], [], []
    for _ in range(GROUP_SIZE):
        right, cut = random.random() < made.progress, random.random() > 0.92
        answer = str(a + b if right else a + b + random.choice((-10, -1, 1, 10)))
        end = "" if cut else f"</think>\nThe sum is {answer}.\n<answer>{answer}</answer><|im_end|>"
        words = pieces_of(answer_to(made, a, b, answer) + end)
        texts.append(words)
        crossed = random.randrange(4, len(words)) if random.random() < 0.6 else 0
        spans = ((max(1, made.version - 2), 0), (made.version - 1, crossed)) if crossed else ((made.version - 1, 0),)
        scores = {"reward": float(right and not cut), "answer": float(right), "format": float(not cut)}
        completions.append(Completion(len(words), spans, "length" if cut else "stop", scores, "".join(words)))
        logprobs += [-0.02 - 2.4 * random.random() ** 4 for _ in words]
    ids = [NUMBER[word] for words in texts for word in words]
    return Group(
        id=TicketId(made.branch, made.step * JOURNALED + number), kind="train", attempt=1, actor=f"actor-{number % 2}",
        prompt_ids=tuple(NUMBER[word] for word in pieces_of(prompt)), temperature=1.0, completions=tuple(completions),
        token_ids=np.array(ids, "<i4").tobytes(), logprobs=np.array(logprobs, "<f4").tobytes(), mask=b"\1" * len(ids),
    )  # fmt: skip


def keep_logprobs(made: MadeRun, groups: list[Group]) -> None:
    """As the learner does (`learner/rollout_files.py`): groups whose rewards agree were not trained on."""
    logprobs, advantages = [], []
    for group in groups:
        engine = np.frombuffer(group.logprobs, "<f4")
        drift = np.array(
            [made.random.gauss(0.0, 0.1) * (4 if made.random.random() < 0.12 else 1) for _ in engine], "<f4"
        )
        rewards = np.array([completion.scores["reward"] for completion in group.completions], "<f4")
        logprobs.append(np.minimum(engine + drift, -1e-3) if rewards.std() else np.full(len(engine), np.nan, "<f4"))
        advantages.append((rewards - rewards.mean()) / (rewards.std() + 1e-4))
    tensors = {
        "logprobs": np.concatenate(logprobs).astype("<f4"),
        "advantages": np.concatenate(advantages).astype("<f4"),
        "tokens": np.array([c.num_tokens for group in groups for c in group.completions], np.int32),
        "completions": np.array([len(group.completions) for group in groups], np.int32),
    }
    about = {
        "step": str(made.step), "version": str(made.version), "branch": str(made.branch),
        "ids": json.dumps([[group.id.epoch, group.id.index] for group in groups]),
    }  # fmt: skip
    save_file(tensors, made.run.rollouts / f"step-{made.step:08d}.safetensors", about)


# --- the browser --------------------------------------------------------------------------------------------------


@contextmanager
def served(run: RunDir) -> Iterator[Dashboard]:
    """The run's page, on a port of its own."""
    with Dashboard(run, open_socket(port=0)) as dashboard:
        yield dashboard


@contextmanager
def browser() -> Iterator[Any]:
    """A headless Chromium of the system; nothing is downloaded."""
    from playwright.sync_api import sync_playwright

    flags = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--no-first-run"]
    with sync_playwright() as playwright:
        found = playwright.chromium.launch(executable_path=CHROMIUM, args=flags)
        try:
            yield found
        finally:
            found.close()


def screenshots(run: RunDir, directory: Path) -> None:
    """The two pictures of the README."""
    directory.mkdir(parents=True, exist_ok=True)
    with served(run) as dashboard, browser() as chromium:
        for scheme, name, place, height in (
            ("light", "dashboard-light", "", 1070),
            ("dark", "dashboard-rollouts-dark", "#rollouts", 900),
        ):
            context = chromium.new_context(viewport={"width": 1280, "height": height}, color_scheme=scheme)
            page = context.new_page()
            page.goto(dashboard.address)
            page.wait_for_selector("#chart-throughput .uplot")
            if place:
                page.evaluate("place => { location.hash = place }", place)
                page.wait_for_selector("#group .tokens")
                mixed = page.locator("#groups a").filter(has=page.locator("b").get_by_text(re.compile(r"^0\.[3-7]")))
                if mixed.count():  # where all rewards are the same, nothing was trained on
                    mixed.first.click()
                    page.wait_for_selector("#group .tokens")
            page.wait_for_timeout(500)
            page.screenshot(path=directory / f"{name}.png")
            context.close()


def main(argv: list[str]) -> int:
    match argv:
        case ["make", directory, *numbers]:
            actors, seconds = (int(number) for number in [*numbers, *("4", "600")[len(numbers) :]])
            made = MadeRun(Path(directory), actors, began=time.time() - seconds)
            made.advance(seconds)
            made.close()
        case ["shots", run, directory]:
            screenshots(RunDir(Path(run).resolve()), Path(directory))
        case _:
            print(__doc__, file=sys.stderr)
            return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
