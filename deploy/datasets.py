"""Data sets from the hub, a directory or a file to JSON lines in the cache, where the learner reads them.

Called by `tandem data fetch`, and by the launcher before a run: `resolve_task` puts the files of this machine into the
recipe. Data sets are data: no code of theirs is executed (the package `datasets` no longer can, from version 4 on).
"""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote

import xxhash

from deploy.models import cache_dir
from learner.intake.jsonl import MAX_FAULTS_SHOWN
from learner.intake.records import Reading, read_problem
from protocol.config import Recipe
from protocol.errors import RecipeError

GSM8K_ID, GSM8K_SUBSET = "openai/gsm8k", "main"
GSM8K_SPLITS = ("train", "test")
HUB_TIMEOUT_S = 20.0
_MEDIA = ("Image", "Audio", "Video", "Pdf", "Nifti")
_BINARY = ("binary", "large_binary")


class Keys(NamedTuple):
    """What errors call the three parts of a data set's name: the options of a command, or the keys of a recipe."""

    dataset: str = "NAME"
    subset: str = "--subset"
    split: str = "--split"


COMMAND_KEYS = Keys()
GSM8K_KEYS = Keys(split="--from")
SOURCE_KEYS = Keys("--from", split="--from")


def recipe_keys(split: str) -> Keys:
    return Keys("task.dataset", "task.subset", f"task.{split}")


Progress = Callable[[str], None]
Records = Iterable[dict[str, Any]]


def gsm8k_files() -> dict[str, Path]:
    """Split -> where `tandem data fetch gsm8k` puts it."""
    return {split: cache_dir() / "data" / "gsm8k" / f"{split}.jsonl" for split in GSM8K_SPLITS}


def resolve_task(recipe: Recipe, progress: Progress) -> Recipe:
    """The recipe with `task.train` and `task.heldout` as files on this machine; a hub's data set is fetched for it.

    The result is what a run's recipe.toml holds, so that the learner needs neither the hub nor the cache's layout.
    """
    task = recipe.task
    files: dict[str, str] = {}
    if task.name == "gsm8k" and not task.train:
        cached = gsm8k_files()
        if not cached["train"].is_file():
            raise RecipeError(
                f'task.train: found "", and no GSM8K at {cached["train"]}; allowed: a file, or fetch it once:\n'
                "  tandem data fetch gsm8k"
            )
        files["train"] = str(cached["train"])
        if not task.heldout and cached["test"].is_file():
            files["heldout"] = str(cached["test"])
    elif task.name == "hub":
        files["train"] = str(
            hub_file(task.dataset, task.subset, task.train_split, progress, recipe_keys("train_split"))
        )
        if task.heldout_split:
            heldout = hub_file(task.dataset, task.subset, task.heldout_split, progress, recipe_keys("heldout_split"))
            files["heldout"] = str(heldout)
    return recipe.model_copy(update={"task": task.model_copy(update=files)})


def hub_file(
    dataset: str, subset: str, split: str, progress: Progress, keys: Keys = COMMAND_KEYS, again: bool = False
) -> Path:
    """One split as JSON lines in the cache. The hub is asked where there is no copy, or `again`.

    `dataset` may be a local directory of JSONL or Parquet files, which is read anew every time.
    """
    local = Path(dataset).expanduser()
    name = f"{local.name}-{xxhash.xxh3_64_hexdigest(bytes(local.resolve()))}" if local.is_dir() else dataset
    target = (
        cache_dir() / "data" / "hub" / quote(name, "") / quote(subset or "default", "") / f"{quote(split, '')}.jsonl"
    )
    if target.is_file() and not again and not local.is_dir():
        return target
    progress(f"reading {dataset}" if local.is_dir() else f"fetching {dataset} ({split}) from the Hugging Face hub")
    with _loaded(dataset, subset, split, keys) as records:
        count = _write(target, records)
    if not count:
        target.unlink()
        raise RecipeError(
            f"{keys.split}: found {split!r} of {dataset} without a record, allowed: a split that has some"
        )
    return target


def fetch_gsm8k(source: Path | None, progress: Progress) -> dict[str, Path]:
    """GSM8K from the hub, or from a file or directory of its format, into the cache: split -> file.

    A directory holds train and test as JSONL or Parquet; a single file is the training problems, off which the held-out
    ones are then split. Raises RecipeError with file, line and field of what is wrong in it.
    """
    targets = gsm8k_files()
    if source is not None and not source.exists():
        raise RecipeError(f"--from: found {source}, which does not exist; allowed: a file or directory of GSM8K")
    fetched: dict[str, Path] = {}
    for split in GSM8K_SPLITS if source is None or source.is_dir() else GSM8K_SPLITS[:1]:
        progress(f"fetching {GSM8K_ID} ({split}) from the Hugging Face hub" if source is None else f"reading {source}")
        with _gsm8k_records(source, split) as (records, name):
            _write(targets[split], _checked(records, name))
        fetched[split] = targets[split]
    for split in set(targets) - set(fetched):  # another data set's held-out problems are not this one's
        targets[split].unlink(missing_ok=True)
    return fetched


def read_records(path: Path) -> Iterator[dict[str, Any]]:
    """The objects of a file of JSON lines. Raises RecipeError with file and line."""
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except ValueError as error:
                raise RecipeError(f"{path}:{number}: found no JSON ({error}), allowed: one object a line") from None
            if not isinstance(record, dict):
                raise RecipeError(f"{path}:{number}: found {line[:60]!r}, allowed: a JSON object")
            yield record


