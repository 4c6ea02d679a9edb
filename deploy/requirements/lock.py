"""Makes cpu.txt and dev.txt anew from pyproject.toml: `make lock`. Also says which direct pins gpu.txt should have.

Lets pip resolve for this interpreter and machine (nothing is installed), then leaves out torch, which is a step of its
own, and what breaks beside a CPU build of it. Run it, read the difference, run all tests, commit. Takes minutes.

    python deploy/requirements/lock.py [--out DIRECTORY]
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
LEFT_OUT = re.compile(r"torch|torchvision|torchaudio|torchcodec|nvidia-.*|cuda-.*")
X86_ONLY = {"intel-openmp", "intel-cmplr-lib-ur"}


def header(file: Path) -> str:
    """The comment lines at the top of a list, which stay as they are."""
    lines = file.read_text().splitlines(keepends=True)
    return "".join(line for line in lines if line.startswith("#"))


def resolve(requirements: Sequence[str], constraints: Mapping[str, str]) -> dict[str, str]:
    """Package -> version of everything that pip would install for `requirements`, at the versions in `constraints`."""
    index = os.environ.get("TANDEM_TORCH_INDEX")
    with tempfile.TemporaryDirectory() as folder:
        report, limits = Path(folder) / "report.json", Path(folder) / "constraints.txt"
        limits.write_text("".join(f"{name}=={version}\n" for name, version in constraints.items()))
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--dry-run", "--ignore-installed"]
        command += ["--report", str(report), "--constraint", str(limits)]
        command += ["--extra-index-url", index] if index else []
        subprocess.run([*command, *requirements], check=True)
        found = json.loads(report.read_text())["install"]
    return {canonical(item["metadata"]["name"]): item["metadata"]["version"] for item in found}


def canonical(name: str) -> str:
    """The one spelling of a package's name (PEP 503)."""
    return re.sub(r"[-_.]+", "-", name).lower()


def format_pins(pins: Mapping[str, str]) -> str:
    """Lines of a list, in order of names, without what is left out."""
    kept = {name: version for name, version in sorted(pins.items()) if not LEFT_OUT.fullmatch(name)}
    marker = " ; platform_machine == 'x86_64'"
    return "".join(f"{name}=={version}{marker if name in X86_ONLY else ''}\n" for name, version in kept.items())


def main() -> None:
    parser = argparse.ArgumentParser(description="Resolve the pinned lists anew from pyproject.toml.")
    parser.add_argument("--out", type=Path, default=HERE, help="directory to write to (default: beside this script)")
    out: Path = parser.parse_args().out
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    print("resolving the CPU set-up")
    base = resolve([*project["dependencies"], *extras["cpu"]], {})
    print("resolving the tools")
    tools = resolve(extras["dev"], base)
    dev = {name: version for name, version in tools.items() if name not in base}
    for name, pins in (("cpu", base), ("dev", dev)):
        (out / f"{name}.txt").write_text(header(HERE / f"{name}.txt") + format_pins(pins))
        print(f"{out / name}.txt: {len(pins)} packages resolved")
    print("gpu.txt is edited by hand: keep its direct pins equal to those in cpu.txt")


if __name__ == "__main__":
    main()
