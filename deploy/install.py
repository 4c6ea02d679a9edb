"""Makes the repository's virtual environment `.venv`: `make setup`, and every other make target before its own work.

Run by the system's python3 before anything is installed, so it uses the standard library alone, imports nothing of
Tandem and stays readable for a Python too old to go on with (it says so). Knows pip, the lists in
`deploy/requirements/` and PyTorch's two builds; knows nothing of what the packages do.

    python3 deploy/install.py [--variant cpu|gpu] [--force]

TANDEM_TORCH_INDEX   index to take torch (and only torch) from, such as PyTorch's own index of CPU builds
TANDEM_EXTRA         cpu (default) or gpu, as --variant
pip's own configuration and environment (PIP_INDEX_URL, proxies, certificates) apply as usual.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    Say = Callable[[str], None]
    Pip = Callable[["Paths", str, Sequence[str], Mapping[str, str], Say], None]

ROOT = Path(__file__).resolve().parent.parent
MIN_PYTHON = (3, 11)
TORCH = "torch==2.13.0"
VARIANTS = ("cpu", "gpu")
STAMP = "tandem-setup.json"
INSTALLING = "tandem-setup.unfinished"
LOG = "tandem-setup.log"
STATUS_EVERY_S = 10.0
IMPORTS = ("torch", "transformers", "vllm", "ray", "zmq", "protocol.messages")


class SetupError(Exception):
    """The environment could not be made; the message says why and what to do."""


@dataclass(frozen=True)
class TorchBuild:
    """What `torch/version.py` says, read without importing torch."""

    version: str
    cuda: str | None

    @property
    def is_cpu(self) -> bool:
        return self.cuda is None or self.version.endswith("+cpu")


@dataclass(frozen=True)
class Paths:
    root: Path
    venv: Path

    @property
    def python(self) -> Path:
        return self.venv / "bin" / "python"

    @property
    def stamp(self) -> Path:
        return self.venv / STAMP

    def list(self, name: str) -> Path:
        return self.root / "deploy" / "requirements" / f"{name}.txt"


def check_python(version: tuple[int, ...]) -> None:
    """Raise SetupError when this interpreter is too old to make the environment with."""
    if version[:2] < MIN_PYTHON:
        found, needed = ".".join(map(str, version[:2])), ".".join(map(str, MIN_PYTHON))
        raise SetupError(
            f"Python {needed} or newer is needed, {sys.executable} is {found}."
            f" Name another one: make setup PYTHON=python{needed}"
        )


def fingerprint(paths: Paths, variant: str) -> str:
    """Digest of everything that the environment is made from: when it is unchanged there is nothing to do."""
    parts = [str(paths.root), variant, TORCH]
    files = [paths.list(name) for name in (variant, "dev", "model")] + [paths.root / "pyproject.toml"]
    digest = hashlib.sha256("\0".join(parts).encode())
    for file in files:
        digest.update(file.read_bytes())
    return digest.hexdigest()


def read_stamp(paths: Paths) -> dict[str, str]:
    """What the last complete set-up wrote; empty when there was none."""
    try:
        stamp = json.loads(paths.stamp.read_text())
    except (OSError, ValueError):
        return {}
    return stamp if isinstance(stamp, dict) else {}


def is_current(paths: Paths, variant: str, torch_index: str) -> bool:
    """True when a complete set-up was made from the same lists, and from `torch_index` if one is named."""
    stamp = read_stamp(paths)
    same_index = not torch_index or stamp.get("torch_index") == torch_index
    return paths.python.exists() and same_index and stamp.get("fingerprint") == fingerprint(paths, variant)


def choose_variant(asked: str, paths: Paths) -> str:
    """The variant asked for, else the one installed here, else cpu. Raises SetupError for an unknown one."""
    variant = asked or read_stamp(paths).get("variant", "cpu")
    if variant not in VARIANTS:
        raise SetupError(f"variant (TANDEM_EXTRA, --variant): found {variant!r}, allowed: {', '.join(VARIANTS)}")
    return variant


def torch_build(paths: Paths) -> TorchBuild | None:
    """The build of torch that is installed, read from its version file; None when there is none."""
    for file in sorted(paths.venv.glob("lib/python*/site-packages/torch/version.py")):
        text = file.read_text()
        version = re.search(r"^__version__\s*=\s*['\"]([^'\"]+)", text, re.MULTILINE)
        cuda = re.search(r"^cuda\b[^=\n]*=\s*['\"]([^'\"]+)", text, re.MULTILINE)
        if version:
            return TorchBuild(version[1], cuda[1] if cuda else None)
    return None


def usable_venv(paths: Paths) -> bool:
    """False when there is no environment, its Python does not run, or an installation in it was cut off."""
    if (paths.venv / INSTALLING).exists() or not paths.python.exists():
        return False
    if read_stamp(paths).get("root", str(paths.root)) != str(paths.root):
        return False  # copied from elsewhere: its scripts name the other place
    code = f"import sys, pip; sys.exit(sys.version_info < {MIN_PYTHON})"
    return subprocess.run([str(paths.python), "-c", code], capture_output=True, check=False).returncode == 0


def make_venv(paths: Paths) -> None:
    """Make an empty environment, in place of whatever is there."""
    if paths.venv.is_symlink() or paths.venv.is_file():
        paths.venv.unlink()
    shutil.rmtree(paths.venv, ignore_errors=True)
    done = subprocess.run([sys.executable, "-m", "venv", str(paths.venv)], capture_output=True, text=True, check=False)
    if done.returncode:
        shutil.rmtree(paths.venv, ignore_errors=True)
        raise SetupError(
            f"{sys.executable} -m venv failed: {(done.stdout + done.stderr).strip()}\n"
            "(Debian and Ubuntu have this module in the package python3-venv.)"
        )


def run_pip(paths: Paths, what: str, args: Sequence[str], env: Mapping[str, str], say: Say) -> None:
    """Run `pip install`, with a line of progress now and then. Raises SetupError with pip's last words.

    A marker file stands while pip works: an environment in which pip was killed is made anew.
    """
    marker, log = paths.venv / INSTALLING, paths.venv / LOG
    quiet = {"PIP_DISABLE_PIP_VERSION_CHECK": "1", "PIP_PROGRESS_BAR": "off", "PIP_NO_INPUT": "1"}
    command = [str(paths.python), "-m", "pip", "install", *args]
    marker.touch()
    before = count_installed(paths)
    lines: list[str] = []
    with subprocess.Popen(
        command,
        env={**env, **quiet},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as process:
        assert process.stdout is not None
        reader = threading.Thread(target=lines.extend, args=(process.stdout,), daemon=True)
        reader.start()
        while process.poll() is None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(STATUS_EVERY_S)
            if process.poll() is None:
                say(f"  {what}: {describe_progress(lines, count_installed(paths) - before)}")
        reader.join()
    with log.open("a") as file:
        file.write(f"$ {' '.join(command)}\n{''.join(lines)}\n")
    if process.returncode >= 0:
        marker.unlink()  # pip ended by itself: it installs nothing before it has everything
    if process.returncode:
        told = [line.rstrip() for line in lines if not line.startswith("WARNING")]
        tail = "\n".join(told[-12:])
        raise SetupError(f"pip could not install {what} (whole output: {log}):\n{tail}")


def count_installed(paths: Paths) -> int:
    """Packages in the environment, by the directories that pip writes at the end of each."""
    return sum(1 for _ in paths.venv.glob("lib/python*/site-packages/*.dist-info"))


def describe_progress(lines: Sequence[str], num_new: int) -> str:
    """One phrase on what pip is doing, from its output so far and the number of packages that came in since."""
    seen = [line.split()[1] for line in lines if line.startswith("Collecting ")]
    for line in lines:
        if line.startswith("Installing collected packages: "):
            return f"unpacked {num_new} of {line.count(',') + 1}"
    if seen:
        return f"fetching package {len(seen)}, {re.split('[=<>!~;]', seen[-1])[0]}"
    return "asking the index"


def install_torch(paths: Paths, variant: str, env: Mapping[str, str], pip: Pip, say: Say) -> None:
    """Install torch alone: the index decides whether that is the CPU or the CUDA build."""
    index, found = env.get("TANDEM_TORCH_INDEX", ""), torch_build(paths)
    args = ["--no-deps", TORCH]
    if index:
        args += ["--index-url", index]
        if variant == "cpu" and found and not found.is_cpu:
            args += ["--force-reinstall"]  # the same version number as the build that is to go
    pip(paths, "torch", args, env, say)


def install_cuda_libraries(paths: Paths, env: Mapping[str, str], pip: Pip, say: Say) -> None:
    """Where torch is a CUDA build, install the libraries that it loads on import, GPU or not.

    After the pinned list, so that nothing but what is missing (nvidia-*, triton) comes in. By torch's plain number: its
    version file may say 2.13.0+cu130 where the package is called 2.13.0.
    """
    build = torch_build(paths)
    if build is None or build.is_cpu:
        return
    say(
        f"torch {build.version} of this index is a CUDA {build.cuda} build: its libraries are needed, too, about"
        " 2 GB to download and 3 GB on disk."
    )
    if not env.get("TANDEM_TORCH_INDEX"):
        say("TANDEM_TORCH_INDEX=<address of PyTorch's index of CPU builds> make setup gets the small build instead.")
    pip(paths, "torch's CUDA libraries", [TORCH], env, say)


def install_packages(paths: Paths, variant: str, env: Mapping[str, str], pip: Pip, say: Say) -> None:
    """Install all of the variant: torch, the lists, CUDA libraries where torch needs them, Tandem itself."""
    lists = {name: ["-r", str(paths.list(name))] for name in (variant, "dev", "model")}
    install_torch(paths, variant, env, pip, say)
    if variant == "cpu":
        pip(paths, "packages", ["--no-deps", *lists["cpu"], *lists["dev"], *lists["model"]], env, say)
        install_cuda_libraries(paths, env, pip, say)
    else:
        pip(paths, "packages", lists["gpu"], env, say)
        pip(paths, "tools and model", ["--no-deps", *lists["dev"], *lists["model"]], env, say)
    # Without build isolation: setuptools is among the pins, and the build asks the index for nothing.
    project = ["--no-deps", "--no-build-isolation", "-e", str(paths.root)]
    pip(paths, "Tandem", project, env, say)


def verify_imports(paths: Paths, env: Mapping[str, str]) -> None:
    """Import what matters in a fresh process. Raises SetupError with the import's own error."""
    code = f"import importlib\nfor name in {IMPORTS!r}: importlib.import_module(name)"
    quiet = {"VLLM_LOGGING_LEVEL": "ERROR", "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run(
        [str(paths.python), "-c", code],
        env={**env, **quiet},
        cwd=paths.root,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        last = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        build = torch_build(paths)
        raise SetupError(
            f"the packages are installed, but they do not import: {last}\n"
            f"torch found: {build.version if build else 'none'}. A damaged environment is made anew by"
            " `make clean setup`; if that does not help, report this with the versions of `pip list`."
        )


def set_up(
    paths: Paths,
    variant: str,
    env: Mapping[str, str],
    say: Say,
    force: bool = False,
    pip: Pip = run_pip,
    verify: Callable[[Paths, Mapping[str, str]], None] = verify_imports,
) -> bool:
    """Bring the environment up to date; True if something was done. Raises SetupError.

    The stamp is taken away first and written last: an environment with a stamp is complete.
    """
    torch_index = env.get("TANDEM_TORCH_INDEX", "")
    variant = choose_variant(variant, paths)
    if not force and is_current(paths, variant, torch_index):
        return False
    check_python(sys.version_info[:3])
    usable = usable_venv(paths) and not force
    changed = read_stamp(paths).get("variant", variant) != variant
    paths.stamp.unlink(missing_ok=True)
    if changed or not usable:  # the two variants bring the same module under two package names
        say(f"making {paths.venv} with Python {sys.version.split()[0]}")
        make_venv(paths)
    say(f"installing the {variant} set-up: torch, then the rest (about 3 minutes and 4 GB from a near index)")
    install_packages(paths, variant, env, pip, say)
    say("checking that it imports")
    verify(paths, env)
    stamp = {
        "fingerprint": fingerprint(paths, variant),
        "variant": variant,
        "torch_index": torch_index,
        "root": str(paths.root),
    }
    part = paths.stamp.with_suffix(".part")
    part.write_text(json.dumps(stamp, indent=1))
    part.replace(paths.stamp)
    return True


@contextlib.contextmanager
def only_one(root: Path, say: Say) -> Iterator[None]:
    """Hold a lock on the repository's directory, so that two set-ups do not write one environment."""
    handle = os.open(root, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say("waiting for another set-up of this directory to end")
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Make or update the repository's .venv.")
    parser.add_argument("--variant", default=os.environ.get("TANDEM_EXTRA", ""), help="cpu (default) or gpu")
    parser.add_argument("--force", action="store_true", help="make the environment anew")
    options = parser.parse_args(argv)
    start = time.monotonic()

    def say(line: str) -> None:
        print(f"setup [{time.monotonic() - start:4.0f} s] {line}", flush=True)

    # A virtual environment that happens to be active, or a PYTHONPATH, is not to leak into ours.
    env = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")}
    try:
        with only_one(ROOT, say):
            if set_up(Paths(ROOT, ROOT / ".venv"), options.variant, env, say, options.force):
                say("done")
    except SetupError as error:
        print(f"setup failed: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("setup interrupted; run it again to go on", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