@contextlib.contextmanager
def _gsm8k_records(source: Path | None, split: str) -> Iterator[tuple[Records, str]]:
    """(records, their name in errors) of one split."""
    if source is None:
        with _loaded(GSM8K_ID, GSM8K_SUBSET, split, GSM8K_KEYS) as records:
            yield records, f"{GSM8K_ID}/{split}"
        return
    file = source / f"{split}.jsonl" if source.is_dir() else source
    if file.is_file() and file.suffix != ".parquet":
        yield read_records(file), str(file)
        return
    subset = GSM8K_SUBSET if (source / GSM8K_SUBSET).is_dir() else ""
    folder = source / subset if source.is_dir() else source
    with _loaded(str(folder), "", split, SOURCE_KEYS) as records:
        yield records, f"{folder}/{split}" if source.is_dir() else str(source)


def _checked(records: Records, name: str) -> Iterator[dict[str, Any]]:
    """The records as they are. Raises RecipeError with the faults of those that are not as GSM8K's are."""
    faults = []
    for number, record in enumerate(records, start=1):
        try:
            if "question" not in record:
                raise ValueError(f"question: found nothing, allowed: a text (the record has {', '.join(record)})")
            read_problem(record, Reading())
        except ValueError as error:
            faults.append(f"{name}:{number}: {error}")
            if len(faults) == MAX_FAULTS_SHOWN:
                break
        yield record
    if faults:
        raise RecipeError("\n".join(faults))


def _write(target: Path, records: Records) -> int:
    """One JSON object a line, all or nothing: a file that is there is whole. Returns how many."""
    target.parent.mkdir(parents=True, exist_ok=True)
    handle, part = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            count = 0
            for record in records:
                file.write(json.dumps(record, ensure_ascii=False, default=str) + "\n")
                count += 1
        Path(part).chmod(0o644)
        Path(part).replace(target)
    except BaseException:
        Path(part).unlink(missing_ok=True)
        raise
    return count


@contextlib.contextmanager
def _loaded(dataset: str, subset: str, split: str, keys: Keys) -> Iterator[Records]:
    """The records of one split, by the package `datasets`; pictures, sound and bytes are left out.

    Its own copies of local files go when the block ends; of the hub's it keeps them in its cache. Raises RecipeError.
    """
    import datasets

    path = Path(dataset).expanduser()
    arguments: dict[str, Any] = {"path": dataset, "name": subset or None, "split": split}
    if path.is_file():
        arguments |= {"path": path.suffix.lstrip("."), "data_files": {split: str(path)}}
    elif path.is_dir():
        arguments["path"] = str(path)
    with tempfile.TemporaryDirectory() as scratch, _quiet():
        try:
            if path.exists():
                arguments["cache_dir"] = scratch
            else:
                _ask_hub(dataset)
            loaded = datasets.load_dataset(**arguments)
        except Exception as error:  # the hub's client and the readers of a dozen formats raise as many kinds
            raise _refusal(error, dataset, subset, split, keys) from error
        kept = [name for name, feature in loaded.features.items() if not _is_media(feature)]
        yield loaded.select_columns(kept)


def _is_media(feature: Any) -> bool:
    return type(feature).__name__ in _MEDIA or getattr(feature, "dtype", None) in _BINARY


def _ask_hub(dataset: str) -> None:
    """Raise what the hub says of this data set: at once, where loading would try again for half a minute."""
    from huggingface_hub import HfApi, constants

    if not constants.HF_HUB_OFFLINE:  # then its cache is all there is
        HfApi().dataset_info(dataset, timeout=HUB_TIMEOUT_S)


def _refusal(error: Exception, dataset: str, subset: str, split: str, keys: Keys) -> RecipeError:
    """One line: the key, what was found, the cause, what is allowed."""
    text = " ".join(str(error).split()) or type(error).__name__
    if "Unknown split" in text:
        return RecipeError(
            f"{keys.split}: found {split!r} of {dataset}, allowed: {text.partition('one of ')[2] or text}"
        )
    if "BuilderConfig" in text or "Config name is missing" in text:
        return RecipeError(f"{keys.subset}: found {subset!r} of {dataset}; {text}")
    copy = "a copy of it with `tandem data fetch gsm8k --from FILE-OR-DIR`"
    return RecipeError(
        f"{keys.dataset}: found {dataset!r}, which cannot be had: {text[:300]}. Allowed: the id of a data set on the"
        " hub (owner/name; see HF_ENDPOINT, HF_TOKEN), one that `tandem data fetch` brought before, or"
        f" {copy if dataset == GSM8K_ID else 'a local directory of JSONL or Parquet files'}"
    )


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """No progress bars and no retries on the terminal: the caller says what goes on."""
    import datasets
    from huggingface_hub.utils import logging as hub_logging

    verbosity, hub_verbosity = datasets.logging.get_verbosity(), hub_logging.get_verbosity()
    bars = datasets.is_progress_bar_enabled()
    datasets.logging.set_verbosity_error()
    hub_logging.set_verbosity_error()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        datasets.logging.set_verbosity(verbosity)
        hub_logging.set_verbosity(hub_verbosity)
        if bars:
            datasets.enable_progress_bars()
