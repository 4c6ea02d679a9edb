"""What `tandem status` shows of a run directory, and which run it means."""

from __future__ import annotations

import io
import json
from pathlib import Path

import msgspec
import pytest
from rich.console import Console

from deploy.status import POINTS, RunWatch, screen, show
from learner.telemetry.events import note_event
from learner.telemetry.sample import ActorSample, Advice, Sample
from learner.telemetry.timeline import Timeline
from protocol.rundir import RunDir, read_json, write_json
from protocol.scaling import Member, Wish, write_members, write_wish

BEGAN = 1_700_000_000.0


def sample(t: int) -> Sample:
    """Two actors draw 100 tokens a second, three parts of four of their time; the learner waits for half of its own."""
    actor = ActorSample(
        "generating", "serving", version=3, held=2, tokens=50 * t, serving_s=t, busy_s=0.75 * t, swaps=3, fetch_s=0.25,
        pause_s=0.5, rss_bytes=2_000_000_000,
    )  # fmt: skip
    return Sample(
        t=BEGAN + t, process=1, step=t // 10, version=4, phase="training", phases={"waiting": t / 2, "training": t / 2},
        trained_tokens=80 * t, tickets={"queued": 5, "leased": 7, "trained": 40, "reissued": 1, "failed": 0}, backlog=3,
        dense_bytes=269_000_000, wanted=3, actors={"actor-0": actor, "actor-1": actor}, dropped={"malformed": 2},
        advice=Advice("rollout", "rollout-bound 50%: 2 more actors would help, about 2.0×"),
    )  # fmt: skip


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    """A run in mid-training."""
    run = RunDir(tmp_path / "runs" / "mine").create()
    run.recipe.write_text('name = "mine"\nsteps = 20\n')
    timeline = Timeline(run.timeline, 1.0)
    for t in range(61):
        timeline.write(sample(t), force=True)
    timeline.close()
    run.metrics.write_text(
        "".join(
            json.dumps({"step": step, "reward_mean": step / 10, "entropy": 1.5, "completion_tokens_mean": 20.0}) + "\n"
            for step in range(1, 7)
        )
    )
    write_json(run.status, {
        "phase": "training", "phase_since": BEGAN, "steps": 20, "step": 6, "started_at": BEGAN, "left_s": 125.0,
        "lag_mean": 0.5, "lag_max": 1.0, "delta_bytes": 2_500_000.0, "waiting_for": "3 groups: actor-0 serving (7 s)",
        "waited_s": 12.0, "evals": {"before": 0.125}, "written_at": BEGAN + 60,
    })  # fmt: skip
    write_wish(run, Wish(3, "tandem scale"))
    write_members(run, [Member("actor-2", "pending", why="it needs 1 GPU")])
    note_event(run.events, "warning", "actor-7 was silent for 15 s")
    return run


def text_of(run: RunDir, now: float = BEGAN + 61, width: int = 120) -> str:
    console = Console(file=io.StringIO(), width=width)
    console.print(screen(RunWatch(run), now))
    return console.file.getvalue()  # type: ignore[attr-defined,no-any-return]


def line_with(text: str, word: str) -> str:
    return next(line for line in text.splitlines() if word in line)


def test_status_shows_both_sides(run: RunDir) -> None:
    with run.lock("learner"):
        text = text_of(run)
    rollout, learner = line_with(text, "rollout  "), line_with(text, "learner  ")
    assert "  100  " in rollout and "generating 75%" in rollout and "waiting 25%" in rollout
    assert "  80  " in learner and "waiting 50%" in learner and "training 50%" in learner
    assert "rollout-bound 50%: 2 more actors would help, about 2.0×" in text


def test_status_says_what_is_waited_for(run: RunDir) -> None:
    with run.lock("learner"):
        text = text_of(run)
    assert "waiting 12 s for 3 groups: actor-0 serving (7 s)" in text
    assert "step 6/20" in text and "1:01 elapsed, about 2:05 left" in text


def test_status_shows_queue_lag_and_weights(run: RunDir) -> None:
    groups, weights = line_with(text_of(run), "groups  "), line_with(text_of(run), "weights  ")
    for part in ("5 queued", "7 with actors", "3 wait for room", "lag 0.50 steps, at most 1"):
        assert part in groups
    for part in ("version 4", "2 of 2 behind", "269 MB, delta 2.50 MB", "fetch 0.25 s, pause 0.50 s"):
        assert part in weights
    assert "1 issued again" in text_of(run) and "2 messages dropped" in text_of(run)


def test_status_shows_actors_that_are_there_and_that_are_not(run: RunDir) -> None:
    text = text_of(run)
    there = line_with(text, "actor-1 ").split()
    assert there[1:] == ["actor-1", "generating", "3", "50", "2", "2.0", "GB", "│"]
    assert "pending" in line_with(text, "actor-2 ") and "it needs 1 GPU" in line_with(text, "actor-2 ")
    assert "2 actors serve of 3 wanted" in text


def test_status_shows_curve_and_events(run: RunDir) -> None:
    text = text_of(run)
    assert "0.600" in line_with(text, "reward  ") and "▁▂▃▄▅" in line_with(text, "reward  ")
    assert "before 0.125" in text and "actor-7 was silent for 15 s" in text


