"""Evaluations on the command line: the recipe of `tandem eval`, the table of its result, the comparison of two results.

Reads the files of `RunDir.eval` (`learner/evaluate.py` writes them) and starts nothing: `cli.py` runs the recipe like
any other, `report.py` prints the table when it is done.
"""

from __future__ import annotations

import json
import math
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from learner.eval_figures import CLASSES, SOLVED_REWARD, answer_score, ks_of, paired_interval, pass_at_k
from protocol.config import Recipe, apply_override, changed_keys, load_recipe, parse_recipe
from protocol.errors import RecipeError
from protocol.rundir import RunDir, read_json, read_jsonl

# --- the recipe of `tandem eval` ------------------------------------------------------------------------------------

DEFAULT_SAMPLES = 8
DEFAULT_PROMPTS = 64
MAX_TOKENS = {"gsm8k": 512}
OTHER_MAX_TOKENS = 64
PROMPT_ROOM = 512
"""Tokens left for the prompt where `model.max_model_len` is not given."""
GRADERS = {"gsm8k": "gsm8k"}
TEMPLATE_GRADERS = ("r1_zero", "question_only")
"""Templates whose form of answer a grader of the same name reads."""
TEMPLATE_STOPS = {"r1_zero": ["</answer>"]}
TRAINS_NOTHING: dict[str, Any] = {
    "method": "eval", "steps": 0, "token_budget": 0, "warm_start.examples": 0, "rollout.dynamic_sampling": False,
    "guard.policy": "off", "eval.every_steps": 0, "grpo.kl_coef": 0.0,
}  # fmt: skip
"""What an evaluation with the recipe of a training run takes out of it."""


@dataclass(frozen=True)
class EvalOptions:
    """What the command line says; None or "": nothing, so that the recipe, or else the task's default holds."""

    model: str
    task: str = ""
    data: str = ""
    dataset: str = ""
    grader: str = ""
    template: str = ""
    samples: int | None = None
    temperature: float | None = None
    prompts: str = ""
    """A number, or "all"."""
    max_tokens: int | None = None
    seed: int | None = None
    name: str = ""
    recipe: Path | None = None
    overrides: tuple[str, ...] = ()


def eval_recipe(options: EvalOptions, model_limit: Callable[[str], int]) -> Recipe:
    """The recipe of an evaluation: the task's defaults or a recipe file, then the options, then `--set`.

    `model_limit` tells how many tokens a model was made for; it is asked where there is no recipe file. Raises
    RecipeError.
    """
    defaults = {} if options.recipe else _defaults(options, model_limit)
    keys = TRAINS_NOTHING | defaults | _implied(options) | _given(options)
    overrides = (*(f"{key}={json.dumps(value, ensure_ascii=False)}" for key, value in keys.items()), *options.overrides)
    if options.recipe:
        return load_recipe(options.recipe, overrides)
    data: dict[str, Any] = {}
    for override in overrides:
        apply_override(data, override)
    return parse_recipe(data, "tandem eval")


def _given(options: EvalOptions) -> dict[str, Any]:
    """Recipe keys of the options that were given."""
    samples, max_tokens = _samples(options), options.max_tokens
    keys = {
        "name": options.name,
        "model.path": options.model,
        "seed": options.seed,
        "task.name": options.task,
        "task.train": options.data,
        "task.dataset": options.dataset,
        "task.grader": options.grader,
        "task.template": options.template,
        "eval.samples": samples,
        "eval.temperature": options.temperature,
        "eval.prompts": int(options.prompts) if options.prompts.isdecimal() else options.prompts,
        "eval.max_tokens": max_tokens,
        # An actor takes as many problems at once as groups fit into its engine.
        "rollout.group_size": samples,
        "rollout.max_tokens": max_tokens,
    }
    return {key: value for key, value in keys.items() if value not in (None, "")}


def _defaults(options: EvalOptions, model_limit: Callable[[str], int]) -> dict[str, Any]:
    """What holds for a task without a recipe file."""
    samples = _samples(options) or DEFAULT_SAMPLES
    max_tokens = options.max_tokens or MAX_TOKENS.get(options.task, OTHER_MAX_TOKENS)
    keys: dict[str, Any] = {
        "name": run_name(options.model),
        "eval.samples": samples,
        "eval.prompts": DEFAULT_PROMPTS,
        "rollout.group_size": samples,
        "rollout.max_tokens": max_tokens,
        "model.max_model_len": min(max_tokens + PROMPT_ROOM, model_limit(options.model)),
    }
    if samples > Recipe().actor.max_running:
        keys["actor.max_running"] = samples
    return keys


def _samples(options: EvalOptions) -> int | None:
    """As given; greedy completions are all the same, so one is enough."""
    return 1 if options.samples is None and options.temperature == 0 else options.samples


