"""The `tandem` command. Thin: each command checks its input, calls one function and turns its result into an exit code.

Heavy packages are imported inside the commands, so that `tandem --help` answers at once.
"""

from __future__ import annotations

import contextlib
import signal
import sys
import time
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from deploy.data_cli import data_app
from deploy.scale import MAX_ACTORS
from protocol.addresses import is_loopback
from protocol.errors import RecipeError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from socket import socket

    from protocol.config import Recipe
    from protocol.rundir import RunDir

app = typer.Typer(
    name="tandem",
    help="Align language models with a learner and vLLM rollout actors.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
model_app = typer.Typer(help="Models on this machine.", no_args_is_help=True)
app.add_typer(model_app, name="model")
app.add_typer(data_app, name="data")

console = Console(markup=False)  # what is printed comes from elsewhere, too: "[/INST]" is no markup
errors = Console(stderr=True, markup=False)

DEMO_RECIPE = Path(__file__).resolve().parent.parent / "recipes" / "demo.toml"
EXIT_USER = 2

Overrides = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Override a key, e.g. optim.lr=2e-5; repeatable.")
]
RunsDir = Annotated[Path, typer.Option("--runs", help="Directory that holds the runs.")]
RayAddress = Annotated[
    str,
    typer.Option("--ray-address", envvar="RAY_ADDRESS", help="Join this Ray cluster instead of starting Ray here."),
]
WithDashboard = Annotated[
    bool, typer.Option("--dashboard", help="Serve the run's page while it goes on, on this machine only.")
]
DashboardPort = Annotated[
    int | None, typer.Option("--dashboard-port", metavar="PORT", min=1, max=65535, help="Default: 7704, or a free one.")
]


@app.command()
def demo(
    seed: Annotated[int, typer.Option(help="Seed of data, sampling and shuffles.")] = 0,
    overrides: Overrides = None,
    runs: RunsDir = Path("runs"),
    ray_address: RayAddress = "",
    dashboard: WithDashboard = False,
    dashboard_port: DashboardPort = None,
) -> None:
    """Align the bundled SmolLM2-135M on arithmetic with GRPO: a few minutes on two cores, from nothing to a report."""
    from protocol.config import load_recipe

    recipe = load_recipe(DEMO_RECIPE, (*(overrides or ()), f"seed={seed}"))
    _run(recipe, lambda: _new_run(recipe, runs), ray_address, dashboard, dashboard_port)


@app.command()
def train(
    recipe_path: Annotated[Path | None, typer.Argument(metavar="RECIPE", help="A recipe (TOML).")] = None,
    resume: Annotated[Path | None, typer.Option("--resume", metavar="RUN", help="Go on with this run.")] = None,
    overrides: Overrides = None,
    name: Annotated[str, typer.Option(help="Name of the run; default: the recipe's, with a number.")] = "",
    runs: RunsDir = Path("runs"),
    ray_address: RayAddress = "",
    dashboard: WithDashboard = False,
    dashboard_port: DashboardPort = None,
) -> None:
    """Train by a recipe, or go on with a run that was stopped (--resume, which keeps all but a few keys)."""
    if (recipe_path is None) == (resume is None):
        raise RecipeError("train: expected a RECIPE, or --resume RUN, and not both")
    if resume is not None:
        recipe, run = _resumed(resume, tuple(overrides or ()))
        _run(recipe, lambda: run, ray_address, dashboard, dashboard_port)
    else:
        from protocol.config import load_recipe

        assert recipe_path is not None
        given = (f'name="{name}"',) if name else ()
        recipe = load_recipe(recipe_path, (*(overrides or ()), *given))
        _run(recipe, lambda: _new_run(recipe, runs), ray_address, dashboard, dashboard_port)


