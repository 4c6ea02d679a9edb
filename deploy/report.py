"""The report at the end of a run: before and after, samples, throughput, weight traffic, a curve, and where files are.

Reads the run directory only, so that it can be printed again at any time (`tandem report RUN`).
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from deploy.evaluation import print_evaluation
from protocol.config import Recipe, load_recipe
from protocol.rundir import RunDir, read_json, read_jsonl

METHOD_NAMES = {"grpo": "GRPO", "expert_iteration": "expert iteration", "sft": "SFT", "dpo": "DPO", "eval": "eval"}
EVAL_ORDER = ("eval", "before", "after_warm_start", "step", "after")


def print_report(run: RunDir, console: Console) -> None:
    """Print a finished (or stopped) run's figures and draw its reward curve."""
    recipe, evals, summary = load_recipe(run.recipe), evaluations(run), read_json(run.summary)
    if recipe.method == "eval":
        if "eval" in evals:
            print_evaluation(run, recipe, "eval", console)
            _print_files(run, console)
        else:
            console.print(f"{run.path} has no eval/eval.json: the evaluation did not get to its end")
        return
    if summary is None:
        console.print(f"{run.path} has no summary.json: the run did not get as far as its first checkpoint")
        return
    console.rule(f"run {run.path.name}")
    if evals:
        _print_evaluations(run, recipe, evals, console)
    console.print(_throughput(summary))
    for line in _guard_lines(summary):
        console.print(line, style="red", highlight=False, soft_wrap=True)
    if draw_curve(run, evals, recipe.method):
        console.print(f"{'reward curve':<13} {_short(run.curve)}", highlight=False, soft_wrap=True)
    _print_files(run, console)


# --- evaluations ---


def evaluations(run: RunDir) -> dict[str, Any]:
    """Results by name, in the order in which they were measured."""
    found = {path.stem: read_json(path) for path in run.eval.glob("*.json") if _place(path.stem) is not None}
    return dict(sorted(found.items(), key=lambda item: _place(item[0]) or (0, 0)))


def _place(name: str) -> tuple[int, int] | None:
    """(which kind, step) of an evaluation's name; None for another file."""
    step = background_step(name)
    kind = name if step is None else "step"
    return (EVAL_ORDER.index(kind), step or 0) if kind in EVAL_ORDER else None


def background_step(name: str) -> int | None:
    """Step of an evaluation in the background ("step-00010"); None for the others."""
    match = re.fullmatch(r"step-(\d+)", name)
    return int(match[1]) if match else None


def eval_title(name: str, method: str) -> str:
    """What people call an evaluation of a run."""
    step = background_step(name)
    if step is not None:
        return f"at step {step}"
    titles = {"after_warm_start": "after the warm start", "after": f"after {METHOD_NAMES[method]}"}
    return titles.get(name, name)


def _print_evaluations(run: RunDir, recipe: Recipe, evals: dict[str, Any], console: Console) -> None:
    console.print(_reward_table(evals, recipe.method))
    if all("classes" in result for result in evals.values()):  # not those of runs of an earlier version
        console.print(_classes_table(evals, recipe.method))
    if gain := _gain(evals, recipe.method):
        console.print(gain)
    for name in (name for name in ("before", "after") if name in evals):
        console.print(_samples(run, name, eval_title(name, recipe.method), recipe.eval.examples_shown))


def _reward_table(evals: dict[str, Any], method: str) -> Table:
    table = Table("held-out reward", "mean", "95 % interval", "well-formed", "tokens", "version", title_justify="left")
    for name, result in evals.items():
        table.add_row(
            eval_title(name, method),
            f"{result['reward']:.3f}",
            f"± {result['reward_ci95']:.3f}",
            "–" if result["format_rate"] is None else f"{result['format_rate']:.2f}",
            f"{result['length_mean']:.1f} each",
            _versions(result["version_tokens"]),
        )
    return table


def _versions(tokens: dict[str, int]) -> str:
    """The version, or each one's share of the tokens."""
    everything = max(1, sum(tokens.values()))
    if len(tokens) < 2:
        return "".join(tokens)
    return ", ".join(f"{version}: {count / everything:.0%}" for version, count in tokens.items())


