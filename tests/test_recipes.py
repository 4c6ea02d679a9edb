"""Every recipe that comes with Tandem: it is sound, it says what it is, and it runs (with the fake engine).

GPU recipes are checked whole, as before a start, with a tiny model and a few problems in GSM8K's format for what would
come from the hub. CPU recipes are run for two steps, learner and actor as two commands, which starts no Ray.
tests/real/test_recipes.py runs them with vLLM.
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from deploy.datasets import resolve_task
from deploy.evaluation import TEMPLATE_STOPS
from deploy.preflight import check_task_grader, preflight
from deploy.ray_cluster import share_gpus
from learner.intake.templates import builtin_templates, load_template
from protocol.config import OFFLINE_METHODS, ROLLOUT_METHODS, Recipe, load_recipe
from protocol.rundir import RunDir, read_json, read_jsonl
from tests.run_harness import TANDEM, Command
from tests.tiny_model import make_tiny_model

ROOT = Path(__file__).resolve().parent.parent
RECIPES = sorted((ROOT / "recipes").rglob("*.toml"))
CPU = [path for path in RECIPES if path.parent.name == "cpu"]
GPU = [path for path in RECIPES if path.parent.name == "gsm8k"]

CONTEXT = {"bundled": 8192, "Qwen/Qwen2.5-Math-1.5B": 4096, "Qwen/Qwen2.5-0.5B-Instruct": 32768}
"""Most tokens of the models, by their configurations."""
EXPERIMENTS = {"sft", "expert_iteration", "grpo_r1_zero", "grpo_question_only", "dr_grpo", "dapo", "eval"}
TINY_LENGTH = 4096
START_S = 200
TEST_OF_RUNS = "test_cpu_recipe_runs_and_leaves_what_its_method_must"

FAKE = (
    "actor.engine=fake", "model.dtype=float32", "model.max_model_len=1024", "wire.heartbeat_s=0.2",
    "wire.dead_after_s=10.0", "eval.prompts=2", "eval.samples=2", "task.max_operand=2", "rollout.groups_per_step=4",
    "rollout.group_size=16", "rollout.max_tokens=3", "rollout.max_lag=0", "optim.warmup_steps=0",
)  # fmt: skip
"""With answers 0 to 4 and at most three digits, one completion of the fake engine in 30 is right."""
OF_METHOD = {
    "grpo": (), "eval": (), "dpo": ("steps=2", "dpo.batch_size=2"), "sft": ("steps=2", "sft.batch_size=2"),
    "expert_iteration": ("steps=2",),
}  # fmt: skip
FIGURES = {
    "sft": {"nll", "loss", "grad_norm"},
    "dpo": {"dpo_accuracy", "dpo_margin", "dpo_chosen_reward", "dpo_rejected_reward"},
    "expert_iteration": {"reward_mean", "kept_completions", "lag_mean", "version"},
    "grpo": {"reward_mean", "format_reward_mean", "answer_reward_mean", "zero_variance_share", "lag_mean", "version"},
}


def identify(path: Path) -> str:
    return f"{path.parent.name}/{path.stem}"


def sets(overrides: tuple[str, ...]) -> list[str]:
    return [part for override in overrides for part in ("--set", override)]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """It knows bytes only, so that its prompts are some four times as long as a real model's."""
    return make_tiny_model(tmp_path_factory.mktemp("recipes") / "tiny", max_length=TINY_LENGTH)


# --- all of them ------------------------------------------------------------------------------------------------------


def test_there_is_a_recipe_for_every_experiment() -> None:
    assert {path.stem for path in CPU} == EXPERIMENTS | {"dpo"}
    for prefix in ("qwen2.5-math-1.5b", "qwen2.5-0.5b-instruct"):
        assert {path.stem.removeprefix(f"{prefix}-") for path in GPU if path.stem.startswith(prefix)} == EXPERIMENTS
    assert len(RECIPES) == len(CPU) + len(GPU) + 1


@pytest.mark.parametrize("path", RECIPES, ids=identify)
def test_recipe_is_accepted_by_what_the_preflight_checks(path: Path) -> None:
    recipe = load_recipe(path)
    check_task_grader(recipe.task.grader)
    load_template(recipe.task.template)
    assert recipe.task.template in {"chat", *builtin_templates()}, "no file of its author's"
    assert list(recipe.rollout.stop) == TEMPLATE_STOPS.get(recipe.task.template, [])
    if recipe.task.template != "chat":
        assert recipe.task.grader == recipe.task.template or f"{recipe.task.template}." in recipe.task.grader
    assert recipe.model.max_model_len <= CONTEXT[recipe.model.path]