def test_status_keeps_of_a_long_run_what_it_draws(run: RunDir) -> None:
    rows = [{"step": step, "reward_mean": step / 1000, "loss": 1.0} for step in range(1, 901)]
    run.metrics.write_text("".join(json.dumps(row) + "\n" for row in rows))
    watch = RunWatch(run)
    assert {key: len(curve.shown) for key, curve in watch.curves.items()} == {"reward_mean": POINTS}
    assert f"steps {901 - POINTS} to 900" in line_with(text_of(run), "reward  ")
    run.metrics.rename(run.path / "old")
    run.metrics.write_text(json.dumps({"step": 1, "entropy": 0.5}) + "\n")
    watch.look()
    assert watch.curves.keys() == {"entropy"}, "rolled back"


def test_status_of_a_learner_without_a_word(run: RunDir) -> None:
    with run.lock("learner"):
        assert "no word from the learner for 100 s" in text_of(run, now=BEGAN + 160)
    assert "no word" not in text_of(run, now=BEGAN + 160), "nobody is expected to say anything"


def test_status_of_a_learner_whose_clock_is_ahead(run: RunDir) -> None:
    with run.lock("learner"):
        assert "the learner's clock is 3540 s ahead" in text_of(run, now=BEGAN + 60 - 3540)
        assert "ahead" not in text_of(run, now=BEGAN + 59)


def test_status_after_the_clock_was_set_back_shows_what_came_since(run: RunDir) -> None:
    timeline = Timeline(run.timeline, 1.0)
    for t in range(61, 101):
        timeline.write(msgspec.structs.replace(sample(t), t=BEGAN - 3600 + t), force=True)
    timeline.close()
    with run.lock("learner"):
        text = text_of(run, now=BEGAN - 3500)
    rollout, learner = line_with(text, "rollout  "), line_with(text, "learner  ")
    assert "  100  " in rollout and "  80  " in learner and "last 0:39" in text
    assert "ahead" not in text and "no word" not in text


def test_status_is_as_close_to_a_run_whose_timeline_was_thinned_out(run: RunDir) -> None:
    """Of so many actors the file keeps a sample in minutes; the newest one is beside it."""
    timeline = Timeline(run.timeline, 600.0)
    timeline.write(sample(100))
    timeline.write(sample(300))
    timeline.close()
    with run.lock("learner"):
        text = text_of(run, now=BEGAN + 301)
    assert "no word" not in text
    assert "  100  " in line_with(text, "rollout  "), "rates reach up to it"


def test_status_expects_no_word_more_often_than_the_recipe_says(run: RunDir) -> None:
    run.recipe.write_text(run.recipe.read_text() + "[metrics]\nsample_every_s = 40.0\n")
    with run.lock("learner"):
        assert "no word" not in text_of(run, now=BEGAN + 160)
        assert "no word from the learner for 140 s" in text_of(run, now=BEGAN + 200)


def test_status_knows_each_sample_once_after_the_timeline_was_thinned_out(run: RunDir) -> None:
    watch = RunWatch(run)
    timeline = Timeline(run.timeline, 1.0, max_bytes=run.timeline.stat().st_size + 1)
    timeline.write(sample(61))
    timeline.close()
    watch.look()
    assert [one.t - BEGAN for one in watch.samples] == [*range(0, 61, 2), 61]


@pytest.mark.parametrize(
    ("status", "words"),
    [
        ({"phase": "finished"}, "finished"),
        ({"phase": "stopped"}, "stopped; it can be resumed"),
        ({"phase": "stopped by the guard", "error": "the guard ended the run: KL"}, "stopped by the guard"),
        ({"phase": "failed", "error": "RuntimeError: CUDA error"}, "failed"),
        ({}, "interrupted: its learner ended without a word"),
    ],
)
def test_status_says_how_a_run_ended(run: RunDir, status: dict[str, str], words: str) -> None:
    write_json(run.status, read_json(run.status) | status)
    head = text_of(run).splitlines()
    assert head[1].strip("│ ") == words
    assert status.get("error", "") in head[2]


def test_status_of_a_learner_that_its_launcher_starts_again(run: RunDir) -> None:
    write_json(run.status, read_json(run.status) | {"phase": "failed", "error": "RuntimeError: CUDA error"})
    with run.lock("launcher"):
        assert RunWatch(run).alive
        assert text_of(run).splitlines()[1].strip("│ ") == "failed"


@pytest.mark.parametrize("width", [80, 100, 200])
def test_status_fits_its_terminal(run: RunDir, width: int) -> None:
    assert max(len(line) for line in text_of(run, width=width).splitlines()) <= width


def test_status_of_many_actors_says_how_many_are_not_shown(run: RunDir) -> None:
    crowd = {f"actor-{n}": ActorSample("generating", version=4) for n in range(64)}
    timeline = Timeline(run.timeline, 1.0)
    timeline.write(Sample(t=BEGAN + 62, process=1, actors=crowd))
    timeline.close()
    assert "64 actors serve of 3 wanted, 52 more not shown" in text_of(run)


def test_status_before_the_first_sample(tmp_path: Path) -> None:
    run = RunDir(tmp_path / "new").create()
    run.recipe.write_text('name = "new"\n')
    with run.lock("learner"):
        assert "starting" in text_of(run)


def test_status_into_a_pipe_is_printed_once_and_ends(run: RunDir) -> None:
    console = Console(file=io.StringIO(), width=100)
    with run.lock("learner"):
        show(run, console)
    assert console.file.getvalue().count("advice") == 1  # type: ignore[attr-defined]