@app.command("eval")
def evaluate(
    model: Annotated[str, typer.Argument(metavar="MODEL", help='Local directory, hub id, or "bundled".')],
    task: Annotated[str, typer.Option(help="arithmetic (default), gsm8k, jsonl, hub or reasoning_gym.")] = "",
    data: Annotated[str, typer.Option(metavar="FILE", help="jsonl, gsm8k: file of problems, drawn by seed.")] = "",
    dataset: Annotated[str, typer.Option(metavar="ID", help="hub: the data set. reasoning_gym: the task.")] = "",
    grader: Annotated[str, typer.Option(help="Default: the template's, else the task's.")] = "",
    template: Annotated[str, typer.Option(help="chat (default), r1_zero, question_only, or a file.")] = "",
    samples: Annotated[int | None, typer.Option("--n", help="Completions of each problem; default 8.")] = None,
    temperature: Annotated[float | None, typer.Option(help="Default 1.0; 0: greedy, with --n 1.")] = None,
    prompts: Annotated[str, typer.Option(metavar="N|all", help="Problems; default 64.")] = "",
    max_tokens: Annotated[int | None, typer.Option(help="Of a completion; default 512 for gsm8k, else 64.")] = None,
    seed: Annotated[int | None, typer.Option(help="Of the problems and the sampling; default 0.")] = None,
    recipe_path: Annotated[Path | None, typer.Option("--recipe", help="Take all else from a recipe (TOML).")] = None,
    overrides: Overrides = None,
    name: Annotated[str, typer.Option(help="Name of the run; default: eval-MODEL.")] = "",
    runs: RunsDir = Path("runs"),
    ray_address: RayAddress = "",
) -> None:
    """Measure a model as it is: accuracy, pass@k, classes of responses, examples. docs/evaluation.md explains them."""
    from deploy.evaluation import EvalOptions, eval_recipe, known_limit

    options = EvalOptions(
        model=model, task=task, data=data, dataset=dataset, grader=grader, template=template, samples=samples,
        temperature=temperature, prompts=prompts, max_tokens=max_tokens, seed=seed, name=name, recipe=recipe_path,
        overrides=tuple(overrides or ()),
    )  # fmt: skip
    recipe = eval_recipe(options, lambda path: known_limit(path, _dim))
    _run(recipe, lambda: _new_run(recipe, runs), ray_address)


@app.command()
def compare(
    a: Annotated[Path, typer.Argument(metavar="A", help="A run directory, or a result (.json, _responses.jsonl).")],
    b: Annotated[Path, typer.Argument(metavar="B", help="What A is compared with.")],
    json_path: Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Write the figures, too.")] = None,
) -> None:
    """Compare two evaluations, paired by problem, over the problems that both have."""
    from deploy.evaluation import compare as compare_results
    from deploy.evaluation import comparison_json, print_comparison, read_results
    from protocol.rundir import write_json

    comparison = compare_results(read_results(a), read_results(b))
    print_comparison(comparison, console)
    if json_path is not None:
        write_json(json_path, comparison_json(comparison))


@app.command()
def learner(
    recipe_path: Annotated[Path, typer.Argument(metavar="RECIPE", help="A recipe (TOML).")],
    overrides: Overrides = None,
    runs: RunsDir = Path("runs"),
) -> None:
    """The learner's side by hand: prints the address for `tandem actor` in another terminal."""
    from deploy.datasets import resolve_task
    from deploy.preflight import preflight
    from deploy.site import this_machine
    from learner.__main__ import main as learner_main
    from protocol.config import load_recipe
    from protocol.keys import make_keys

    recipe = this_machine(load_recipe(recipe_path, (*(overrides or ()), "actor.count=0"))).recipe
    recipe = resolve_task(recipe, console.print)
    model = preflight(recipe, console.print)
    run = _new_run(recipe, runs)
    _write_recipe(recipe, run)
    if recipe.needs_actors:
        make_keys(run.keys)
        _print_actor_command(recipe, run)
    code = learner_main(["--run", str(run.path), "--model", str(model)])
    if code == 3:
        _print_resume(run)
    raise typer.Exit(code)


@app.command()
def actor(
    learner_address: Annotated[str, typer.Argument(metavar="LEARNER", help="tcp://HOST:PORT or RUN/endpoint.json")],
    key: Annotated[str, typer.Option(metavar="FILE", help="Copy of RUN/keys/actor.json; not needed beside it.")] = "",
    name: Annotated[str, typer.Option(help="Unique among the actors of the run; default: host and process.")] = "",
    grader: Annotated[
        list[str] | None,
        typer.Option(metavar="MODULE:FUNCTION", help="A function of yours that the recipe's grader names; repeatable."),
    ] = None,
) -> None:
    """One rollout actor by hand, without Ray. What it needs to know comes from the learner, but for code of yours."""
    from actor.__main__ import main as actor_main

    options = [*(["--name", name] if name else []), *(["--key", key] if key else [])]
    raise typer.Exit(actor_main([learner_address, *options, *(f"--grader={function}" for function in grader or ())]))


@app.command()
def scale(
    count: Annotated[int, typer.Argument(metavar="N", min=0, max=MAX_ACTORS, help="Actors that the run is to have.")],
    name: Annotated[str, typer.Argument(metavar="[RUN]", help="Name or directory; default: the only one.")] = "",
    runs: RunsDir = Path("runs"),
    ray_address: Annotated[
        str, typer.Option("--ray-address", help="A run of this Ray cluster, started on any of its machines.")
    ] = "",
    wait: Annotated[bool, typer.Option("--wait", help="Until all serve, and the surplus has left.")] = False,
    timeout_s: Annotated[float, typer.Option("--timeout", metavar="SECONDS", help="Of --wait.")] = 900.0,
) -> None:
    """Change the number of rollout actors of a run while it goes on. 0: the learner waits until there are some."""
    from deploy.scale import follow, running_run
    from protocol.scaling import Wish

    with running_run(name, runs, ray_address) as run:
        before = run.leave_wish(Wish(count, "tandem scale"))
        console.print(f"{run.name}: {before} -> {count} actors", soft_wrap=True, highlight=False)
        reached = follow(run, count, _dim, wait, timeout_s if wait else 60.0)
    if wait and not reached:
        _print_error("not reached:", f"after {timeout_s:g} s not all of {count} actors serve")
        raise typer.Exit(1)