@pytest.mark.parametrize("path", [*CPU, *GPU], ids=identify)
def test_recipe_says_what_it_is(path: Path) -> None:
    header = [line.removeprefix("#").strip() for line in path.read_text().splitlines() if line.startswith("#")]
    file = path.relative_to(ROOT)
    assert f"Run: tandem train {file}" in header
    assert any(line.startswith("Paper: ") for line in header)
    assert load_recipe(path).name == (f"cpu-{path.stem}" if path in CPU else path.stem)
    listed = (ROOT / "recipes" / "README.md").read_text()
    assert f"({path.parent.name}/{path.name})" in listed
    if path in GPU:
        assert any("not run" in line for line in header)


# --- GPU recipes ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def gsm8k(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ...]:
    """Overrides that name files in GSM8K's format."""
    directory = tmp_path_factory.mktemp("gsm8k")
    for split, count in (("train", 24), ("test", 8)):
        problems = [
            {
                "question": f"Anna ({split}) has {n} boxes of 90 pens each. How many pens has she?",
                "answer": f"She has {n} * 90 = <<{n}*90={n * 90}>>{n * 90:,} pens.\n#### {n * 90:,}",
            }
            for n in range(1, 1 + count)
        ]
        (directory / f"{split}.jsonl").write_text("".join(json.dumps(problem) + "\n" for problem in problems))
    return f'task.train="{directory}/train.jsonl"', f'task.heldout="{directory}/test.jsonl"', "eval.prompts=8"


@pytest.mark.parametrize("path", GPU, ids=identify)
def test_gpu_recipe_passes_the_whole_preflight(path: Path, model: Path, gsm8k: tuple[str, ...]) -> None:
    small = (f'model.path="{model}"', f"model.max_model_len={TINY_LENGTH}", *gsm8k)
    recipe = resolve_task(load_recipe(path, small), print)
    assert preflight(recipe, print) == model
    assert recipe.task.name == "gsm8k"
    for gpus, each_actor in ((["0"], 0.5), (["0", "1"], 1.0)):
        assert share_gpus(recipe, gpus).each_actor == each_actor


@pytest.mark.parametrize("path", [path for path in GPU if load_recipe(path).method != "eval"], ids=identify)
def test_gpu_recipe_watches_itself_and_can_go_on(path: Path) -> None:
    recipe = load_recipe(path)
    assert recipe.eval.prompts >= 256
    assert recipe.eval.every_steps
    assert recipe.checkpoint.every_steps
    assert recipe.learner.gradient_checkpointing
    if recipe.method == "grpo":
        assert recipe.guard.policy == "rollback"
        assert recipe.grpo.importance_cap > 0


# --- CPU recipes ------------------------------------------------------------------------------------------------------


@dataclass
class Ran:
    """What a run left."""

    recipe: Recipe
    run: RunDir
    rows: list[dict[str, Any]]
    summary: dict[str, Any]
    evals: dict[str, dict[str, Any]]


def run_small(path: Path, model: Path, directory: Path) -> Ran:
    """A recipe of this machine for two steps: `tandem learner` and `tandem actor`."""
    recipe = load_recipe(path)
    overrides = [f'model.path="{model}"', *FAKE, *OF_METHOD[recipe.method]]
    if recipe.method == "grpo":
        overrides += ["steps=2", "warm_start.examples=2", "warm_start.batch_size=2", "warm_start.epochs=1"]
        if recipe.grpo.overlong == "penalty":
            overrides.append("grpo.overlong_buffer=1")
    run = RunDir(directory / "runs" / recipe.name)
    learner = ["learner", str(path), "--runs", str(run.path.parent), *sets(tuple(overrides))]
    with Command(learner, directory / "learner.log") as left:
        left.until(run.endpoint.exists, "endpoint", START_S)
        with Command(["actor", str(run.endpoint)], directory / "actor.log") as right:
            assert left.wait(START_S) == 0, left.output()
            assert right.wait(START_S) == 0, right.output()
    evals = {file.stem: read_json(file) for file in run.eval.glob("*.json")}
    return Ran(load_recipe(run.recipe), run, read_jsonl(run.metrics), read_json(run.summary), evals)


@pytest.fixture(scope="module")
def runs(
    request: pytest.FixtureRequest, model: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[Path, Future[Ran]]]:
    """The CPU recipes that are asked for, two at a time: most of a run is imports, on one core."""
    asked = [item.callspec.params["path"] for item in request.session.items if item.originalname == TEST_OF_RUNS]
    with ThreadPoolExecutor(2) as pool:
        started = {path: pool.submit(run_small, path, model, tmp_path_factory.mktemp(path.stem)) for path in asked}
        yield started
        for future in started.values():
            future.cancel()


def versions_of(recipe: Recipe) -> list[int]:
    """Steps that the versions of a run of two steps have seen."""
    if recipe.method == "eval":
        return [0]
    if recipe.method in OFFLINE_METHODS:
        return [0, 2]
    return [0, *([0] if recipe.warm_start.examples else []), 1, 2]


