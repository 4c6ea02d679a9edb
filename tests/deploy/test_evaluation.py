"""`tandem eval` and `tandem compare` without a run: recipes, tables and comparisons on made-up run directories; and the
report's evaluations.
"""

from __future__ import annotations

import io
import math
from pathlib import Path
from typing import Any

import pytest
import tomli_w
from msgspec.structs import replace
from rich.console import Console

from deploy.evaluation import (
    EvalOptions,
    compare,
    comparison_json,
    eval_recipe,
    known_limit,
    print_comparison,
    read_results,
    run_name,
)
from deploy.report import curve_points, draw_curve, evaluations, print_report
from learner.eval_figures import wilson
from learner.evaluate import summarize, write_responses, write_result
from learner.intake.data import Example
from protocol.config import Recipe, load_recipe, parse_recipe
from protocol.errors import RecipeError
from protocol.messages import Group
from protocol.rundir import RunDir, read_json, replace_file, write_json
from tests.learner.reference import make_group

ROOT = Path(__file__).resolve().parents[2]
HELDOUT = [Example(f"What is {n} + [/b]?", (1, n), str(n)) for n in range(8)]

SUMMARY: dict[str, Any] = {
    "steps": 20, "wall_s": 90.0, "rollout_tokens": 1000, "rollout_tokens_per_s": 50.0, "tokens_per_s": 20.0,
    "learner_tokens": 900.0, "learner_tokens_per_s": 40.0, "lag_mean": 0.5, "lag_max": 1.0,
    "tickets": {"issued": 5, "trained": 5, "failed": 0, "reissued": 0, "duplicates": 0},
    "weights": {"versions": 21, "bytes_sent": 2e6, "seconds_p50": 0.5, "pause_seconds_p50": None},
    "actors": {"started": 1, "restarted": 0, "max": 1},
}  # fmt: skip


def group(index: int, scores: str, version: int = 1) -> Group:
    """A problem's completions by letter: r(ight), (wrong) a(nswer), (wrong) f(orm). The last one is cut off."""
    spans: list[tuple[tuple[int, int], ...]] = [((version, 0),)] * len(scores)
    made = make_group([float(letter == "r") for letter in scores], [10] * len(scores), spans, index=index)
    completions = tuple(
        replace(
            completion,
            text=f"[/i] {letter}{index}",
            scores={**completion.scores, "format_reward": float(letter != "f"), "answer_reward": float(letter == "r")},
        )
        for completion, letter in zip(made.completions, scores, strict=True)
    )
    return replace(made, completions=completions)


def store(run: RunDir, name: str, *scores: str, versions: tuple[int, ...] = (1,)) -> None:
    """An evaluation of a run as the learner writes it."""
    groups = [group(index, text, versions[index % len(versions)]) for index, text in enumerate(scores)]
    write_result(run.eval / f"{name}.json", summarize(name, groups, failed=0, seconds=2.0))
    write_responses(run.eval / f"{name}_responses.jsonl", groups, HELDOUT)


def make_run(path: Path, **recipe: Any) -> RunDir:
    run = RunDir(path).create()
    replace_file(run.recipe, tomli_w.dumps(parse_recipe(recipe, "test").model_dump(mode="json")))
    return run


def printed(run: RunDir) -> str:
    console = Console(file=io.StringIO(), width=160, markup=False)
    print_report(run, console)
    return console.file.getvalue()  # type: ignore[attr-defined]


def row(text: str, title: str) -> list[str]:
    """Cells of the first line of a table that begins with `title`."""
    lines = [[cell.strip() for cell in line.strip("│┃ ").replace("┃", "│").split("│")] for line in text.splitlines()]
    return next(cells[1:] for cells in lines if cells[0] == title)


# --- the recipe -----------------------------------------------------------------------------------------------------


def built(limit: int = 8192, **options: Any) -> Recipe:
    return eval_recipe(EvalOptions(**{"model": "some/tiny"} | options), lambda _: limit)


