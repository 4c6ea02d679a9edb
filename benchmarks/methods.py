"""What the methods make of one model on one task with the same number of tokens: docs/results.md comes from here.

python -m benchmarks.methods [--seeds 0 1 2] [--tokens N] [--methods NAME ...] [--out FILE] [--plot]

Runs `tandem train` of recipes/cpu/*.toml with the changes below: the same sums, held-out problems and warm start for
every method and each seed, a guard that only warns, a constant learning rate, and a budget of response tokens (drawn,
or for SFT trained on) instead of a number of steps. Rows that the result file already has are not run again, so a run
that was cut off goes on. A run takes 9 to 15 minutes on one core. --plot only draws docs/images/methods.png.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.run import RESULTS, machine
from benchmarks.training import log_of, train
from protocol.rundir import read_json, read_jsonl

ROOT = Path(__file__).resolve().parent.parent
FIGURE = ROOT / "docs" / "images" / "methods.png"
WARM_START = (
    "warm_start.examples=64", "warm_start.epochs=2", "warm_start.batch_size=16", "warm_start.lr=2e-5",
)  # fmt: skip
COMMON = (
    "task.name=arithmetic", "task.max_operand=20", "task.grader=integer", "task.template=chat",
    "rollout.groups_per_step=8", "rollout.group_size=8", "rollout.max_tokens=16",
    "optim.schedule=constant", "optim.warmup_steps=0", "eval.prompts=64", "eval.samples=4", "eval.every_steps=0",
    "guard.policy=warn", "checkpoint.every_steps=0",
)  # fmt: skip
DIVIDED = ("grpo.advantage=group_mean_std", "grpo.aggregation=sequence_mean")
METHODS: dict[str, tuple[str, tuple[str, ...]]] = {
    "SFT": ("sft", ("optim.lr=2e-5", "sft.batch_size=16", "sft.epochs=1000")),
    "EI": ("expert_iteration", (*WARM_START, "steps=1000", "optim.lr=2e-5")),
    "GRPO, 1 update": ("dr_grpo", (*WARM_START, "steps=1000", "optim.lr=1.5e-5", *DIVIDED)),
    "GRPO (clip)": ("dr_grpo", (*WARM_START, "steps=1000", "optim.lr=1.5e-5", *DIVIDED, "optim.epochs=2")),
    "Dr. GRPO": ("dr_grpo", (*WARM_START, "steps=1000", "optim.lr=1.5e-5")),
    "DAPO": ("dapo", (*WARM_START, "steps=1000", "optim.lr=1.5e-5")),
}
"""Name -> (recipe in recipes/cpu, its changes). With one update a step the ratio is 1 and clips nothing."""
CURVE = ("step", "reward_mean", "sampled_tokens", "tokens", "sampled_entropy", "nll", "updates", "clipped_share")
RUN_LIMIT_S = 3600


def run(method: str, seed: int, tokens: int, directory: Path) -> dict[str, Any]:
    """Train once; a run that fails is a row with its exit code."""
    recipe, changes = METHODS[method]
    name = f"{recipe}-{seed}-{len(list(directory.iterdir()))}"
    overrides = (*COMMON, *changes, f"seed={seed}", f"token_budget={tokens}")
    began = time.monotonic()
    code, run_dir = train(ROOT / "recipes" / "cpu" / f"{recipe}.toml", directory, name, overrides, RUN_LIMIT_S)
    if code:
        print(f"exit code {code}:\n" + log_of(directory, name).read_text("utf-8", "replace")[-2000:])
    summary = read_json(run_dir.summary) or {}
    evals = {path.stem: read_json(path) for path in run_dir.eval.glob("*.json")}
    rows = read_jsonl(run_dir.metrics)
    shutil.rmtree(run_dir.path, ignore_errors=True)  # checkpoints: gigabytes
    return {
        "method": method,
        "seed": seed,
        "exit_code": code,
        "minutes": (time.monotonic() - began) / 60,
        "steps": summary.get("steps"),
        "tokens": summary.get("budget_tokens"),
        "learner_tokens": summary.get("learner_tokens"),
        "evals": {
            when: {key: result[key] for key in ("accuracy", "reward", "reward_ci95", "pass_at_k", "length_mean")}
            for when, result in evals.items()
        },
        "curve": [{key: row.get(key) for key in CURVE} for row in rows],
    }


def spread(rows: list[dict[str, Any]], when: str) -> tuple[float, float] | None:
    """Mean and standard deviation over seeds of the held-out reward."""
    found = [row["evals"][when]["reward"] for row in rows if when in row["evals"]]
    return (statistics.mean(found), statistics.stdev(found) if len(found) > 1 else 0.0) if found else None


def by_method(runs: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    return {name: [row for row in runs if row["method"] == name and not row["exit_code"]] for name in METHODS}


def print_runs(console: Console, runs: list[dict[str, Any]]) -> None:
    columns = ("method", "seeds", "zero-shot", "after the warm start", "after", "tokens", "steps", "minutes")
    table = Table(*columns, title="held-out reward, mean and standard deviation over seeds")
    for name, rows in by_method(runs).items():
        if not rows:
            continue
        values = [spread(rows, when) for when in ("before", "after_warm_start", "after")]
        shown = ["–" if value is None else f"{value[0]:.3f} ± {value[1]:.3f}" for value in values]
        mean = {key: statistics.mean(row[key] for row in rows) for key in ("tokens", "steps", "minutes")}
        rest = (f"{mean['tokens']:.0f}", f"{mean['steps']:.1f}", f"{mean['minutes']:.1f}")
        table.add_row(name, str(len(rows)), *shown, *rest)
    console.print(table)


def reward_curve(row: dict[str, Any]) -> tuple[list[float], list[float]]:
    """(thousand tokens drawn, reward of the batch) by step."""
    drawn, xs, ys = 0.0, [], []
    for step in row["curve"]:
        drawn += step["sampled_tokens"] or 0.0
        if step["reward_mean"] is not None:
            xs.append(drawn / 1000)
            ys.append(step["reward_mean"])
    return xs, ys


def plot(runs: list[dict[str, Any]], path: Path) -> None:
    """Bars of the held-out reward with one mark a seed, and the training reward over the tokens drawn."""
    import matplotlib
    import numpy

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (bars, curves) = pyplot.subplots(1, 2, figsize=(11, 4), layout="constrained")
    groups = {name: rows for name, rows in by_method(runs).items() if rows}
    everything = [row for rows in groups.values() for row in rows]
    columns = [("zero-shot", everything, "before"), ("warm start", everything, "after_warm_start")]
    columns += [(name, rows, "after") for name, rows in groups.items()]
    colours = dict(zip(groups, pyplot.get_cmap("tab10").colors, strict=False))
    for place, (name, rows, when) in enumerate(columns):
        value = spread(rows, when)
        if value is None:
            continue
        bars.bar(place, value[0], color=colours.get(name, "0.75"), width=0.7)
        seeds = sorted({(row["seed"], row["evals"][when]["reward"]) for row in rows if when in row["evals"]})
        bars.plot([place] * len(seeds), [reward for _, reward in seeds], "k.", markersize=5)
    bars.set_xticks(range(len(columns)), [name for name, _, _ in columns], rotation=25, ha="right")
    bars.set(ylabel="held-out reward", ylim=(0, 1), title="held-out sums, dots are seeds")
    for name, rows in groups.items():
        lines = [line for line in map(reward_curve, rows) if line[0]]
        for xs, ys in lines:
            curves.plot(xs, ys, color=colours[name], alpha=0.25, linewidth=1)
        if lines:
            grid = numpy.linspace(max(xs[0] for xs, _ in lines), min(xs[-1] for xs, _ in lines), 50)
            mean = numpy.mean([numpy.interp(grid, xs, ys) for xs, ys in lines], axis=0)
            curves.plot(grid, mean, color=colours[name], linewidth=2, label=name)
    curves.set(
        xlabel="thousand tokens drawn",
        ylabel="reward of the batch",
        ylim=(0, 1),
        title="while training: mean, and seeds",
    )
    curves.legend(frameon=False, fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--tokens", type=int, default=8_000, help="budget of response tokens of one run")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--out", type=Path, default=RESULTS / "methods.json")
    parser.add_argument("--plot", action="store_true", help="run nothing, draw the figure")
    options = parser.parse_args()
    console = Console(width=None if sys.stdout.isatty() else 120)
    known = read_json(options.out) or {"runs": []}
    runs: list[dict[str, Any]] = known["runs"]
    if not options.plot:
        about = machine() | {"command": " ".join(["python -m benchmarks.methods", *sys.argv[1:]])}
        done = {
            (row["method"], row["seed"]) for row in runs if not row["exit_code"] and row["budget"] == options.tokens
        }
        with tempfile.TemporaryDirectory(prefix="tandem-bench-") as directory:
            for seed in options.seeds:
                for method in (name for name in options.methods if (name, seed) not in done):
                    console.print(f"seed {seed}, {method}")
                    row = run(method, seed, options.tokens, Path(directory))
                    runs.append(row | {"budget": options.tokens, "commit": about["commit"]})
                    results = {"machine": about, "common": COMMON, "methods": METHODS, "runs": runs}
                    options.out.parent.mkdir(parents=True, exist_ok=True)
                    options.out.write_text(json.dumps(results, indent=1) + "\n")  # each time: nothing measured is lost
    print_runs(console, runs)
    if options.plot:
        plot(runs, FIGURE)
        console.print(f"drawn: {FIGURE}")


if __name__ == "__main__":
    main()
