"""Stand-ins for Slurm's commands, and two "machines" for `deploy/slurm/train.sbatch`: namespaces of this kernel.

A node is a network namespace with an address of its own, a process namespace (`ray stop` ends every Ray that it sees)
and its own /dev/shm and Ray directory. Needs root, iproute2 and util-linux; `missing()` says what is not there.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT / "deploy" / "slurm" / "train.sbatch"
NETWORK = "10.231.77"

SRUN = """#!/bin/bash
# Task 0 runs here; a harness that has a second node takes the command and the environment from these files.
while [[ $1 == --* ]]; do echo "$1" >>"$SHIM/srun.options"; shift; done
env -0 >"$SHIM/srun.env"
printf '%s\\0' "$@" >"$SHIM/argv.part" && mv "$SHIM/argv.part" "$SHIM/srun.argv"
"$@"
"""
SCONTROL = '#!/bin/bash\necho "$@" >>"$SHIM/scontrol.calls"\n'


def write_program(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)
    return path


def slurm_environment(directory: Path, job: int, nodes: int) -> dict[str, str]:
    """Environment of a batch script: Slurm's variables, its commands as stand-ins, a home of its own."""
    shims = directory / "shims"
    write_program(shims / "srun", SRUN)
    write_program(shims / "scontrol", SCONTROL)
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("RAY_", "SLURM_", "TANDEM_"))}
    return {
        **kept,
        "PATH": f"{shims}:{Path(sys.executable).parent}:{os.environ['PATH']}",
        "SHIM": str(shims),
        "HOME": str(directory),
        "TANDEM_ENV": str(directory / "env"),
        "TANDEM_RUNS": str(directory / "runs"),
        "SLURM_JOB_ID": str(job),
        "SLURM_JOB_NUM_NODES": str(nodes),
    }


def wait_for(condition: Callable[[], object], what: str, timeout_s: float, alive: subprocess.Popen[str]) -> None:
    """Poll until the condition holds; AssertionError, naming it, after the deadline or when the process has ended."""
    end = time.monotonic() + timeout_s
    while not condition():
        assert alive.poll() is None, f"the batch script ended with {alive.returncode} before {what}"
        assert time.monotonic() < end, f"waited {timeout_s:g} s for {what}"
        time.sleep(0.05)


# --- two nodes ------------------------------------------------------------------------------------------------------


def missing() -> str:
    """What this machine lacks for two nodes; "" for nothing."""
    if os.geteuid() != 0:
        return "needs root, to make namespaces"
    if lacking := [name for name in ("ip", "unshare", "nft") if shutil.which(name) is None]:
        return f"needs {', '.join(lacking)}"
    tried = subprocess.run(["unshare", "--net", "--pid", "--fork", "--mount-proc", "nft", "list", "ruleset"],
                           capture_output=True, text=True, check=False)  # fmt: skip
    return tried.stderr.strip()


def _run(*command: str, stdin: str | None = None) -> None:
    subprocess.run(command, check=True, input=stdin, text=True, timeout=30)


@contextlib.contextmanager
def two_networks(firewall: str) -> Iterator[list[str]]:
    """Names of two network namespaces that reach each other at NETWORK.1 and .2, each behind this nftables rule set."""
    names = [f"tandem-{os.getpid()}-{number}" for number in (1, 2)]
    with contextlib.ExitStack() as stack:
        for name in names:
            _run("ip", "netns", "add", name)
            stack.callback(subprocess.run, ["ip", "netns", "del", name], check=False)
        _run("ip", "link", "add", "eth0", "netns", names[0], "type", "veth", "peer", "name", "eth0", "netns", names[1])
        for number, name in enumerate(names, 1):
            _run("ip", "-n", name, "addr", "add", f"{NETWORK}.{number}/24", "dev", "eth0")
            for link in ("lo", "eth0"):
                _run("ip", "-n", name, "link", "set", link, "up")
            _run("ip", "netns", "exec", name, "nft", "-f", "-", stdin=firewall)
        yield names


@contextlib.contextmanager
def on_node(
    network: str, private: Path, command: list[str], env: dict[str, str], log: Path
) -> Iterator[subprocess.Popen[str]]:
    """Run a command as the first process of a node; its whole process namespace ends with this context.

    `private`: a directory of which the node has its own, as each machine has its /tmp.
    """
    private.mkdir(parents=True, exist_ok=True)
    mounts = f"mount -t tmpfs -o size=1g tmpfs /dev/shm && mount -t tmpfs -o mode=700 tmpfs {private}"
    inner = ["bash", "-c", f'{mounts} && exec "$@"', "node", *command]
    spaces = ["unshare", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc"]
    with log.open("w") as output:
        process = subprocess.Popen(["ip", "netns", "exec", network, *spaces, *inner], env=env, stdin=subprocess.DEVNULL,
                                   stdout=output, stderr=subprocess.STDOUT, text=True)  # fmt: skip
        try:
            yield process
        finally:
            process.kill()
            process.wait(30)


def listening(network: str) -> set[tuple[str, int]]:
    """(address, port) of every TCP socket that listens in the namespace."""
    done = subprocess.run(["ip", "netns", "exec", network, "ss", "-Hltn"], capture_output=True, text=True, check=True)
    found = (line.split()[3].rpartition(":") for line in done.stdout.splitlines())
    return {(address.strip("[]"), int(port)) for address, _, port in found}
