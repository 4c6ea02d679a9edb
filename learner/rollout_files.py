"""rollouts/: what the browser of rollouts shows beside the journal. Of each step the learner's logprobs, newest only.

    tokenizer.json               once: ids -> text, without the model's directory
    step-00000012.safetensors    of the step that 12 in metrics.jsonl and in the journal is
        logprobs     [T] float32  of every sampled token under the weights before the step's first update, at the
                                  ticket's temperature: exp(these - the engine's) is the importance ratio. NaN for
                                  tokens that were not trained on
        advantages   [C] float32  of each completion
        tokens       [C] int32    of each completion
        completions  [G] int32    of each group, in the order of the journal's record of the step
        metadata     step, version (published after it), branch, ids (JSON: [[epoch, index], …] of the groups)

A thread of its own writes them. Nothing that happens to it reaches the run: a full disk costs the file, and is said
once. Called by `loop.py`; read by `deploy/dashboard/rollouts.py`.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from queue import Full, Queue
from threading import Thread
from typing import Any

import numpy as np
from safetensors.numpy import save
from torch import Tensor

from learner.batch import Drawn
from protocol.rundir import replace_file

log = logging.getLogger(__name__)

TOKENIZER = "tokenizer.json"
KEEP_BYTES = 256 << 20
"""Of all steps. With 4 bytes a token, 64 million tokens: people look at the newest rollouts, or compare them with those
of some hundred steps ago. The journal itself is kept whole, and takes more than twice as much for each token."""
KEEP_STEPS = 4096
"""Files at most, where steps are small."""
QUEUED = 4
"""Steps that may wait for a slow disk; further ones are left out."""
CLOSE_S = 20.0
"""Longest wait at the end for what is not written yet."""


class RolloutFiles:
    """The open directory. One writer."""

    def __init__(
        self, directory: Path, tokenizer: Any, keep_bytes: int = KEEP_BYTES, keep_steps: int = KEEP_STEPS
    ) -> None:
        """`tokenizer`: of transformers; one without a fast backend leaves no tokenizer.json."""
        self._directory = directory
        self._keep_bytes, self._keep_steps = keep_bytes, keep_steps
        self._sizes: dict[Path, int] = {}
        """Of the files that are there, in the order in which they were written."""
        self._complained = False
        self._jobs: Queue[Callable[[], None] | None] = Queue(QUEUED)
        self._thread = Thread(target=self._work, name="rollout files", daemon=True)
        self._thread.start()
        text = "" if (directory / TOKENIZER).exists() else self._as_text(tokenizer)
        self._do(lambda: self._open(text))

    def keep(self, step: int, version: int, branch: int, drawn: Drawn, logprobs: Tensor) -> None:
        """Write a step's file behind the caller's back; one of the same step, of a branch given up, is replaced.

        `logprobs`: as of `FirstLogprobs.of_step`; not to be changed afterwards."""
        about = {"step": str(step), "version": str(version), "branch": str(branch), "ids": json.dumps(drawn.ids)}
        self._do(lambda: self._write(self._directory / f"step-{step:08d}.safetensors", drawn, logprobs, about))

    def close(self) -> None:
        """Write what is waiting, and end."""
        with suppress(Full):
            self._jobs.put(None, timeout=CLOSE_S)
        self._thread.join(CLOSE_S)
        if self._thread.is_alive():
            self._complain(f"the disk was waited for {CLOSE_S:g} s in vain")

    def _do(self, job: Callable[[], None]) -> None:
        try:
            self._jobs.put_nowait(job)
        except Full:
            self._complain("the disk is too slow")

    def _as_text(self, tokenizer: Any) -> str:
        """Here and not in the thread: a tokenizer in use by two is an error for one of them."""
        try:
            return tokenizer.backend_tokenizer.to_str() if hasattr(tokenizer, "backend_tokenizer") else ""
        except Exception as error:  # parts of it in Python, which have no text
            self._complain(f"the tokenizer: {error}")
            return ""

    # --- in the thread ---

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None:
            try:
                job()
            except Exception as error:  # whatever it is: the run is worth more than what is shown of it
                self._complain(f"{type(error).__name__}: {error}")

    def _complain(self, why: str) -> None:
        if not self._complained:
            log.warning("%s: not everything is kept for the browser of rollouts: %s", self._directory, why)
        self._complained = True

    def _open(self, tokenizer: str) -> None:
        self._directory.mkdir(exist_ok=True)
        for torn in self._directory.glob(".*"):  # of a process that was killed while it wrote
            torn.unlink()
        found = sorted(
            self._directory.glob("step-*.safetensors"), key=lambda path: (path.stat().st_mtime_ns, path.name)
        )
        self._sizes = {path: path.stat().st_size for path in found}
        if tokenizer:
            replace_file(self._directory / TOKENIZER, tokenizer)

    def _write(self, path: Path, drawn: Drawn, logprobs: Tensor, about: dict[str, str]) -> None:
        data = save(
            {
                "logprobs": logprobs.numpy(),
                "advantages": np.array([value for group in drawn.advantages for value in group], np.float32),
                "tokens": np.array([length for group in drawn.lengths for length in group], np.int32),
                "completions": np.array([len(group) for group in drawn.lengths], np.int32),
            },
            about,
        )
        self._make_room(len(data))
        replace_file(path, data)
        self._sizes.pop(path, None)
        self._sizes[path] = len(data)

    def _make_room(self, num_bytes: int) -> None:
        """Remove what was written longest ago: after a rollback the numbers of the steps begin anew."""
        while self._sizes and (
            len(self._sizes) >= self._keep_steps or sum(self._sizes.values()) + num_bytes > self._keep_bytes
        ):
            oldest = next(iter(self._sizes))
            oldest.unlink(missing_ok=True)
            del self._sizes[oldest]
