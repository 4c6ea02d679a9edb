"""The report at the end of a run: before and after, samples, throughput, weight traffic, a curve, and where files are.

Reads the run directory only, so that it can be printed again at any time (`tandem report RUN`).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from protocol.config import load_recipe
from protocol.rundir import RunDir, read_json, read_jsonl

EVAL_NAMES = {"before": "before", "after_warm_start": "after the warm start", "after": "after GRPO"}


def print_report(run: RunDir, console: Console) -> None:
    """Print a finished (or stopped) run's figures and draw its reward curve."""
    summary = read_json(run.summary)
    if summary is None:
        console.print(f"{run.path} has no summary.json: the run did not get as far as its first checkpoint")
        return
    recipe = load_recipe(run.recipe)
    evals = {name: result for name in EVAL_NAMES if (result := read_json(run.eval / f"{name}.json"))}
    console.rule(f"run {run.path.name}")
    if evals:
        console.print(_reward_table(evals))
        console.print(_parts(summary))
        for name in (name for name in ("before", "after") if name in evals):
            console.print(_samples(run, name, recipe.eval.examples_shown))
    console.print(_throughput(summary))
    if draw_curve(run, evals):
        console.print(f"{'reward curve':<13} {_short(run.curve)}", highlight=False, soft_wrap=True)
    _print_files(run, console)


def _reward_table(evals: dict[str, Any]) -> Table:
    table = Table("held-out reward", "mean", "95 % interval", "well-formed", "tokens", "version", title_justify="left")
    for name, result in evals.items():
        table.add_row(
            EVAL_NAMES[name],
            f"{result['reward']:.3f}",
            f"± {result['reward_ci95']:.3f}",
            f"{result['format_rate']:.2f}",
            f"{result['length_mean']:.1f} each",
            "+".join(result["version_tokens"]),
        )
    return table


def _parts(summary: dict[str, Any]) -> str:
    """The gain, and which part of it each phase has."""
    before, warm, after = (summary[key] for key in ("eval_before", "eval_after_warm_start", "eval_after"))
    if before is None or after is None:
        return ""
    text = f"gain {after - before:+.3f}"
    if warm is not None:
        text += f" = warm start {warm - before:+.3f}, GRPO {after - warm:+.3f}"
    return text


def _samples(run: RunDir, name: str, shown: int) -> Table:
    """The first response to each of the first problems: the same problems before and after."""
    table = Table("", "problem", "response", "reward", title=f"samples {EVAL_NAMES[name]}", title_justify="left")
    seen: set[int] = set()
    for row in read_jsonl(run.eval / f"{name}_responses.jsonl"):
        if row["problem"] in seen or len(seen) >= shown:
            continue
        seen.add(row["problem"])
        mark = Text("✓", "green") if row["reward"] > 0.5 else Text("✗", "red")
        table.add_row(mark, Text(row["prompt"]), Text(repr(row["response"])[1:-1][:90]), f"{row['reward']:.1f}")
    return table


def _throughput(summary: dict[str, Any]) -> Table:
    def show(value: float | None, form: str) -> str:
        return form.format(value) if value is not None else "–"

    tickets, weights, actors = summary["tickets"], summary["weights"], summary["actors"]
    table = Table.grid(padding=(0, 2))
    table.add_row("steps", f"{summary['steps']} in {summary['wall_s'] / 60:.1f} minutes, evaluations included")
    table.add_row(
        "rollouts",
        f"{summary['rollout_tokens']} completion tokens, {show(summary['rollout_tokens_per_s'], '{:.0f}')} tok/s while"
        " generating",
    )
    table.add_row(
        "learner",
        f"{summary['learner_tokens']:.0f} completion tokens through forward and backward,"
        f" {show(summary['learner_tokens_per_s'], '{:.0f}')} tok/s while training",
    )
    table.add_row("end to end", f"{show(summary['tokens_per_s'], '{:.0f}')} completion tok/s")
    table.add_row("lag", f"{show(summary['lag_mean'], '{:.2f}')} steps mean, {show(summary['lag_max'], '{:.0f}')} max")
    table.add_row(
        "weights",
        f"{weights['versions']} versions, {weights['bytes_sent'] / 1e6:.0f} MB sent; an actor took"
        f" {show(weights['seconds_p50'], '{:.2f}')} s to fetch and check,"
        f" paused {show(weights['pause_seconds_p50'], '{:.2f}')} s to swap (medians)",
    )
    table.add_row(
        "tickets",
        f"{tickets['issued']} issued, {tickets['trained']} trained, {tickets['failed']} failed,"
        f" {tickets['reissued']} issued again, {tickets['duplicates']} duplicates",
    )
    table.add_row("actors", f"{actors['started']} started, {actors['restarted']} restarted")
    return table


def draw_curve(run: RunDir, evals: dict[str, Any]) -> bool:
    """Draw the reward of every step, and the held-out reward, as PNG. False if there is nothing to draw."""
    rows = read_jsonl(run.metrics)
    if not rows:
        return False
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 4.5), dpi=120, layout="constrained")
    axes.plot([row["step"] for row in rows], [row["reward_mean"] for row in rows], marker="o", label="train batches")
    points = {"before": 0, "after_warm_start": 0, "after": rows[-1]["step"]}
    for name, result in evals.items():
        axes.errorbar(
            [points[name]], [result["reward"]], yerr=[result["reward_ci95"]], fmt="D", capsize=4,
            label=f"held out, {EVAL_NAMES[name]}: {result['reward']:.2f}",
        )  # fmt: skip
    axes.set(xlabel="step", ylabel="mean reward", ylim=(-0.02, 1.02), title=f"reward of run {run.path.name}")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.grid(alpha=0.3)
    axes.legend(loc="best")
    figure.savefig(run.curve)
    pyplot.close(figure)
    return True


def _print_files(run: RunDir, console: Console) -> None:
    for what, path in (
        ("model", run.model),
        ("summary", run.summary),
        ("metrics", run.metrics),
        ("TensorBoard", run.tensorboard),
        ("responses", run.eval),
        ("logs", run.logs),
    ):
        if path.exists():
            console.print(f"{what:<13} {_short(path)}", highlight=False, soft_wrap=True)


def _short(path: Path) -> str:
    """A path relative to the working directory where that is shorter."""
    try:
        return str(path.relative_to(Path.cwd()))
    except ValueError:
        return str(path)