@app.command("dashboard")
def dashboard_command(
    name: Annotated[
        str, typer.Argument(metavar="[RUN]", help="Name or directory; default: the one that runs, else the last one.")
    ] = "",
    port: Annotated[
        int | None, typer.Option("--port", metavar="PORT", min=1, max=65535, help="Default: 7704, or a free one.")
    ] = None,
    host: Annotated[
        str, typer.Option("--host", metavar="ADDRESS", help="Not only this machine: nothing is encrypted there.")
    ] = "127.0.0.1",
    runs: RunsDir = Path("runs"),
) -> None:
    """Show a run in the browser, while it goes on or afterwards: throughput, who waits, learning, rollouts, scaling."""
    from deploy.dashboard.command import serve
    from deploy.runs import run_to_look_at

    serve(run_to_look_at(name, runs), host, port, lambda text: console.print(text, soft_wrap=True, highlight=False))


@app.command()
def status(
    name: Annotated[
        str, typer.Argument(metavar="[RUN]", help="Name or directory; default: the one that is running, or the last.")
    ] = "",
    runs: RunsDir = Path("runs"),
    once: Annotated[bool, typer.Option("--once", help="Print it once, and do not follow.")] = False,
) -> None:
    """Show a run live: throughput and waiting of both sides, queue, lag, weights, actors, reward, events, advice."""
    from deploy.runs import run_to_look_at
    from deploy.status import show

    show(run_to_look_at(name, runs), console, once)


@app.command()
def report(run: Annotated[Path, typer.Argument(metavar="RUN", help="A run directory.")]) -> None:
    """Print a run's report again, and draw its curve."""
    from deploy.report import print_report

    print_report(_existing_run(run), console)


@app.command()
def doctor(clean: Annotated[bool, typer.Option("--clean", help="Remove what crashed runs left.")] = False) -> None:
    """Check this machine: versions, engine, Ray, ports, memory; say what to do about each fault."""
    from rich.table import Table
    from rich.text import Text

    from deploy.doctor import clean_stale, run_checks, stale_files
    from deploy.working import Working

    marks = {"ok": Text("ok", "green"), "warn": Text("warn", "yellow"), "fail": Text("fail", "red")}
    table = Table("", "check", "found", "what to do")
    with Working(console) as working:
        working("checking")
        checks = run_checks()
    for check in checks:
        table.add_row(marks[check.level], check.name, check.found, check.advice)
    console.print(table)
    if clean:
        for path in clean_stale():
            console.print(f"removed {path}")
    elif stale := stale_files():
        console.print(f"{len(stale)} leftovers of crashed runs; `tandem doctor --clean` removes them")
    raise typer.Exit(1 if any(check.level == "fail" for check in checks) else 0)


@model_app.command("fetch")
def model_fetch(
    path: Annotated[str, typer.Argument(help='Hub id, local directory, or "bundled".')] = "bundled",
) -> None:
    """Bring a model to this machine and say where it lies."""
    from deploy.models import resolve_model
    from deploy.working import Working

    with Working(console) as working:
        found = resolve_model(path, working)
    console.print(str(found), soft_wrap=True)


# --- what the commands share ---


def _run(
    recipe: Recipe,
    make_run: Callable[[], RunDir],
    ray_address: str,
    dashboard: bool = False,
    dashboard_port: int | None = None,
) -> None:
    """Preflight, launch, report. Exits with the learner's code. A refused recipe leaves no run directory.

    With `dashboard`, or a port for it, the run's page is served meanwhile."""
    from deploy.datasets import resolve_task
    from deploy.launch import launch
    from deploy.preflight import check_gpu_memory, preflight
    from deploy.progress import ProgressView
    from deploy.report import print_report
    from deploy.site import open_site
    from deploy.working import Working
    from protocol.rundir import read_json

    began = time.monotonic()
    listening = _listening(dashboard_port) if dashboard or dashboard_port is not None else None
    with contextlib.ExitStack() as stack:
        with Working(console) as working:
            working("checking the recipe")
            recipe = resolve_task(recipe, working)
            model = preflight(recipe, working, ray_address)
            site = stack.enter_context(open_site(recipe, ray_address, working))
            recipe = site.recipe
            check_gpu_memory(recipe, model, site.learner_gpus, site.actor_gpus)
        run = make_run()
        console.print(f"run {run.path}", soft_wrap=True)
        with run.lock("launcher"):
            _write_recipe(recipe, run)
            if recipe.needs_actors and not recipe.actor.count:
                _print_actor_command(recipe, run)
            with _dashboard(run, listening), ProgressView(console, recipe.name) as view:
                code = launch(site, run, model, view)
    status = read_json(run.status) or {}
    if code == 0:
        print_report(run, console)
        console.print(f"finished in {(time.monotonic() - began) / 60:.1f} minutes")
    elif code == 3:
        _print_resume(run)
    else:
        _print_error("the run failed:", status.get("error", f"the learner ended with {code}"))
        errors.print(f"logs: {run.logs}", soft_wrap=True)
    raise typer.Exit(code if code >= 0 else 1)


