"""deploy/slurm/train.sbatch on two nodes (namespaces of this machine) with a real Ray and a small stand-in for tandem.

Both nodes sit behind a firewall that admits what deploy/ports.py says and nothing else.
"""

from __future__ import annotations

import ipaddress
import json
import os
import signal
import stat
import sys
from pathlib import Path

import psutil
import pytest

from deploy.ports import PORTS, TANDEM_PORT, in_cluster
from tests.node_harness import NETWORK, firewall, listening, missing, networks, on_node
from tests.slurm_harness import ROOT, SCRIPT, slurm_environment, wait_for, write_program

pytestmark = [pytest.mark.skipif(bool(missing()), reason=missing()), pytest.mark.timeout(280)]

TANDEM = f"""#!{sys.executable}
import json, os, signal, socket, sys
import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
stopped = []
options = dict(zip(sys.argv, sys.argv[1:]))
ray.init(address=options["--ray-address"], log_to_driver=False)
signal.signal(signal.SIGTERM, lambda *_: stopped.append(True))  # Ray puts a handler of its own there
wires = [socket.create_server(("0.0.0.0", {TANDEM_PORT} + number)) for number in range(3)]

@ray.remote(num_cpus=0)
class Actor:
    def reach(self, host):
        return [socket.create_connection((host, {TANDEM_PORT} + number), 10).getpeername()[1] for number in range(3)]

nodes = {{node["NodeManagerAddress"]: node["NodeID"] for node in ray.nodes()}}
here = ray.util.get_node_ip_address()
actors = {{
    address: Actor.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False)).remote()
    for address, node in nodes.items()
}}
reached = {{address: ray.get(actor.reach.remote(here), timeout=60) for address, actor in actors.items()}}
token = os.environ["RAY_AUTH_TOKEN_PATH"]
report = {{"argv": sys.argv[1:], "reached": reached, "mode": os.stat(token).st_mode, "token": token,
          "auth": os.environ["RAY_AUTH_MODE"]}}
with open(os.environ["SHIM"] + "/report.part", "w") as file:
    json.dump(report, file)
os.rename(os.environ["SHIM"] + "/report.part", os.environ["SHIM"] + "/report.json")
while not stopped:
    signal.sigtimedwait([], 0.1)
sys.exit(3)
"""


def is_loopback(address: str) -> bool:
    return address != "*" and ipaddress.ip_address(address.partition("%")[0]).is_loopback


def test_batch_script_runs_on_two_nodes_through_the_table_of_ports(tmp_path: Path) -> None:
    job = os.getpid()
    private = Path(f"/tmp/td-{job}")  # the script's own choice
    env = slurm_environment(tmp_path, job, nodes=2)
    # How long the second node waits for a head that has ended, and either for its own Ray to start on a busy machine.
    env |= {"RAY_gcs_rpc_server_reconnect_timeout_s": "20", "RAY_raylet_start_wait_time_s": "120"}
    shims = Path(env["SHIM"])
    write_program(tmp_path / "env" / "bin" / "tandem", TANDEM)
    logs = [tmp_path / "first.log", tmp_path / "second.log"]
    with networks(2, firewall(", ".join(port.numbers for port in in_cluster()))) as names:
        command = ["bash", str(SCRIPT), str(ROOT / "recipes" / "demo.toml"), "a-run", "--set", "steps=2"]
        with on_node(names[0], private, command, env, logs[0]) as first:
            wait_for((shims / "srun.argv").exists, "srun's command", 30, first)
            argv = (shims / "srun.argv").read_text().split("\0")[:-1]
            handed = dict(entry.split("=", 1) for entry in (shims / "srun.env").read_text().split("\0")[:-1])
            with on_node(names[1], private, argv, handed, logs[1]) as second:
                try:
                    wait_for((shims / "report.json").exists, "the run to use both nodes", 150, first)
                    report = json.loads((shims / "report.json").read_text())
                    sockets = [listening(network) for network in names]
                    psutil.Process(first.pid).children()[0].send_signal(
                        signal.SIGUSR1
                    )  # the batch shell, before the limit
                    code = first.wait(60)
                    second.wait(110)
                finally:
                    print(*(log.read_text()[:6000] for log in logs), sep="\n--- second node\n")
    private.rmdir()

    assert code == 3
    assert (shims / "scontrol.calls").read_text() == f"requeue {job}\n"
    address = f"{NETWORK}.1:6379"
    assert report["argv"] == ["train", str(ROOT / "recipes" / "demo.toml"), "--name", "a-run", "--runs",
                              str(tmp_path / "runs"), "--ray-address", address, "--set", f"wire.port={TANDEM_PORT}",
                              "--set", "steps=2"]  # fmt: skip
    wires = [TANDEM_PORT, TANDEM_PORT + 1, TANDEM_PORT + 2]
    assert report["reached"] == {f"{NETWORK}.1": wires, f"{NETWORK}.2": wires}
    assert (report["auth"], stat.S_IMODE(report["mode"])) == ("token", 0o600)
    assert not Path(report["token"]).parent.exists(), "the token goes with the job"

    here = {number for sock in sockets[0] if not is_loopback(sock[0]) for number in sock[1:]}
    there = {number for sock in sockets[1] if not is_loopback(sock[0]) for number in sock[1:]}
    unknown = [number for number in here | there if not any(number in port for port in PORTS)]
    assert not unknown, "sockets that Ray opens and the table does not know"
    for port in PORTS:
        if port.name not in ("dashboard", "tandem-metrics"):  # those are on loopback
            assert any(number in port for number in here), f"nobody listens on {port.name}: {sorted(here)}"
        if port.node == "every":
            assert any(number in port for number in there), f"nobody listens on {port.name}: {sorted(there)}"
        else:
            assert not any(number in port for number in there), f"{port.name} is not of the head alone"
