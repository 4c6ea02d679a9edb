"""The inference engine that runs are made with: vLLM's `AsyncLLM` behind `actor.engine.Engine`.

Starts vLLM with random weights, draws one completion a request, and swaps in whole versions that somebody else fetched
and checked. It knows nothing of tickets, rewards or sockets; `actor.loop` calls it. CUDA is used where torch sees it,
else the CPU build. vllm and torch are imported inside the functions, after the environment they read is set.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import math
import multiprocessing
import os
import shutil
import tempfile
import time
from collections.abc import Coroutine, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, TypeVar

from actor.engine import Generated
from actor.staging import engine_prefix
from actor.vllm_children import ERRORS_VARIABLE, PARENT_VARIABLE, describe, recorded_cause
from protocol.errors import EngineFailed
from protocol.messages import Manifest, Sampling, Welcome
from protocol.rundir import OWNER_FILE

SHUTDOWN_GRACE_S = 2.0
"""vLLM kills what has not ended by then; its processes hold nothing worth more patience."""
STOP_TIMEOUT_S = 20.0
WATCH_S = 1.0
GIB = 1 << 30
SOCKET_PATH_CHARS = 103
SOCKET_NAME_CHARS = 36
"""vLLM calls its sockets by UUIDs."""

T = TypeVar("T")
CPU_BLOCK_TOKENS = 32
BATCHED_TOKENS = 2048
"""Tokens that the CPU engine takes through the model at once; a prompt has to fit as a whole."""


@dataclass(frozen=True)
class EngineSettings:
    """The part of the recipe's `[actor]` section that concerns the engine (`protocol.config.ActorConfig`)."""

    max_running: int = 64
    kv_cache_gib: float = 1.0
    gpu_memory_utilization: float = 0.85
    threads: int = 0
    enforce_eager: bool = True
    gpus: float = 0.0

    @classmethod
    def of(cls, welcome: Welcome) -> EngineSettings:
        known = {field.name for field in fields(cls)}
        return cls(**{key: value for key, value in welcome.engine.items() if key in known})  # type: ignore[arg-type]

    @property
    def tensor_parallel(self) -> int:
        return max(1, int(self.gpus))

    @property
    def gpu_share(self) -> float:
        """Share of a GPU's memory: the utilization, of the fraction where the actor has only a fraction of it."""
        return self.gpu_memory_utilization * (self.gpus if 0 < self.gpus < 1 else 1.0)