def _implied(options: EvalOptions) -> dict[str, Any]:
    """What --task and --template bring with them, also beside a recipe file."""
    keys: dict[str, Any] = {}
    if options.task == "reasoning_gym":
        keys["task.grader"] = f"reasoning_gym:{options.dataset}"
    elif options.template in TEMPLATE_GRADERS:
        keys["task.grader"] = options.template
    elif options.task in GRADERS:
        keys["task.grader"] = GRADERS[options.task]
    if options.template:
        keys["rollout.stop"] = TEMPLATE_STOPS.get(options.template, [])
    return keys


def known_limit(model: str, progress: Callable[[str], None]) -> int:
    """Tokens that a model was made for; brings it here first. Raises RecipeError."""
    from deploy.models import model_limits, resolve_model

    try:
        return model_limits(resolve_model(model, progress))
    except ValueError as error:
        raise RecipeError(f"model.path: {error}") from None


def run_name(model: str) -> str:
    """eval- and the last part of the model's name, as far as a run may be called so; of RUN/model the run's."""
    parts = [part for part in model.split("/") if part]
    last = parts[-2] if len(parts) > 1 and parts[-1] == "model" else (parts or ["model"])[-1]
    return f"eval-{re.sub(r'[^A-Za-z0-9._-]+', '-', last)}"[:64]


# --- the table of one result ----------------------------------------------------------------------------------------

MARKS = {
    "right": ("✓", "green"), "wrong_answer": ("✗", "red"), "wrong_format": ("✗", "yellow"), "ungraded": ("–", "dim"),
}  # fmt: skip
LONGEST_SHOWN = 300
"""Characters of a text in the examples; of longer ones beginning and end are shown."""


def print_evaluation(run: RunDir, recipe: Recipe, name: str, console: Console) -> None:
    """Figures, classes and examples of one evaluation of a run."""
    result = read_json(run.eval / f"{name}.json")
    console.rule(f"evaluation {run.path.name}")
    console.print(_described(recipe, result), highlight=False, soft_wrap=True)
    console.print(_figures(result))
    console.print(_classes(result))
    for table in example_tables(read_jsonl(run.eval / f"{name}_responses.jsonl"), recipe.eval.examples_shown):
        console.print(table)


def _described(recipe: Recipe, result: dict[str, Any]) -> str:
    task = recipe.task
    data = next((f" ({text})" for text in (task.dataset, task.heldout, task.train) if text), "")
    return (
        f"{recipe.model.path}: {result['problems']} problems of {task.name}{data}, {result['samples']} samples each,"
        f" temperature {recipe.eval.temperature:g}, at most {recipe.eval_sampling_tokens} tokens, template"
        f" {task.template}, grader {task.grader}, seed {recipe.seed}"
    )


def _figures(result: dict[str, Any]) -> Table:
    table = Table.grid(padding=(0, 2))
    interval = f"95 %: {result['accuracy_low']:.3f} to {result['accuracy_high']:.3f}"
    table.add_row("accuracy", f"{result['accuracy']:.3f}", interval)
    table.add_row("reward", f"{result['reward']:.3f}", f"± {result['reward_ci95']:.3f}")
    for k, value in result["pass_at_k"].items():
        table.add_row(f"pass@{k}", f"{value:.3f}")
    table.add_row("well-formed", "–" if result["format_rate"] is None else f"{result['format_rate']:.3f}")
    spread = f"tokens, median {result['length_median']:.0f}, longest {result['length_max']}"
    table.add_row("length", f"{result['length_mean']:.1f}", spread)
    table.add_row("truncated", f"{result['truncated_share']:.1%}", "cut off at the most tokens")
    speed = f"tok/s, {result['tokens']} tokens in {result['seconds']:.1f} s"
    table.add_row("speed", f"{result['tokens_per_s']:.0f}", speed)
    if result["failed"]:
        table.add_row("left out", str(result["failed"]), "problems that no actor could complete")
    return table


def _classes(result: dict[str, Any]) -> Table:
    counts = result["classes"]
    everything = max(1, sum(counts.values()))
    table = Table("class", "responses", "share")
    for name in CLASSES:
        if counts[name] or name != "ungraded":
            table.add_row(_class_title(name), str(counts[name]), f"{counts[name] / everything:.1%}")
    return table


def _class_title(name: str) -> Text:
    mark, style = MARKS[name]
    return Text.assemble((mark, style), f" {name.replace('_', ' ')}")