def test_recipe_by_default_measures_sums() -> None:
    recipe = built()
    assert (recipe.method, recipe.steps, recipe.model.path, recipe.name) == ("eval", 0, "some/tiny", "eval-tiny")
    assert (recipe.task.name, recipe.task.template, recipe.task.grader) == ("arithmetic", "chat", "integer")
    assert (recipe.eval.prompts, recipe.eval.samples, recipe.eval.temperature) == (64, 8, 1.0)
    assert (recipe.eval_sampling_tokens, recipe.model.max_model_len) == (64, 576)
    assert (recipe.rollout.stop, recipe.rollout.group_size, recipe.seed) == ((), 8, 0)
    assert built(temperature=0.0).eval.samples == 1, "greedy completions are all the same"


@pytest.mark.parametrize("path", sorted((ROOT / "recipes").rglob("*.toml")), ids=lambda path: path.stem)
def test_a_model_can_be_measured_by_the_recipe_of_any_training_run(path: Path) -> None:
    recipe = eval_recipe(EvalOptions(model="bundled", recipe=path, prompts="5"), lambda model: 8192)
    before = load_recipe(path)
    assert (recipe.method, recipe.steps, recipe.eval.prompts) == ("eval", 0, 5)
    assert (recipe.task, recipe.eval.temperature) == (before.task, before.eval.temperature)


def test_recipe_for_gsm8k_leaves_room_for_reasoning() -> None:
    recipe = built(task="gsm8k")
    assert (recipe.task.grader, recipe.task.template, recipe.rollout.stop) == ("gsm8k", "chat", ())
    assert (recipe.eval_sampling_tokens, recipe.model.max_model_len) == (512, 1024)
    assert built(limit=700, task="gsm8k").model.max_model_len == 700, "never more than the model was made for"
    with pytest.raises(RecipeError, match=r"eval.max_tokens: found 512, allowed: less than model.max_model_len"):
        built(limit=512, task="gsm8k")


def test_template_brings_its_grader_and_its_end() -> None:
    recipe = built(task="gsm8k", template="r1_zero")
    assert (recipe.task.template, recipe.task.grader, recipe.rollout.stop) == ("r1_zero", "r1_zero", ("</answer>",))
    assert built(task="gsm8k", template="question_only").task.grader == "question_only"
    assert built(task="gsm8k", template="r1_zero", grader="math").task.grader == "math", "what is said counts"
    gym = built(task="reasoning_gym", dataset="chain_sum")
    assert (gym.task.dataset, gym.task.grader) == ("chain_sum", "reasoning_gym:chain_sum")


def test_number_of_prompts_may_be_all() -> None:
    assert built(prompts="all").eval.prompts == "all"
    with pytest.raises(RecipeError, match=r'eval.prompts: found \'some\', allowed: an integer, 0 or more, or "all"'):
        built(prompts="some")


def test_options_and_set_go_over_the_defaults() -> None:
    recipe = built(
        task="jsonl", data='a "b".jsonl', samples=100, temperature=0.5, prompts="3", max_tokens=900, seed=4,
        name="mine", overrides=("eval.prompts=5", "actor.count=2"),
    )  # fmt: skip
    assert (recipe.task.train, recipe.seed, recipe.name) == ('a "b".jsonl', 4, "mine")
    assert (recipe.eval.samples, recipe.eval.temperature, recipe.eval.prompts) == (100, 0.5, 5)
    assert (recipe.rollout.max_tokens, recipe.eval_sampling_tokens, recipe.model.max_model_len) == (900, 900, 1412)
    assert (recipe.rollout.group_size, recipe.actor.max_running, recipe.actor.count) == (100, 100, 2)