def _listening(port: int | None) -> socket:
    """For the run's page; refused before anything starts."""
    from deploy.dashboard.server import open_socket

    return open_socket(port=port)


@contextmanager
def _dashboard(run: RunDir, listening: socket | None) -> Iterator[None]:
    """Within, the run's page is served, if that is wanted, and its address has been said."""
    if listening is None:
        yield
        return
    from deploy.dashboard.server import Dashboard

    with Dashboard(run, listening) as dashboard:
        console.print(f"dashboard {dashboard.address}", soft_wrap=True, highlight=False)
        yield


def _dim(text: str) -> None:
    console.print(text, style="dim", highlight=False)


def _print_resume(run: RunDir) -> None:
    """How to go on with a stopped run; where its last checkpoint stands."""
    steps = run.checkpoint_steps()
    where = f"with a checkpoint of step {max(steps)}" if steps else "before its first checkpoint"
    text = f"stopped {where}. Go on with:\n  tandem train --resume {run.path}"
    console.print(text, soft_wrap=True, highlight=False)


def _print_actor_command(recipe: Recipe, run: RunDir) -> None:
    wire = recipe.wire
    text = f"once it listens, in another terminal:\n  tandem actor {run.endpoint}"
    if not is_loopback(wire.address):
        key = "" if wire.no_keys_on_trusted_network else f" --key {run.actor_keys.name}"
        text += (
            f"\nor, on a machine that does not see this directory{f', with a copy of {run.actor_keys}' if key else ''}:"
            f"\n  tandem actor tcp://{wire.address}:{wire.port or 'PORT'}{key}"
        )
    console.print(text, soft_wrap=True, highlight=False)


def _print_error(head: str, error: object) -> None:
    from rich.text import Text

    errors.print(Text.assemble((head, "red"), f" {error}"), soft_wrap=True)


def _new_run(recipe: Recipe, runs: Path) -> RunDir:
    """A directory of its own for a new run: NAME, or NAME-2, NAME-3 … where that is taken."""
    from protocol.rundir import RunDir

    for number in range(1, 10_000):
        path = runs / (recipe.name if number == 1 else f"{recipe.name}-{number}")
        try:
            path.mkdir(parents=True)
        except FileExistsError:
            continue
        return RunDir(path.resolve()).create()
    raise RecipeError(f"--runs {runs}: ten thousand runs are called {recipe.name}")


def _existing_run(path: Path) -> RunDir:
    from protocol.rundir import RunDir

    run = RunDir(path.resolve())
    if not run.recipe.is_file():
        raise RecipeError(f"{path}: no run directory (it has no {run.recipe.name})")
    return run


def _resumed(path: Path, overrides: tuple[str, ...]) -> tuple[Recipe, RunDir]:
    """A run to go on with, and its recipe with the changes that a resumed run may make."""
    from protocol.config import check_resumable, load_recipe

    run = _existing_run(path)
    with run.lock("launcher"), run.lock("learner"):  # refuses a run that is alive, before anything of it is touched
        pass
    before, after = load_recipe(run.recipe), load_recipe(run.recipe, overrides)
    for key, (old, new) in check_resumable(before, after).items():
        console.print(f"{key}: {old!r} -> {new!r}")
    if not run.checkpoint_steps():
        console.print("the run has no checkpoint yet: it starts from the beginning")
    return after, run


def _write_recipe(recipe: Recipe, run: RunDir) -> None:
    import tomli_w

    from protocol.rundir import replace_file

    replace_file(run.recipe, tomli_w.dumps(recipe.model_dump(mode="json")))


def main() -> None:
    """Entry point: user errors become one message and exit code 2."""
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    try:
        app()
    except (RecipeError, ValueError, FileNotFoundError) as error:
        _print_error("error:", error)
        sys.exit(EXIT_USER)
    except (OSError, TimeoutError) as error:
        _print_error("error:", f"{type(error).__name__}: {error}")
        sys.exit(1)


if __name__ == "__main__":
    main()