def example_tables(rows: list[dict[str, Any]], shown: int) -> Iterable[Table]:
    """The first responses of each class, of different problems as far as there are any."""
    for name in CLASSES:
        members = [row for row in rows if row["class"] == name]
        firsts: dict[int, dict[str, Any]] = {}
        for row in members:
            firsts.setdefault(row["problem"], row)
        others = [row for row in members if firsts[row["problem"]] is not row]
        chosen = [*firsts.values(), *others][:shown]
        if not chosen:
            continue
        title = f"{name.replace('_', ' ')}, {len(chosen)} of {len(members)}"
        table = Table("", "problem", "answer", "response", title=title, title_justify="left")
        for row in chosen:
            mark, style = MARKS[name]
            cells = (Text(_short(row[key]), overflow="fold") for key in ("prompt", "answer", "response"))
            table.add_row(Text(mark, style), *cells)
        yield table


def _short(text: str) -> str:
    text = repr(text)[1:-1]
    half = LONGEST_SHOWN // 2
    return text if len(text) <= LONGEST_SHOWN else f"{text[:half]} … {text[-half:]}"


# --- the comparison of two results ----------------------------------------------------------------------------------

RESPONSES = "_responses.jsonl"
RESULT_ORDER = ("after", "eval", "after_warm_start", "before")
"""Which evaluation of a run is compared: the first of these that it has, one in the background only as the last."""
FEWEST_SHARED = 2
SAME = 1e-9
"""Rewards of a problem that differ by less are equal."""
UNBOUNDED = ("reward", "length")
"""Figures that are no shares: a difference of shares lies between -1 and 1."""
COMPARED = ("prompt", "answer", "reward", "class", "scores", "tokens", "finish_reason")
SETTINGS = (
    "task.grader", "task.template", "task.system_prompt", "eval.samples", "eval.temperature", "rollout.stop",
    "model.max_model_len",
)  # fmt: skip
"""Keys that decide what is measured of a problem. The most tokens are compared beside them."""


@dataclass(frozen=True)
class Results:
    """The responses of one evaluation by problem, and where they come from."""

    source: Path
    """The file of the responses."""
    problems: dict[tuple[str, str], list[dict[str, Any]]]
    """(prompt, reference answer) -> responses."""
    recipe: Recipe | None
    """The run's, where the file lies in a run directory."""


@dataclass(frozen=True)
class Difference:
    """One figure of both, over the problems that both have."""

    a: float
    b: float
    difference: float
    """b - a."""
    low: float | None
    high: float | None
    """95 % interval of the difference, paired by problem (Student's t); None where all problems differ equally."""


@dataclass(frozen=True)
class Comparison:
    a: str
    b: str
    problems_a: int
    problems_b: int
    problems_shared: int
    won: int
    """Problems on which b has the larger mean reward."""
    lost: int
    equal: int
    figures: dict[str, Difference]
    settings: dict[str, tuple[Any, Any]]
    """Recipe keys that decide what was measured, and that differ: (a's, b's)."""


def find_responses(path: Path) -> Path:
    """The file of responses that a run directory, a result or the file itself stands for. Raises RecipeError."""
    if path.is_dir():
        names = [f"{name}{RESPONSES}" for name in RESULT_ORDER]
        background = sorted((path / "eval").glob(f"step-*{RESPONSES}"), reverse=True)
        found = [file for name in names if (file := path / "eval" / name).is_file()] + background
        if not found:
            raise RecipeError(f"{path}: found no evaluation there, allowed: a run directory that has one")
        return found[0]
    if path.name.endswith(".json"):
        file = path.with_name(path.name.removesuffix(".json") + RESPONSES)
        if not file.is_file():
            raise RecipeError(f"{path}: found no {file.name} beside it; problems are paired by their responses")
        return file
    if not path.is_file():
        raise RecipeError(f"{path}: found nothing there, allowed: a run directory, or a result (.json, {RESPONSES})")
    return path


def read_results(path: Path) -> Results:
    """Raises RecipeError where there are none, or they lack what is compared."""
    source = find_responses(path)
    problems: dict[tuple[str, str], list[dict[str, Any]]] = defaultdict(list)
    for number, row in enumerate(read_jsonl(source), start=1):
        lacking = [key for key in COMPARED if key not in row]
        if lacking:
            raise RecipeError(
                f"{source}, line {number}: found no {', '.join(lacking)}, allowed: responses of this version's"
                " evaluations"
            )
        problems[" ".join(row["prompt"].split()), row["answer"]].append(row)
    try:
        recipe = load_recipe(RunDir(source.parent.parent).recipe)
    except RecipeError:  # a copied result has none, an older run's may have other keys: settings are then not compared
        recipe = None
    return Results(source, dict(problems), recipe)


