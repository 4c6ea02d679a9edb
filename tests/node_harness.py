"""Several "machines" on this one, for tests of clusters: namespaces of this kernel. Not a test itself.

A node is a network namespace with an address of its own, a process namespace (so that a node can be killed, and `ray
stop` ends only its own Ray) and its own /dev/shm and private directory. Needs root, iproute2, nftables and util-linux;
`missing()` says what is not there.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import psutil

NETWORK = "10.231.77"


def missing() -> str:
    """What this machine lacks for two nodes; "" for nothing."""
    if os.geteuid() != 0:
        return "needs root, to make namespaces"
    if lacking := [name for name in ("ip", "unshare", "nft") if shutil.which(name) is None]:
        return f"needs {', '.join(lacking)}"
    needed = "nft list ruleset && ip link add br0 type bridge && ip link add veth0 type veth peer name veth1"
    spaces = ["unshare", "--net", "--pid", "--fork", "--mount-proc"]
    tried = subprocess.run([*spaces, "sh", "-c", needed], capture_output=True, text=True, check=False)
    return tried.stderr.strip() if tried.returncode else ""


def _run(*command: str, stdin: str | None = None) -> None:
    subprocess.run(command, check=True, input=stdin, text=True, timeout=30)


def firewall(ports: str) -> str:
    """An nftables rule set that admits these TCP ports from NETWORK, and nothing else from anywhere but loopback."""
    return f"""table inet nothing_else {{
  chain input {{
    type filter hook input priority 0; policy drop;
    iif lo accept
    ct state established,related accept
    ip saddr {NETWORK}.0/24 tcp dport {{ {ports} }} accept
  }}
}}
"""


@contextlib.contextmanager
def networks(count: int, rules: str) -> Iterator[list[str]]:
    """Names of network namespaces that reach each other through a bridge at NETWORK.1, .2, …, each behind this
    nftables rule set."""
    bridge, *names = (f"tandem-{os.getpid()}-{number}" for number in range(count + 1))
    with contextlib.ExitStack() as stack:
        for name in (bridge, *names):
            _run("ip", "netns", "add", name)
            stack.callback(subprocess.run, ["ip", "netns", "del", name], check=False)
        _run("ip", "-n", bridge, "link", "add", "br0", "type", "bridge")
        _run("ip", "-n", bridge, "link", "set", "br0", "up")
        for number, name in enumerate(names, 1):
            port = f"port{number}"
            _run("ip", "link", "add", "eth0", "netns", name, "type", "veth", "peer", "name", port, "netns", bridge)
            _run("ip", "-n", bridge, "link", "set", port, "master", "br0", "up")
            _run("ip", "-n", name, "addr", "add", f"{NETWORK}.{number}/24", "dev", "eth0")
            for link in ("lo", "eth0"):
                _run("ip", "-n", name, "link", "set", link, "up")
            _run("ip", "netns", "exec", name, "nft", "-f", "-", stdin=rules)
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


def first_process(node: subprocess.Popen[str]) -> psutil.Process:
    """What was run on the node, the first process of its namespace, seen from outside."""
    (inner,) = psutil.Process(node.pid).children()
    return inner


def entering(node: subprocess.Popen[str], command: list[str]) -> list[str]:
    """A command line that runs a command inside a node, beside its first process."""
    return ["nsenter", "-t", str(first_process(node).pid), "--net", "--pid", "--mount", *command]


def files_of(node: subprocess.Popen[str], path: Path) -> Path:
    """A path as the node sees it, from outside."""
    return Path(f"/proc/{first_process(node).pid}/root") / path.relative_to("/")
