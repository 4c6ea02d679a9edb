"""What the guard is worth on a run that collapses: the demo's task at lr 1e-4, with and without going back.

python -m benchmarks.guard [--seeds 0 1 2] [--steps N] [--out FILE] [--plot]

For each seed `tandem train` runs twice by the demo's recipe with the changes below, once with guard.policy = "off" and
once with "rollback"; which one goes first alternates. Prints a table and stores figures and reward curves in
benchmarks/results/. Rows that the file already has are not run again, so a series that was cut off goes on. By hand,
not part of `make bench`: a run takes about 6 minutes on two cores. --plot only draws docs/images/guard.png.
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
RECIPE = ROOT / "recipes" / "demo.toml"
FIGURE = ROOT / "docs" / "images" / "guard.png"
COLLAPSING = (
    "optim.lr=1e-4",
    'optim.schedule="constant"',
    "checkpoint.every_steps=2",
    "checkpoint.keep=4",
)
"""Within ten to sixteen steps the reward falls to next to nothing (docs/results.md)."""
CURVE = ("step", "reward_mean", "zero_variance_share", "sampled_entropy", "lr")
POLICIES = ("off", "rollback")
STEPS = 20
RUN_LIMIT_S = 3600


def overrides_of(policy: str, seed: int, steps: int) -> list[str]:
    return [*COLLAPSING, f'guard.policy="{policy}"', f"seed={seed}", f"steps={steps}"]


def run(policy: str, seed: int, steps: int, directory: Path) -> dict[str, Any]:
    """Train once; returns what the run says of itself. A run that fails is a row with its exit code, not the end."""
    name = f"{policy}-{seed}"
    overrides = overrides_of(policy, seed, steps)
    began = time.monotonic()
    code, run_dir = train(RECIPE, directory, name, overrides, RUN_LIMIT_S)
    summary, rows = read_json(run_dir.summary) or {}, read_jsonl(run_dir.metrics)
    shutil.rmtree(run_dir.path, ignore_errors=True)  # checkpoints: gigabytes
    return {
        "policy": policy,
        "seed": seed,
        "overrides": overrides,
        "exit_code": code,
        "wall_s": time.monotonic() - began,
        "steps": summary.get("steps"),
        "eval_before": summary.get("eval_before"),
        "eval_after_warm_start": summary.get("eval_after_warm_start"),
        "eval_after": summary.get("eval_after"),
        "rollbacks": summary.get("rollbacks", 0),
        "curve": [{key: row.get(key) for key in CURVE} for row in rows],
    }


def summarize(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Mean held-out reward at the end by policy, and what the guard gains, seed by seed."""
    after = {(row["policy"], row["seed"]): row["eval_after"] for row in runs if row["eval_after"] is not None}
    both = [seed for policy, seed in after if policy == "off" and ("rollback", seed) in after]
    gains = {seed: after["rollback", seed] - after["off", seed] for seed in both}
    by_policy = {policy: [reward for (found, _), reward in after.items() if found == policy] for policy in POLICIES}
    means = {f"eval_after_{policy}": statistics.mean(found) if found else None for policy, found in by_policy.items()}
    return means | {"gain_by_seed": gains, "gain_mean": statistics.mean(gains.values()) if gains else None}


def print_runs(console: Console, runs: list[dict[str, Any]], summary: dict[str, Any]) -> None:
    columns = (
        "seed",
        "policy",
        "warm start",
        "best step",
        "last step",
        "after",
        "rollbacks",
        "steps",
        "minutes",
        "exit",
    )
    table = Table(*columns, title="held-out reward of a run that collapses; rewards of training steps beside it")
    for row in runs:
        rewards = [step["reward_mean"] for step in row["curve"]]
        best, last = (max(rewards), rewards[-1]) if rewards else (None, None)
        figures = (row["eval_after_warm_start"], best, last, row["eval_after"])
        shown = ["–" if figure is None else f"{figure:.3f}" for figure in figures]
        rest = (row["rollbacks"], row["steps"], f"{row['wall_s'] / 60:.1f}", row["exit_code"])
        table.add_row(str(row["seed"]), row["policy"], *shown, *map(str, rest))
    console.print(table)
    if summary["gain_mean"] is not None:
        console.print(f"what going back gains in held-out reward, mean over seeds: {summary['gain_mean']:+.3f}")


def plot(runs: list[dict[str, Any]], path: Path) -> None:
    """Reward of the surviving steps, one line a run; the held-out reward at the end beside it."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 3.6), layout="constrained")
    colours, drawn = {"off": "tab:red", "rollback": "tab:blue"}, set[str]()
    for row in runs:
        steps, first = [step["step"] for step in row["curve"]], row["policy"] in colours.keys() - drawn
        drawn.add(row["policy"])
        rewards = [step["reward_mean"] for step in row["curve"]]
        colour = colours[row["policy"]]
        axes.plot(steps, rewards, color=colour, alpha=0.6, label=f"guard: {row['policy']}" if first else None)
        axes.plot([steps[-1] + 1], [row["eval_after"]], "D", color=colour, markersize=6)
    axes.set(xlabel="step (diamonds: held-out problems, at the end)", ylabel="reward", ylim=(0, 1))
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.legend(frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--out", type=Path, default=RESULTS / "guard.json")
    parser.add_argument("--plot", action="store_true", help="run nothing, draw the figure")
    options = parser.parse_args()
    console = Console(width=None if sys.stdout.isatty() else 120)
    if options.plot:
        plot([row for row in json.loads(options.out.read_text())["runs"] if not row["exit_code"]], FIGURE)
        return
    about = machine() | {"command": " ".join(["python -m benchmarks.guard", *sys.argv[1:]])}
    options.out.parent.mkdir(parents=True, exist_ok=True)
    known = (read_json(options.out) or {"runs": []})["runs"]
    runs: list[dict[str, Any]] = [row for row in known if not row["exit_code"]]
    done = [row["overrides"] for row in runs]
    with tempfile.TemporaryDirectory(prefix="tandem-bench-") as directory:
        for number, seed in enumerate(options.seeds):
            for policy in POLICIES if number % 2 == 0 else reversed(POLICIES):
                if overrides_of(policy, seed, options.steps) in done:
                    continue
                console.print(f"seed {seed}, guard.policy = {policy}")
                runs.append(run(policy, seed, options.steps, Path(directory)) | {"commit": about["commit"]})
                results = {"machine": about, "runs": runs, "summary": summarize(runs)}
                options.out.write_text(json.dumps(results, indent=1) + "\n")  # each time: what was measured is not lost
                if runs[-1]["exit_code"]:
                    console.print(f"exit code {runs[-1]['exit_code']}:", markup=False)
                    log = log_of(Path(directory), f"{policy}-{seed}").read_text("utf-8", "replace")
                    console.print("\n".join(log.splitlines()[-15:]), markup=False)
    print_runs(console, runs, summarize(runs))
    console.print(f"stored in {options.out}")


if __name__ == "__main__":
    main()