def _classes_table(evals: dict[str, Any], method: str) -> Table:
    """Shares of the responses, and the chance that one of several solves a problem."""
    ks = sorted({k for result in evals.values() for k in result["pass_at_k"]}, key=int)
    shown = sorted({*ks[:1], *ks[-1:]}, key=int)
    passes = [f"pass@{k}" for k in shown]
    table = Table("responses", "right", "wrong answer", "wrong format", "truncated", *passes)
    for name, result in evals.items():
        counts = result["classes"]
        everything = max(1, sum(counts.values()))
        shares = (counts[key] / everything for key in ("right", "wrong_answer", "wrong_format"))
        table.add_row(
            eval_title(name, method),
            *(f"{share:.0%}" for share in (*shares, result["truncated_share"])),
            *(f"{result['pass_at_k'][k]:.2f}" if k in result["pass_at_k"] else "–" for k in shown),
        )
    return table


def _gain(evals: dict[str, Any], method: str) -> str:
    """The gain, and which part of it each phase has."""
    phases = ("before", "after_warm_start", "after")
    before, warm, after = (evals[name]["reward"] if name in evals else None for name in phases)
    if before is None or after is None:
        return ""
    if warm is None:
        return f"gain {after - before:+.3f} by {METHOD_NAMES[method]}"
    return f"gain {after - before:+.3f} = warm start {warm - before:+.3f}, {METHOD_NAMES[method]} {after - warm:+.3f}"


def _samples(run: RunDir, name: str, title: str, shown: int) -> Table:
    """The first response to each of the first problems: the same problems before and after."""
    table = Table("", "problem", "response", "reward", title=f"samples {title}", title_justify="left")
    seen: set[int] = set()
    for row in read_jsonl(run.eval / f"{name}_responses.jsonl"):
        if row["problem"] in seen or len(seen) >= shown:
            continue
        seen.add(row["problem"])
        mark = Text("✓", "green") if row["reward"] > 0.5 else Text("✗", "red")
        response = Text(repr(row["response"])[1:-1][:90], overflow="fold")
        table.add_row(mark, Text(row["prompt"]), response, f"{row['reward']:.1f}")
    return table


# --- throughput ---


def _throughput(summary: dict[str, Any]) -> Table:
    """What was done in which time. A run without actors has no rollouts, tickets or weights to show."""

    def show(key: str, form: str) -> str:
        value = summary.get(key)
        return form.format(value) if value is not None else "–"

    table = Table.grid(padding=(0, 2))
    table.add_row("steps", f"{summary['steps']} in {summary['wall_s'] / 60:.1f} minutes, evaluations included")
    if summary.get("rollout_tokens"):
        table.add_row(
            "rollouts",
            f"{summary['rollout_tokens']} completion tokens, {show('rollout_tokens_per_s', '{:.0f}')} tok/s while"
            " generating",
        )
    table.add_row(
        "learner",
        f"{show('learner_tokens', '{:.0f}')} completion tokens through forward and backward,"
        f" {show('learner_tokens_per_s', '{:.0f}')} tok/s while training",
    )
    if summary.get("rollout_tokens"):
        table.add_row("end to end", f"{show('tokens_per_s', '{:.0f}')} completion tok/s")
        lag = f"{show('lag_mean', '{:.2f}')} steps mean, {show('lag_max', '{:.0f}')} max"
        table.add_row("lag", lag + _lags(summary))
    if (summary.get("actors") or {}).get("started"):
        _add_actors(table, summary)
    return table


def _lags(summary: dict[str, Any]) -> str:
    """Shares of the tokens by their lag in steps."""
    tokens: dict[str, int] = summary.get("lag_tokens") or {}
    shares = (f"{lag}: {count / sum(tokens.values()):.0%}" for lag, count in tokens.items())
    return f"; of the tokens {', '.join(shares)}" if tokens else ""


def _add_actors(table: Table, summary: dict[str, Any]) -> None:
    def seconds(value: float | None) -> str:
        return f"{value:.2f} s" if value is not None else "–"

    tickets, weights, actors = summary["tickets"], summary["weights"], summary["actors"]
    table.add_row(
        "weights",
        f"{weights['versions']} versions, {weights['bytes_sent'] / 1e6:.0f} MB sent; an actor took"
        f" {seconds(weights['seconds_p50'])} to fetch and check,"
        f" paused {seconds(weights['pause_seconds_p50'])} to swap (medians)",
    )
    if weights.get("bytes_delta_p50"):
        smaller = weights["bytes_dense"] / weights["bytes_delta_p50"]
        table.add_row("deltas", f"{weights['bytes_delta_p50'] / 1e6:.2f} MB, 1/{smaller:.0f} of a snapshot (median)")
    if (parity := summary.get("parity") or {}).get("checks"):
        blind = f"; {parity['blind']:.0f} could not have seen one update" if parity["blind"] else ""
        worst = f"{parity['worst_nats']:.2g} nats a token from the learner at most"
        table.add_row("parity", f"{parity['checks']:.0f} probes of engines, {worst}{blind}")
    table.add_row(
        "tickets",
        f"{tickets['issued']} issued: "
        + ", ".join(f"{tickets[state]} {state.replace('_', ' ')}" for state in ENDS if tickets.get(state))
        + f"; {tickets['reissued']} issued again, {tickets['duplicates']} duplicates",
    )
    table.add_row("actors", f"{actors['started']} started, {actors['restarted']} restarted")