def test_recipe_file_keeps_what_no_option_changes(tmp_path: Path) -> None:
    path = tmp_path / "train.toml"
    path.write_text(
        'steps = 30\n[model]\npath = "theirs"\nmax_model_len = 300\n[task]\nmax_operand = 7\n[rollout]\n'
        'max_tokens = 32\ndynamic_sampling = true\nstop = ["."]\n[eval]\nsamples = 2\n[warm_start]\nexamples = 64\n'
        '[guard]\npolicy = "rollback"\n[checkpoint]\nevery_steps = 5\n'
    )
    recipe = built(recipe=path, temperature=0.7)
    assert (recipe.method, recipe.steps, recipe.warm_start.examples) == ("eval", 0, 0)
    assert (recipe.rollout.dynamic_sampling, recipe.guard.policy) == (False, "off")
    assert (recipe.model.path, recipe.model.max_model_len, recipe.task.max_operand) == ("some/tiny", 300, 7)
    assert (recipe.eval.samples, recipe.eval.temperature, recipe.eval_sampling_tokens) == (2, 0.7, 32)
    assert (recipe.rollout.stop, recipe.rollout.group_size, recipe.name) == ((".",), 8, "run")
    assert built(recipe=path, template="r1_zero").rollout.stop == ("</answer>",)


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"samples": 0}, "eval.samples: found 0, allowed: "),
        ({"temperature": -1.0}, r"eval.temperature: found -1\.0, allowed: "),
        ({"temperature": 0.0, "samples": 2}, "eval.samples: found 2, allowed with eval.temperature = 0: 1"),
        ({"prompts": "0"}, "eval.prompts: found 0, allowed with method"),
        ({"task": "mmlu"}, "task.name: found 'mmlu'"),
        ({"task": "jsonl"}, "task.train: found"),
        ({"task": "hub"}, "task.dataset: found"),
        ({"overrides": ("steps=3",)}, "steps: found 3, allowed with method"),
    ],
)
def test_recipe_refuses_what_cannot_be(options: dict[str, Any], complaint: str) -> None:
    with pytest.raises(RecipeError, match=complaint):
        built(**options)


def test_run_is_named_after_the_model() -> None:
    assert run_name("bundled") == "eval-bundled"
    assert run_name("HuggingFaceTB/SmolLM2-360M") == "eval-SmolLM2-360M"
    assert run_name("/a/runs/demo-2/model/") == "eval-demo-2"
    assert run_name("/a/größe 1" + "x" * 80) == "eval-gr-e-1" + "x" * 53


def test_limit_of_a_model_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"model.path: .*: no such directory"):
        known_limit(f"{tmp_path}/none", print)


# --- the table ------------------------------------------------------------------------------------------------------


def test_report_of_an_evaluation_shows_figures_classes_and_examples(tmp_path: Path) -> None:
    run = make_run(tmp_path / "eval-x", method="eval", eval={"examples_shown": 2, "samples": 4})
    store(run, "eval", "rraf", "rrrr", "afff", "rfff")
    text = printed(run)
    assert "4 problems of arithmetic, 4 samples each, temperature 1, at most 16 tokens" in text
    figures = {line.split()[0]: line.split()[1:] for line in text.splitlines() if line[:1].isalpha()}
    # means 1/2, 1, 0, 1/4: their variance 0.1823 / 4 over 0.2461 / 16 is a design effect of 2.963
    low, high = wilson(7 / 16, 16 / 2.9630)
    assert figures["accuracy"] == ["0.438", "95", "%:", f"{low:.3f}", "to", f"{high:.3f}"]
    assert figures["reward"] == ["0.438", "±", "0.418"]  # 1.96 sqrt(0.1823 / 4)
    # pass@2 of c = 2, 4, 0, 1 of 4: 1 - 1/6, 1, 0, 1 - 3/6
    assert [figures[f"pass@{k}"] for k in (1, 2, 4)] == [["0.438"], ["0.583"], ["0.750"]]
    assert figures["well-formed"] == ["0.562"]
    assert figures["truncated"][0] == "25.0%"
    assert figures["speed"] == ["80", "tok/s,", "160", "tokens", "in", "2.0", "s"]
    assert row(text, "✓ right") == ["7", "43.8%"]
    assert row(text, "✗ wrong answer") == ["2", "12.5%"]
    assert row(text, "✗ wrong format") == ["7", "43.8%"]
    assert "ungraded" not in text
    assert "right, 2 of 7" in text
    assert row(text, "✓") == ["What is 0 + [/b]?", "0", "[/i] r0"], "texts are no markup"
    assert text.count("[/i] r") == 2
    assert "[/i] r1" in text, "another problem's before a second one of the same"
    assert str(run.eval) in text