class VLLMEngine:
    """See `actor.engine.Engine`. One per process; `start` once."""

    def __init__(self) -> None:
        self._llm: Any = None
        self._version = 0
        self._kv = "keep"
        self._condemned = ""
        self._errors = Path()
        self._errors_seen = 0
        self._foreign: set[int] = set()
        self._death: asyncio.Task[None] | None = None
        # vLLM's processes are killed by the kernel when the thread that started them ends (`vllm_children`): this
        # one lives until `stop`.
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="vllm")

    @property
    def version(self) -> int:
        return self._version

    async def start(self, welcome: Welcome) -> None:
        self._kv = welcome.kv
        self._foreign = engine_cores()
        self._errors = Path(tempfile.mkdtemp(prefix=engine_prefix(welcome.run))) / "errors.jsonl"
        owner = self._errors.parent / OWNER_FILE  # tells `tandem doctor --clean` what is left over
        owner.write_text(str(os.getpid()))
        try:
            self._llm = await self._in_thread(self._build, welcome)
        except Exception as error:
            cause = self._cause(error)
            await self.stop()
            raise EngineFailed(cause) from error
        self._death = asyncio.create_task(self._watch())

    def _build(self, welcome: Welcome) -> Any:
        settings = EngineSettings.of(welcome)
        import torch  # before the OpenMP variables: this process computes nothing

        cuda = torch.cuda.is_available()
        # vLLM's CPU platform asks torch the same way; there is no public name for it
        dtype = compute_dtype(welcome.dtype, cuda, native_bfloat16=torch.cpu._is_avx512_bf16_supported())
        os.environ.update(environment(settings, cuda, self._errors))

        from vllm.config import WeightTransferConfig
        from vllm.engine.arg_utils import AsyncEngineArgs
        from vllm.v1.engine.async_llm import AsyncLLM

        from actor.vllm_weights import BACKEND, register

        register()  # in this process, too: the configuration is checked here
        return AsyncLLM.from_engine_args(
            AsyncEngineArgs(
                **engine_arguments(welcome, settings, cuda, dtype),
                weight_transfer_config=WeightTransferConfig(backend=BACKEND),
            )
        )

    async def _watch(self) -> None:
        """Ends, and condemns the engine, when its core dies: vLLM leaves requests in flight waiting for ever then."""
        pids = engine_cores() - self._foreign
        cores = [child for child in multiprocessing.active_children() if child.pid in pids]
        while all(core.is_alive() for core in cores):  # noqa: ASYNC110 - of a process there is no event
            await asyncio.sleep(WATCH_S)
        codes = ", ".join(str(core.exitcode) for core in cores if not core.is_alive())
        died = f"vLLM's EngineCore process died (exit code {codes})"
        self._condemn(recorded_cause(self._errors) or died)

    async def _unless_dead(self, work: Coroutine[Any, Any, T]) -> T:
        """Result of `work`; EngineFailed if the engine core dies first. Cancelled, it cancels the work."""
        assert self._death is not None, "start comes first"
        task = asyncio.ensure_future(work)
        try:
            await asyncio.wait({task, self._death}, return_when=asyncio.FIRST_COMPLETED)
            if task.done():
                return task.result()
            raise EngineFailed(self._condemned)
        finally:
            if not task.done():
                task.cancel()
                await asyncio.wait({task}, timeout=WATCH_S)

    async def generate(
        self, request_id: str, prompt_ids: tuple[int, ...], sampling: Sampling, seed: int, cache_salt: str
    ) -> Generated:
        """Raises EngineFailed when the engine died, ValueError when it refuses the request (a prompt too long)."""
        self._check_serving()
        return await self._unless_dead(self._generate(request_id, prompt_ids, sampling, seed, cache_salt))

    async def _generate(
        self, request_id: str, prompt_ids: tuple[int, ...], sampling: Sampling, seed: int, cache_salt: str
    ) -> Generated:
        from vllm import SamplingParams
        from vllm.exceptions import VLLMClientError
        from vllm.inputs import TokensPrompt
        from vllm.sampling_params import RequestOutputKind
        from vllm.v1.engine.exceptions import EngineDeadError, EngineGenerateError

        parameters = SamplingParams(
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            top_k=sampling.top_k,
            min_p=sampling.min_p,
            max_tokens=sampling.max_tokens,
            stop=list(sampling.stop),
            include_stop_str_in_output=True,  # its tokens are trained on, and graders look for what it closes
            seed=seed,
            logprobs=0,  # of the sampled token only
            output_kind=RequestOutputKind.FINAL_ONLY,
        )
        prompt = TokensPrompt(prompt_token_ids=list(prompt_ids), cache_salt=cache_salt)
        output = None
        try:
            async for partial in self._llm.generate(prompt, parameters, request_id):
                output = partial
        except VLLMClientError as error:
            raise ValueError(f"request {request_id}: {error}") from error
        except (EngineDeadError, EngineGenerateError) as error:
            # The second is "unexpected, possibly recoverable", and what requests see first when a worker dies.
            raise self._condemn(self._cause(error.__cause__ or error)) from error
        if output is None or not output.finished:
            raise RuntimeError(f"request {request_id}: the engine ended it without a result")
        return to_generated(request_id, output.outputs[0])

    async def load(self, manifest: Manifest, staged: Path) -> float:
        self._check_alive()
        return await self._unless_dead(self._load(manifest, staged))

    async def _load(self, manifest: Manifest, staged: Path) -> float:
        from vllm.distributed.weight_transfer.base import WeightTransferUpdateRequest

        update = WeightTransferUpdateRequest(update_info={"path": str(staged)})
        began = time.perf_counter()
        self._errors_seen = self._errors.stat().st_size if self._errors.exists() else 0
        try:
            # clear_cache preempts what runs, so that its keys and values are computed again after the swap
            await self._llm.pause_generation(mode="keep", clear_cache=self._kv == "recompute")
            await self._llm.start_weight_update()
            await self._llm.update_weights(update)
            await self._llm.finish_weight_update(weight_version=str(manifest.version))
            await self._llm.resume_generation()
        except BaseException as error:  # a cancelled load, too, leaves a mixture of versions
            failure = self._condemn(f"loading version {manifest.version} failed: {self._cause(error)}")
            if isinstance(error, Exception):
                raise failure from error
            raise
        self._version = manifest.version
        return time.perf_counter() - began

    async def checksum(self) -> str:
        """vLLM's checksums of all workers. On the CPU build they hash empty tensors, so there are none."""
        import torch

        if not torch.cuda.is_available():
            return ""
        self._check_serving()
        workers = await self._unless_dead(self._llm.compute_weight_checksums())
        found = {name: digest for worker in workers for name, digest in worker.items()}
        return hashlib.sha256(json.dumps(found, sort_keys=True).encode()).hexdigest()

    def metrics(self) -> str:
        """vLLM's own, without the times at which its counters began."""
        from prometheus_client import generate_latest
        from vllm.v1.metrics.prometheus import get_prometheus_registry

        class OwnFamilies:
            def collect(self) -> Iterator[Any]:
                for family in get_prometheus_registry().collect():
                    if family.name.startswith("vllm:"):
                        family.samples = [one for one in family.samples if not one.name.endswith("_created")]
                        yield family

        return generate_latest(OwnFamilies()).decode()  # all that is asked of a registry

    async def stop(self) -> None:
        if self._death is not None:
            self._death.cancel()
        llm, self._llm = self._llm, None
        self._condemned = self._condemned or "the engine was stopped"
        await self._in_thread(end_processes, llm, self._foreign)
        self._thread.shutdown(wait=False)
        if self._errors.parent.name.startswith("tandem-"):
            shutil.rmtree(self._errors.parent, ignore_errors=True)

    async def _in_thread(self, function: Any, *arguments: Any) -> Any:
        return await asyncio.get_running_loop().run_in_executor(self._thread, function, *arguments)

    def _check_alive(self) -> None:
        if self._condemned or self._llm is None:
            raise EngineFailed(self._condemned or "the engine was not started")

    def _check_serving(self) -> None:
        self._check_alive()
        assert self._version, "generate before the first load: the weights are random"

    def _cause(self, error: BaseException) -> str:
        return recorded_cause(self._errors, self._errors_seen) or describe(error)

    def _condemn(self, reason: str) -> EngineFailed:
        self._condemned = self._condemned or reason
        return EngineFailed(self._condemned)