@pytest.mark.timeout(600)
@pytest.mark.parametrize("path", CPU, ids=identify)
def test_cpu_recipe_runs_and_leaves_what_its_method_must(path: Path, runs: dict[Path, Future[Ran]]) -> None:
    ran = runs[path].result()
    recipe, steps = ran.recipe, 0 if ran.recipe.method == "eval" else 2
    assert (ran.summary["method"], ran.summary["steps"]) == (recipe.method, steps)
    assert [row["step"] for row in ran.rows] == list(range(1, steps + 1))
    assert [row["step"] for row in read_jsonl(ran.run.versions)] == versions_of(recipe)
    assert_measured(ran)
    if recipe.method == "eval":
        assert not ran.run.checkpoint_steps()
        return
    assert max(ran.run.checkpoint_steps()) == 2
    assert (ran.run.model / "model.safetensors").is_file()
    for row in ran.rows:
        assert row.keys() >= FIGURES[recipe.method]
        assert None not in row.values(), "a figure that is not finite"
    if recipe.optim.schedule == "cosine":
        assert ran.rows[0]["lr"] == pytest.approx(recipe.optim.lr)
        assert ran.rows[1]["lr"] < ran.rows[0]["lr"]
    if recipe.method in ROLLOUT_METHODS:
        assert_rolled_out(ran)
    else:
        assert ran.summary["reward_first"] is None
        assert all(row["updates"] == 1 for row in ran.rows)
    if recipe.method == "dpo":
        assert ran.run.reference.is_file()
        assert ran.rows[0]["dpo_margin"] == pytest.approx(0, abs=1e-6), "at first it is the reference itself"


def assert_measured(ran: Ran) -> None:
    """Each evaluation with one version: the one that it is of."""
    names = ["eval"] if ran.recipe.method == "eval" else ["before", "after"]
    if ran.recipe.warm_start.examples:
        names.insert(1, "after_warm_start")
    last = len(versions_of(ran.recipe))
    expected = {"eval": 1, "before": 1, "after_warm_start": 2, "after": last}
    assert {name: list(result["version_tokens"]) for name, result in ran.evals.items()} == {
        name: [str(expected[name])] for name in names
    }
    for name, result in ran.evals.items():
        assert (result["problems"], result["samples"], result["failed"], result["grader_errors"]) == (2, 2, 0, 0)
        assert result["format_rate"] is not None
        assert ran.summary["eval" if name == "eval" else f"eval_{name}"] == result["reward"]
        assert len(read_jsonl(ran.run.eval / f"{name}_responses.jsonl")) == 4


def assert_rolled_out(ran: Ran) -> None:
    """Every completion graded; what is right was learned from, in the way of the recipe."""
    rows, recipe = ran.rows, ran.recipe
    tickets = ran.summary["tickets"]
    assert tickets["trained"] == 8
    assert ran.summary["reward_last"] == rows[-1]["reward_mean"]
    assert all(row["grader_errors"] == 0 for row in rows)
    assert [row["version"] for row in rows] == [len(versions_of(recipe)) - 1, len(versions_of(recipe))]
    right = [row["reward_mean"] > 0 for row in rows]
    if recipe.task.grader == "r1_zero":  # the fake engine writes digits, never a tag
        assert not any(right)
        assert all(row["updates"] == 0 and row["format_reward_mean"] == 0 for row in rows)
        return
    assert any(right), "with this seed some completion is right, or nothing is tested"
    assert [row["updates"] > 0 for row in rows] == right
    if recipe.method == "expert_iteration":
        assert [row["kept_completions"] > 0 for row in rows] == right
        assert ran.summary["learner_tokens"] == sum(row["tokens"] for row in rows)
    if recipe.rollout.dynamic_sampling:
        filtered = [row.get("filtered_groups", 0) for row in rows]
        assert any(filtered)
        assert tickets["filtered"] >= sum(filtered)
        assert max(filtered) <= recipe.rollout.max_filtered_per_step


@pytest.mark.timeout(300)
def test_offline_recipe_without_evaluation_needs_no_actor(model: Path, tmp_path: Path) -> None:
    """The whole command, the launcher included: neither Ray nor an engine is started."""
    overrides = (f'model.path="{model}"', *FAKE, *OF_METHOD["sft"], "eval.prompts=0")
    command = [*TANDEM, "train", str(ROOT / "recipes/cpu/sft.toml"), "--runs", str(tmp_path), *sets(overrides)]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=START_S, check=False)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    run = RunDir(tmp_path / "cpu-sft")
    assert read_json(run.summary)["actors"] == {"started": 0, "restarted": 0, "max": 0}
    assert "starting Ray" not in ended.stdout
    assert read_jsonl(run.versions) == []
    assert (run.model / "model.safetensors").is_file()