def _guard_lines(summary: dict[str, Any]) -> list[str]:
    """What the guard saw, and what came of it."""
    lines = [f"guard, {event}" for event in summary.get("guard", ())]
    if summary.get("rollbacks"):
        times = "once" if summary["rollbacks"] == 1 else f"{summary['rollbacks']} times"
        lines.append(f"the run went back {times}; the learning rate is {summary['lr_scale']:g} of the recipe's")
    return lines


ENDS = ("trained", "filtered", "failed", "dropped", "abandoned", "in_training", "queued", "leased")
"""What can have become of a ticket."""


# --- the curve ---


def draw_curve(run: RunDir, evals: dict[str, Any], method: str) -> bool:
    """Draw the reward of every step, and the held-out reward, as PNG. False if there is nothing to draw.

    A method that draws no rollouts has a loss instead of a reward: it gets an axis of its own.
    """
    rows = read_jsonl(run.metrics)
    rewards = _series(rows, "reward_mean")
    losses = [] if rewards else _series(rows, "loss")
    if not rewards and not losses:
        return False
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 4.5), dpi=120, layout="constrained")
    if rewards:
        axes.plot(*zip(*rewards, strict=True), marker="o", label="train batches")
    if losses:
        beside = axes.twinx() if evals else axes
        beside.plot(*zip(*losses, strict=True), color="tab:gray")
        beside.set_ylabel("loss", color="tab:gray")
    if evals:
        _draw_evaluations(axes, evals, method, last_step=max(step for step, _ in rewards or losses))
    if rewards or evals:
        values = [*(reward for _, reward in rewards), *(result["reward"] for result in evals.values())]
        axes.set_ylabel("mean reward")
        if min(values) >= 0 and max(values) <= 1:
            axes.set_ylim(-0.02, 1.02)
    axes.set(xlabel="step", title=f"{'reward' if rewards or evals else 'loss'} of run {run.path.name}")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.grid(alpha=0.3)
    if rewards or evals:
        axes.legend(loc="best")
    figure.savefig(run.curve)
    pyplot.close(figure)
    return True


def _series(rows: list[dict[str, Any]], key: str) -> list[tuple[int, float]]:
    """(step, value) of the rows that have one: a row of an evaluation, or a value that was no number, has none."""
    return [(row["step"], row[key]) for row in rows if row.get(key) is not None]


def curve_points(evals: dict[str, Any], last_step: int) -> list[tuple[int, str]]:
    """(step, name) of the evaluations."""
    places = {"before": 0, "after_warm_start": 0, "after": last_step}
    points = [(places.get(name, background_step(name)), name) for name in evals]
    return [(step, name) for step, name in points if step is not None]


def _draw_evaluations(axes: Any, evals: dict[str, Any], method: str, last_step: int) -> None:
    """Named ones with their value in the legend; those in the background as one series."""
    background: dict[int, dict[str, Any]] = {}
    for step, name in curve_points(evals, last_step):
        result = evals[name]
        if background_step(name) is not None:
            background[step] = result
            continue
        label = f"held out, {eval_title(name, method)}: {result['reward']:.2f}"
        axes.errorbar([step], [result["reward"]], yerr=[result["reward_ci95"]], fmt="D", capsize=4, label=label)
    if background:
        rewards = [result["reward"] for result in background.values()]
        widths = [result["reward_ci95"] for result in background.values()]
        axes.errorbar(list(background), rewards, yerr=widths, fmt="s:", capsize=4, label="held out, in the background")


# --- where things are ---


def _print_files(run: RunDir, console: Console) -> None:
    for what, path in (
        ("model", run.model),
        ("summary", run.summary),
        ("metrics", run.metrics),
        ("TensorBoard", run.tensorboard),
        ("responses", run.eval if any(run.eval.glob("*.jsonl")) else Path("none")),
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