# --- settings -------------------------------------------------------------------------------------------------------


def environment(settings: EngineSettings, cuda: bool, errors: Path) -> dict[str, str]:
    """Variables that vLLM's processes read, to be set before vllm is imported."""
    variables = {
        PARENT_VARIABLE: str(os.getpid()),
        ERRORS_VARIABLE: str(errors),
        "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
        "VLLM_NO_USAGE_STATS": "1",
    }
    if len(str(errors.parent)) + 1 + SOCKET_NAME_CHARS <= SOCKET_PATH_CHARS:
        variables["VLLM_RPC_BASE_PATH"] = str(errors.parent)  # its sockets stay behind, and go with the directory
    if not cuda:
        threads = settings.threads or len(os.sched_getaffinity(0))
        variables |= {
            "OMP_NUM_THREADS": str(threads),  # Ray sets it to the actor's CPUs
            # Bound, vLLM leaves a core to its scheduler: half of a small machine. The learner wants the cores as well,
            # so threads wait asleep instead of spinning.
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
            "OMP_WAIT_POLICY": "PASSIVE",
            # Only without this does vLLM leave the CPU worker inside the engine core, see `engine_arguments`. AsyncLLM
            # runs the engine core in a process of its own all the same.
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        }
    return variables


def compute_dtype(wire_dtype: str, cuda: bool, native_bfloat16: bool) -> str:
    """The engine's own type: bfloat16 weights are widened, which is exact, where the CPU only emulates bfloat16.

    There vLLM falls back to an emulated matrix product: 8 tokens/s against 50 in float32 (SmolLM2-135M, AVX2, 2 busy
    cores).
    """
    return "float32" if wire_dtype == "bfloat16" and not cuda and not native_bfloat16 else wire_dtype


