"""`make bench`: measure, print, and store in benchmarks/results/. Takes about 25 minutes on two cores.

python -m benchmarks.run [--only weights,curve,joining,sleeping,vllm] [--steps N]
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

RESULTS = Path(__file__).resolve().parent / "results"
FAKE_TOKEN_S = 3.0
"""Makes the sleeping engine's rollouts about as long as the learner's step here."""


def machine() -> dict[str, Any]:
    """What the figures were measured on."""
    cpu = next(
        (line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line),
        platform.processor(),
    )
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    return {
        "cpu": cpu,
        "cores": os.cpu_count(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30),
        "commit": commit.stdout.strip(),
        "date": time.strftime("%Y-%m-%d"),
        "command": " ".join(["python -m benchmarks.run", *sys.argv[1:]]),
    }


def print_loop(console: Console, title: str, result: dict[str, Any]) -> None:
    columns = ("run", "s/step", "train s", "wait s", "end to end", "rollout", "learner", "lag")
    table = Table(*columns, title=f"{title} engine; completion tokens/s")
    for row in result["runs"]:
        name = row["name"].removeprefix(f"{title}-")
        figures = (row["step_s"], row["train_s"], row["wait_s"])
        rates = (row["end_to_end_tokens_per_s"], row["rollout_tokens_per_s"], row["learner_tokens_per_s"])
        table.add_row(
            name, *(f"{value:.1f}" for value in figures), *(f"{rate:.0f}" for rate in rates), f"{row['lag_mean']:.2f}"
        )
    console.print(table)
    console.print(f"overlapped / synchronous, end-to-end tokens/s: {result['overlap_speedup']:.2f}")


def print_weights(console: Console, result: dict[str, Any]) -> None:
    from benchmarks.weights_speed import LEARNING_RATES, STAGES

    table = Table("update", "MB", *STAGES, "sum", title="to another process; seconds, medians")
    rows = {f"{way}, lr {lr:g}": result[f"lr {lr:g}"][way] for lr in LEARNING_RATES for way in ("dense", "delta")}
    rows |= {name: result[name] for name in ("raw TCP", "raw ZeroMQ", "torch.save")}
    for name, row in rows.items():
        seconds = (f"{row[stage]:.3f}" if stage in row else "" for stage in STAGES)
        table.add_row(name, f"{row['bytes'] / 1e6:.2f}", *seconds, f"{row['total']:.3f}")
    console.print(table)
    for lr in LEARNING_RATES:
        found = result[f"lr {lr:g}"]
        sizes = sorted(found["dense"]["bytes"] / size for size in found["delta_bytes"])
        console.print(
            f"lr {lr:g}: 1/{found['smaller']:.0f} of dense (1/{sizes[0]:.0f} to 1/{sizes[-1]:.0f}), "
            f"{min(found['changed']):.2%} to {max(found['changed']):.2%} of the elements changed; "
            f"dense / delta, seconds: {found['faster']:.2f}"
        )
    low, median, high = result["dense_wire_over_raw_zmq"]
    console.print(f"dense over the wire / raw ZeroMQ, bytes a second: {median:.2f} (quartiles {low:.2f}, {high:.2f})")
    if "pause_s" in result:
        console.print(f"the engine's pause to load a version, the same for both: {result['pause_s']:.2f} s")


def print_joining(console: Console, result: dict[str, Any]) -> None:
    table = Table("beside", "tokens/s of the others", title="an actor joins and pulls 269 MB; medians")
    for name, key in (("nothing", ""), ("a joiner", "_during"), ("as much CPU burned", "_beside_burning")):
        table.add_row(name, f"{result[f'others_tokens_per_s{key}']:.0f}")
    console.print(table)
    low, middle, high = result["during_over_before"]
    console.print(
        f"during / before: {middle:.2f} ({low:.2f}-{high:.2f}); a join takes {result['join_s']:.1f} s, the first ticket"
        f" comes {result['first_ticket_s']:.3f} s after it"
    )


def print_curve(console: Console, result: dict[str, Any]) -> None:
    table = Table("", "plain", "CURVE", "plain / CURVE", "quartiles", title="over one hub, a second; medians")
    for name, unit in (("groups", 1.0), ("dense", 1e6)):
        row = result[name]
        low, median, high = row["price"]
        title = {"groups": "groups", "dense": "dense weights, MB"}[name]
        rates = (f"{row[way] / unit:.0f}" for way in ("plain", "curve"))
        table.add_row(title, *rates, f"{median:.2f}", f"{low:.2f} to {high:.2f}")
    console.print(table)
    flood = result["flood"]
    low, median, high = flood["strangers_over_burning"]
    console.print(
        f"groups a second alone: {flood['alone']:.0f}; beside {flood['connections_per_s']:.0f} strangers' connections a"
        f" second: {flood['strangers']:.0f}; beside the same CPU ({flood['cpu_share']:.2f} of a core) burned:"
        f" {flood['burning']:.0f}; strangers / burning {median:.2f} (quartiles {low:.2f}, {high:.2f})"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="weights,curve,joining,sleeping,vllm", help="parts to measure")
    parser.add_argument("--steps", type=int, default=8, help="steps of a run; the first and last do not count")
    options = parser.parse_args()
    console = Console(width=None if sys.stdout.isatty() else 120)
    results: dict[str, Any] = {"machine": machine()}
    for part in options.only.split(","):
        console.rule(part)
        if part == "weights":
            from benchmarks import weights_speed

            results[part] = weights_speed.measure()
            print_weights(console, results[part])
        elif part == "joining":
            from benchmarks import joining

            results[part] = joining.measure()
            print_joining(console, results[part])
        elif part == "curve":
            from benchmarks import curve

            results[part] = curve.measure()
            print_curve(console, results[part])
        elif part in ("vllm", "sleeping"):
            from benchmarks import loop_speed

            measured = (
                loop_speed.real_engine(options.steps)
                if part == "vllm"
                else loop_speed.sleeping_engine(options.steps, FAKE_TOKEN_S)
            )
            results[part] = measured
            print_loop(console, part, measured)
        else:
            parser.error(f"--only: found {part!r}, allowed: weights, curve, joining, sleeping, vllm")
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{results['machine']['date']}-{results['machine']['commit'] or 'uncommitted'}.json"
    path.write_text(json.dumps(results, indent=1) + "\n")
    console.print(f"stored in {path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path}")


if __name__ == "__main__":
    main()