def test_report_of_an_evaluation_without_a_result_says_so(tmp_path: Path) -> None:
    assert "has no eval/eval.json" in printed(make_run(tmp_path / "run", method="eval"))


def test_long_responses_are_shown_from_both_ends(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", method="eval")
    long = group(0, "r")
    long = replace(long, completions=(replace(long.completions[0], text="begin" + "x" * 5000 + "end\n"),))
    write_result(run.eval / "eval.json", summarize("eval", [long], failed=1, seconds=1.0))
    write_responses(run.eval / "eval_responses.jsonl", [long], HELDOUT)
    text = printed(run)
    unwrapped = "".join(character for character in text if character not in "│ \n")
    assert "beginxxx" in unwrapped
    assert "xxxend\\n" in unwrapped
    assert text.count("x") < 400
    assert "problems that no actor could complete" in text


# --- the comparison -------------------------------------------------------------------------------------------------


def two_runs(tmp_path: Path, **recipe: Any) -> tuple[RunDir, RunDir]:
    a = make_run(tmp_path / "a", method="eval", eval={"samples": 2})
    b = make_run(tmp_path / "b", **({"method": "eval", "eval": {"samples": 2}} | recipe))
    store(a, "eval", "rf", "ff", "rr", "fa")
    return a, b


def test_comparison_is_paired_by_problem(tmp_path: Path) -> None:
    a, b = two_runs(tmp_path)
    store(b, "eval", "rr", "rf", "rr", "ff")
    found = compare(read_results(a.path), read_results(b.path))
    assert (found.problems_a, found.problems_b, found.problems_shared) == (4, 4, 4)
    assert (found.won, found.lost, found.equal) == (2, 0, 2)
    reward = found.figures["reward"]
    assert (reward.a, reward.b, reward.difference) == (0.375, 0.625, 0.25)
    # differences 1/2, 1/2, 0, 0: variance 1/12, standard error sqrt(1/48), t(3) = 3.182446
    half = 3.182446 * math.sqrt(1 / 48)
    assert (reward.low, reward.high) == pytest.approx((0.25 - half, 0.25 + half))
    assert (found.figures["pass@2"].a, found.figures["pass@2"].b) == (0.5, 0.75)
    assert (found.figures["wrong answer"].a, found.figures["wrong answer"].b) == (0.125, 0.0)
    assert (found.figures["well-formed"].a, found.figures["well-formed"].b) == (0.5, 0.625)
    length = found.figures["length"]
    assert (length.difference, length.low, length.high) == (0.0, None, None), "nothing differs: no interval"
    assert found.settings == {}


def test_comparison_takes_the_problems_that_both_have(tmp_path: Path) -> None:
    a, b = two_runs(tmp_path, eval={"samples": 4, "temperature": 0.5})
    groups = [group(index, "rfff") for index in (2, 3, 4)]
    write_responses(b.eval / "eval_responses.jsonl", groups, HELDOUT)
    found = compare(read_results(a.path), read_results(b.path))
    assert (found.problems_a, found.problems_b, found.problems_shared) == (4, 3, 2)
    assert (found.figures["reward"].a, found.figures["reward"].b) == (0.5, 0.25)
    assert (found.won, found.lost) == (1, 1)
    assert found.figures["pass@2"].b == 0.5, "of 4 samples, as far as the other has them"
    assert "pass@4" not in found.figures
    wide = found.figures["right"]  # differences of +0.25 and -0.75, t(1) = 12.7
    assert (wide.difference, wide.low, wide.high) == (-0.25, -1.0, 1.0), "no share differs by more than 1"
    assert found.settings == {"eval.samples": (2, 4), "eval.temperature": (1.0, 0.5)}


def test_comparison_refuses_other_problems_and_says_how_many_match(tmp_path: Path) -> None:
    a, b = two_runs(tmp_path)
    write_responses(b.eval / "eval_responses.jsonl", [group(index, "rf") for index in (3, 4, 5)], HELDOUT)
    with pytest.raises(RecipeError, match="found 1 problems that both have, of 4 and 3"):
        compare(read_results(a.path), read_results(b.path))
    others = [Example(example.prompt, example.prompt_ids, "another") for example in HELDOUT]
    write_responses(b.eval / "eval_responses.jsonl", [group(index, "rf") for index in range(4)], others)
    with pytest.raises(RecipeError, match="found 0 problems that both have, of 4 and 4"):
        compare(read_results(a.path), read_results(b.path))


def test_comparison_finds_the_result_of_a_run_or_a_file(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    with pytest.raises(RecipeError, match="found no evaluation there"):
        read_results(run.path)
    for name in ("step-00010", "step-00020", "before", "after"):
        store(run, name, "rf", "fr")
        source = read_results(run.path).source
        assert source.name == f"{name}_responses.jsonl", "each is preferred to those before it in this list"
    before = read_results(run.eval / "before.json")
    assert before == read_results(run.eval / "before_responses.jsonl")
    assert before.source == run.eval / "before_responses.jsonl"
    assert before.recipe is not None
    (tmp_path / "copied.json").write_text("{}")
    with pytest.raises(RecipeError, match=r"found no copied_responses\.jsonl beside it"):
        read_results(tmp_path / "copied.json")
    with pytest.raises(RecipeError, match="found nothing there"):
        read_results(tmp_path / "nowhere")
    (tmp_path / "old_responses.jsonl").write_text('{"problem": 0, "prompt": "x", "answer": "1", "reward": 1.0}\n')
    with pytest.raises(RecipeError, match="line 1: found no class, scores, tokens"):
        read_results(tmp_path / "old_responses.jsonl")


def test_comparison_leaves_form_out_where_one_grader_knows_none(tmp_path: Path) -> None:
    a, b = two_runs(tmp_path)
    plain = [make_group([1.0, 0.0], [3, 3], index=index) for index in range(4)]
    plain[0] = replace(plain[0], completions=(replace(plain[0].completions[0], grader_error="late"),) * 2)
    write_responses(b.eval / "eval_responses.jsonl", plain, HELDOUT)
    figures = compare(read_results(a.path), read_results(b.path)).figures
    assert "well-formed" not in figures
    assert figures["accuracy"].b == 0.375, "what was not graded is not right"


def test_comparison_is_printed_and_written(tmp_path: Path) -> None:
    a, b = two_runs(tmp_path, task={"grader": "exact"})
    store(b, "eval", "rr", "rf", "rr", "ff")
    comparison = compare(read_results(a.path), read_results(b.path))
    console = Console(file=io.StringIO(), width=160, markup=False)
    print_comparison(comparison, console)
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert "4 problems that both have (A has 4, B has 4)" in text
    assert "larger on 2, smaller on 0, equal on 2" in text
    assert row(text, "reward") == ["0.375", "0.625", "+0.250", "-0.209 to +0.709"]
    assert row(text, "length") == ["10.0", "10.0", "+0.0", "–"]
    assert "task.grader: 'integer' and 'exact'" in text
    write_json(tmp_path / "c.json", comparison_json(comparison))
    written = read_json(tmp_path / "c.json")
    assert written["figures"]["reward"]["difference"] == 0.25
    assert written["settings"] == {"task.grader": ["integer", "exact"]}


# --- the report of a training run -----------------------------------------------------------------------------------


def test_report_has_a_row_for_every_evaluation_in_order(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    write_json(run.summary, SUMMARY)
    for name, scores in (("after", "rr"), ("step-00010", "rf"), ("after_warm_start", "ff"), ("before", "aa")):
        store(run, name, scores, scores, versions=(3, 4) if name == "step-00010" else (1,))
    store(run, "step-00005", "fr", "ff")
    assert list(evaluations(run)) == ["before", "after_warm_start", "step-00005", "step-00010", "after"]
    text = printed(run)
    assert row(text, "before")[0] == "0.000"
    assert row(text, "at step 5")[0] == "0.250"
    assert row(text, "at step 10") == ["0.500", "± 0.000", "0.50", "10.0 each", "3: 50%, 4: 50%"]
    assert row(text, "after GRPO")[-1] == "1"
    classes = text[text.index("wrong answer") :]
    assert row(classes, "before") == ["0%", "100%", "0%", "50%", "0.00", "0.00"]
    assert row(classes, "at step 5") == ["25%", "0%", "75%", "50%", "0.25", "0.50"]
    assert "gain +1.000 = warm start +0.000, GRPO +1.000" in text
    assert "samples after GRPO" in text
    assert "1000 completion tokens" in text
    assert "deltas" not in text and "parity" not in text, "a run of before they were counted"


def test_report_says_what_deltas_saved_how_old_tokens_were_and_what_probes_found(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    weights = SUMMARY["weights"] | {"bytes_dense": 269e6, "bytes_delta_p50": 0.538e6}
    parity = {"checks": 6, "blind": 2, "worst_nats": 0.0345}
    write_json(run.summary, SUMMARY | {"weights": weights, "lag_tokens": {"0": 300, "1": 700}, "parity": parity})
    text = " ".join(printed(run).split())
    assert "0.50 steps mean, 1 max; of the tokens 0: 30%, 1: 70%" in text
    assert "deltas 0.54 MB, 1/500 of a snapshot (median)" in text
    assert "6 probes of engines, 0.035 nats a token from the learner at most; 2 could not have seen one update" in text


@pytest.mark.parametrize(("method", "name"), [("sft", "SFT"), ("dpo", "DPO"), ("expert_iteration", "expert iteration")])
def test_report_names_the_method(tmp_path: Path, method: str, name: str) -> None:
    run = make_run(tmp_path / "run", method=method)
    write_json(run.summary, SUMMARY)
    store(run, "before", "rf", "ff")
    store(run, "after", "rf", "rr")
    text = printed(run)
    assert row(text, f"after {name}")[0] == "0.750"
    assert f"gain +0.500 by {name}" in text
    assert "GRPO" not in text


def test_report_of_a_run_without_evaluation_and_actors(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", method="sft", eval={"prompts": 0})
    nothing = {"rollout_tokens": 0, "lag_mean": None, "tokens_per_s": None, "actors": {"started": 0}}
    write_json(run.summary, SUMMARY | nothing)
    replace_file(run.metrics, '{"step": 1, "loss": 2.0}\n{"step": 2, "loss": null}\n')
    text = printed(run)
    assert "900 completion tokens through forward and backward" in text
    assert "held-out" not in text
    assert "tickets" not in text
    assert "lag" not in text
    assert run.curve.stat().st_size > 5000, "of the loss"


def test_report_of_a_run_of_an_earlier_version(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    write_json(run.summary, SUMMARY)
    old = {"reward": 0.5, "reward_ci95": 0.1, "format_rate": 1.0, "length_mean": 3.0, "version_tokens": {"1": 5}}
    write_json(run.eval / "before.json", old)
    replace_file(run.eval / "before_responses.jsonl", '{"problem": 0, "prompt": "?", "response": "!", "reward": 1.0}\n')
    assert row(printed(run), "before") == ["0.500", "± 0.100", "1.00", "3.0 each", "1"]


def test_curve_has_the_evaluations_at_their_steps(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    for name in ("before", "after_warm_start", "step-00010", "after"):
        store(run, name, "rf", "ff")
    evals = evaluations(run)
    assert curve_points(evals, 20) == [(0, "before"), (0, "after_warm_start"), (10, "step-00010"), (20, "after")]
    assert not draw_curve(run, evals, "grpo"), "no step, no curve"
    replace_file(run.metrics, '{"step": 1, "reward_mean": 0.5}\n{"step": 2, "eval_reward": 0.5}\n')
    assert draw_curve(run, evals, "grpo")
    assert run.curve.read_bytes()[:4] == b"\x89PNG"
    replace_file(run.metrics, '{"step": 1, "loss": 3.5}\n')
    assert draw_curve(run, evals, "sft"), "loss and held-out reward, each with an axis"
