"""`tandem data`: bring data sets to this machine, and look at a task as the model sees it. Thin, as `cli.py` is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

if TYPE_CHECKING:
    from learner.intake.data import Task
    from protocol.config import Recipe

data_app = typer.Typer(help="Data sets on this machine.", no_args_is_help=True)
console = Console(markup=False, highlight=False, soft_wrap=True)

GSM8K = "gsm8k"
SHOWN_CHARS = 2000


@data_app.command("fetch")
def fetch(
    name: Annotated[str, typer.Argument(metavar="NAME", help='"gsm8k", a hub id (OWNER/NAME), or a directory.')],
    source: Annotated[
        Path | None, typer.Option("--from", metavar="FILE-OR-DIR", help="gsm8k: take it from here, not from the hub.")
    ] = None,
    subset: Annotated[str, typer.Option(help="Configuration of the hub's data set.")] = "",
    split: Annotated[str, typer.Option(help="Its split.")] = "train",
) -> None:
    """Bring a data set into the cache; say where it lies, how many records it has and what they look like."""
    from deploy.datasets import fetch_gsm8k, hub_file, read_records
    from deploy.working import Working
    from protocol.errors import RecipeError

    if name != GSM8K and source is not None:
        raise RecipeError(f"--from: found {source} with {name}, allowed: with {GSM8K}; name a directory itself")
    with Working(console) as working:
        if name == GSM8K:
            files = list(fetch_gsm8k(source, working).values())
        else:
            files = [hub_file(name, subset, split, working, again=True)]
    for file in files:
        records = read_records(file)
        first = next(records)
        console.print(f"{file}: {1 + sum(1 for _ in records)} records")
        if file == files[0]:
            fields = ", ".join(f"{key} ({type(value).__name__})" for key, value in first.items())
            console.print(
                f"fields: {fields}\nthe first record:\n{_short(json.dumps(first, indent=1, ensure_ascii=False))}"
            )


@data_app.command("show")
def show(
    recipe_path: Annotated[Path, typer.Argument(metavar="RECIPE", help="A recipe (TOML).")],
    overrides: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Override a key; repeatable.")
    ] = None,
    count: Annotated[int, typer.Option(help="Examples to show.")] = 3,
) -> None:
    """Print examples of a recipe's task as the model sees them: whole prompt, reference, responses to learn from."""
    from transformers import AutoTokenizer

    from deploy.datasets import resolve_task
    from deploy.models import resolve_model
    from deploy.working import Working
    from learner.intake.data import load_task
    from protocol.config import load_recipe

    with Working(console) as working:
        recipe = resolve_task(load_recipe(recipe_path, tuple(overrides or ())), working)
        tokenizer = AutoTokenizer.from_pretrained(resolve_model(recipe.model.path, working))
    print_examples(recipe, load_task(recipe, tokenizer), count)


def print_examples(recipe: Recipe, task: Task, count: int) -> None:
    """The first examples that the method of the recipe gets."""
    preferences, demonstrations = task.preference_pairs(), task.sft_pairs()
    console.print(
        f"{task.train_size} problems to train on, {len(task.heldout)} held out, {len(demonstrations)} with a solution,"
        f" {len(preferences)} with a preference"
    )
    if recipe.method == "dpo":
        for prompt, chosen, rejected in preferences[:count]:
            _print_parts(task, prompt=prompt, chosen=chosen, rejected=rejected)
    elif recipe.method == "sft":
        for prompt, response in demonstrations[:count]:
            _print_parts(task, prompt=prompt, response=response)
    else:
        evaluated = recipe.method == "eval"
        for index in range(min(count, len(task.heldout) if evaluated else task.train_size)):
            example = task.heldout[index] if evaluated else task.train(index)
            _print_parts(task, prompt=example.prompt_ids)
            console.print(f"--- reference\n{example.shown_answer}")
            if example.answer_text:
                console.print(f"--- what the grader gets\n{_short(example.answer)}")
            if example.solution:
                console.print(f"--- solution\n{example.solution}")


def _print_parts(task: Task, **parts: tuple[int, ...]) -> None:
    console.rule()
    for name, ids in parts.items():
        console.print(f"--- {name}, {len(ids)} tokens\n{task.text(ids)}")


def _short(text: str) -> str:
    return text if len(text) <= SHOWN_CHARS else f"{text[:SHOWN_CHARS]}… ({len(text)} characters)"