def compare(a: Results, b: Results) -> Comparison:
    """Both results over the problems that both have. Raises RecipeError if these are too few."""
    shared = [problem for problem in a.problems if problem in b.problems]
    if len(shared) < FEWEST_SHARED:
        raise RecipeError(
            f"{a.source} and {b.source}: found {len(shared)} problems that both have, of {len(a.problems)} and"
            f" {len(b.problems)}; allowed: at least {FEWEST_SHARED}. The same task, seed and eval.prompts give the same"
        )
    k = min(len(rows) for result in (a, b) for problem in shared for rows in [result.problems[problem]])
    ours, theirs = ([problem_figures(result.problems[problem], k) for problem in shared] for result in (a, b))
    names = [name for name in ours[0] if name != "well-formed" or (_grades_form(a) and _grades_form(b))]
    figures = {name: _difference(name, [f[name] for f in ours], [f[name] for f in theirs]) for name in names}
    gains = [after["reward"] - before["reward"] for before, after in zip(ours, theirs, strict=True)]
    won, lost = sum(gain > SAME for gain in gains), sum(gain < -SAME for gain in gains)
    return Comparison(
        a=str(a.source),
        b=str(b.source),
        problems_a=len(a.problems),
        problems_b=len(b.problems),
        problems_shared=len(shared),
        won=won,
        lost=lost,
        equal=len(shared) - won - lost,
        figures=figures,
        settings=_different_settings(a.recipe, b.recipe),
    )


def problem_figures(rows: Sequence[dict[str, Any]], k: int) -> dict[str, float]:
    """Figures of one problem's responses; pass@k up to `k`, the fewest samples of any problem of the two."""

    def mean(values: Iterable[float]) -> float:
        return math.fsum(values) / len(rows)

    graded = [row for row in rows if row["class"] != "ungraded"]
    solved = sum(row["reward"] >= SOLVED_REWARD for row in rows)
    return {
        "accuracy": mean(answer_score(row["scores"]) for row in graded),
        "reward": mean(row["reward"] for row in rows),
        **{f"pass@{k}": pass_at_k(len(rows), solved, k) for k in ks_of(k)},
        **{name.replace("_", " "): mean(row["class"] == name for row in rows) for name in CLASSES[:3]},
        "well-formed": mean(row["scores"].get("format_reward", 0.0) for row in rows),
        "truncated": mean(row["finish_reason"] == "length" for row in rows),
        "length": mean(row["tokens"] for row in rows),
    }


def _grades_form(result: Results) -> bool:
    return any("format_reward" in row["scores"] for rows in result.problems.values() for row in rows)


def _difference(name: str, a: list[float], b: list[float]) -> Difference:
    differences = [theirs - ours for ours, theirs in zip(a, b, strict=True)]
    low, high = paired_interval(differences) or (None, None)
    if low is not None and high is not None and name not in UNBOUNDED:
        low, high = max(-1.0, low), min(1.0, high)
    count = len(differences)
    return Difference(math.fsum(a) / count, math.fsum(b) / count, math.fsum(differences) / count, low, high)


def _different_settings(a: Recipe | None, b: Recipe | None) -> dict[str, tuple[Any, Any]]:
    if a is None or b is None:
        return {}
    changes = {key: pair for key, pair in changed_keys(a, b).items() if key in SETTINGS}
    if a.eval_sampling_tokens != b.eval_sampling_tokens:
        changes["eval.max_tokens"] = (a.eval_sampling_tokens, b.eval_sampling_tokens)
    return dict(sorted(changes.items()))


def comparison_json(comparison: Comparison) -> dict[str, Any]:
    """As `--json` writes it."""
    return asdict(comparison)


def print_comparison(comparison: Comparison, console: Console) -> None:
    for mark, path in (("A", comparison.a), ("B", comparison.b)):
        console.print(f"{mark}  {path}", highlight=False, soft_wrap=True)
    shared = comparison.problems_shared
    console.print(
        f"{shared} problems that both have (A has {comparison.problems_a}, B has {comparison.problems_b}); B's reward"
        f" is larger on {comparison.won}, smaller on {comparison.lost}, equal on {comparison.equal}",
        soft_wrap=True,
    )
    table = Table("", "A", "B", "B - A", "95 % interval")
    for name, figure in comparison.figures.items():
        form = "{:.1f}" if name == "length" else "{:.3f}"
        interval = "–"
        if figure.low is not None and figure.high is not None:
            signed = form.replace(":", ":+")
            interval = f"{signed.format(figure.low)} to {signed.format(figure.high)}"
        difference = form.replace(":", ":+").format(figure.difference)
        table.add_row(name, form.format(figure.a), form.format(figure.b), difference, interval)
    console.print(table)
    if comparison.settings:
        console.print("They were not measured in the same way:")
        for key, (ours, theirs) in comparison.settings.items():
            console.print(Text(f"  {key}: {ours!r} and {theirs!r}"), soft_wrap=True)