def engine_arguments(welcome: Welcome, settings: EngineSettings, cuda: bool, dtype: str) -> dict[str, Any]:
    """Keyword arguments of vLLM's `AsyncEngineArgs`."""
    device: dict[str, Any]
    if cuda:
        device = {"gpu_memory_utilization": settings.gpu_share}
        if settings.tensor_parallel > 1:  # inside a Ray placement group vLLM would take its Ray executor
            device |= {"tensor_parallel_size": settings.tensor_parallel, "distributed_executor_backend": "mp"}
    else:
        device = {
            "kv_cache_memory_bytes": int(settings.kv_cache_gib * GIB),
            # A prompt that is cut in two while its request has a seed kills the CPU engine of vLLM 0.32: it rewinds the
            # request's generator, which only CUDA's can ("CPU Generator does not use offset").
            "enable_chunked_prefill": False,
            # The least that CPU attention takes (default 128): short prompts share whole blocks in the prefix cache.
            "block_size": CPU_BLOCK_TOKENS,
            # With the worker in a process of its own the engine core spins on shared memory while it waits: a whole
            # core, which the learner wants. It also starts faster: 29 s against 42 s (SmolLM2-135M, 2 cores).
            "distributed_executor_backend": "uni",
            "max_num_batched_tokens": max(BATCHED_TOKENS, welcome.max_model_len),
        }
    return {
        "model": welcome.model,
        "load_format": "dummy",  # weights come over the wire
        "dtype": dtype,
        "max_model_len": welcome.max_model_len,
        "max_num_seqs": settings.max_running,
        "enforce_eager": settings.enforce_eager,
        "logprobs_mode": "processed_logprobs",  # after temperature
        "enable_prefix_caching": True,
        "seed": welcome.seed,
        "disable_log_stats": not welcome.engine_metrics_s,
        "enable_log_requests": False,
        **device,
    }


# --- what vLLM returns ----------------------------------------------------------------------------------------------


def to_generated(request_id: str, completion: Any) -> Generated:
    """Translate vLLM's `CompletionOutput`. Raises EngineFailed if a logprob or a version is missing or no number."""
    token_ids = list(completion.token_ids)
    positions: list[dict[int, Any]] = list(completion.logprobs or ())
    if len(positions) != len(token_ids):
        raise EngineFailed(f"request {request_id}: {len(token_ids)} tokens, but {len(positions)} logprobs")
    logprobs = [_logprob(position, token) for position, token in zip(positions, token_ids, strict=True)]
    if not all(map(math.isfinite, logprobs)):
        raise EngineFailed(f"request {request_id}: logprobs of the sampled tokens are {logprobs}")
    return Generated(
        token_ids=token_ids,
        logprobs=logprobs,
        spans=to_spans(request_id, completion.weight_versions or (), len(token_ids)),
        finish_reason=str(completion.finish_reason),
        text=completion.text,
    )


def _logprob(position: dict[int, Any], token: int) -> float:
    entry = position.get(token)
    return math.nan if entry is None else float(entry.logprob)


def to_spans(request_id: str, versions: Any, num_tokens: int) -> tuple[tuple[int, int], ...]:
    """((version, first token index), ...) from vLLM's spans, which must cover all tokens without a gap."""
    ends = [0, *(span.end for span in versions)]
    starts = [*(span.start for span in versions), num_tokens]
    if starts != ends:
        raise EngineFailed(f"request {request_id}: version spans {list(versions)} do not cover {num_tokens} tokens")
    return tuple((int(span.version), span.start) for span in versions)


# --- processes ------------------------------------------------------------------------------------------------------


def engine_cores() -> set[int]:
    """Process ids of the engine cores that this process started and that live."""
    children = multiprocessing.active_children()
    return {child.pid for child in children if child.name.startswith("EngineCore") and child.pid is not None}


def end_processes(llm: Any, spared: set[int]) -> None:
    """Shut vLLM down and wait until its processes, and theirs, are gone; kill what is left at the deadline.

    `spared`: engine cores of somebody else.
    """
    import psutil

    family: list[psutil.Process] = []
    for pid in engine_cores() - spared:
        with contextlib.suppress(psutil.NoSuchProcess):  # it is dying already
            core = psutil.Process(pid)
            family += [core, *core.children(recursive=True)]
    if llm is not None:
        llm.shutdown(timeout=SHUTDOWN_GRACE_S)
        llm.shutdown = lambda: None  # its finalizer's second call fails loudly at the interpreter's end
    _, alive = psutil.wait_procs(family, timeout=STOP_TIMEOUT_S)
    for process in alive:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(alive, timeout=STOP_TIMEOUT_S)
