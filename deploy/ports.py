"""Every port that a deployment of Tandem opens, as one table: the files in `deploy/` and docs/operations.md follow it.

Ray draws several of its ports at random, which no firewall can be told of: here each has a number, and
`ray_start_flags` gives the flags that pin it. Tests compare the table with the files (`tests/deploy/`) and with the
sockets of a running Ray (`tests/real/test_slurm.py`). Knows no recipe and imports nothing but the standard library.

    python -m deploy.ports                     the table
    python -m deploy.ports flags head|worker   flags for `ray start`
    python -m deploy.ports aws GROUP           the inbound rules of a security group, as `aws ec2` reads them
    python -m deploy.ports nft NETWORK         an nftables rule set that admits the cluster's own network only
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

Node = Literal["every", "head", "learner"]
Reach = Literal["cluster", "head", "closed"]
Role = Literal["head", "worker"]


@dataclass(frozen=True)
class Port:
    """One TCP port, or a range of them, of a deployment."""

    name: str
    """A name as Kubernetes allows it for a port: at most 15 of a-z, 0-9 and "-"."""
    first: int
    last: int
    """The same as `first`, unless it is a range."""
    node: Node
    """Where somebody listens: on every node, on Ray's head, or where the learner runs."""
    listens: str
    connects: str
    reach: Reach
    """Who must get through a firewall: the cluster's nodes; nobody but the head itself; nobody at all."""
    change: str
    """What has another number used instead."""
    flags: tuple[str, ...] = ()
    """Flags of `ray start`: one for a port; for a range the flags of its first and its last."""
    head_only: bool = False
    """`ray start --address` refuses the flag, or has no use for it."""

    @property
    def numbers(self) -> str:
        return str(self.first) if self.first == self.last else f"{self.first}-{self.last}"

    def __contains__(self, number: int) -> bool:
        return self.first <= number <= self.last

    def start_flags(self) -> list[str]:
        return [f"{flag}={number}" for flag, number in zip(self.flags, (self.first, self.last), strict=False)]


def _ray(name: str, number: int, node: Node, listens: str, connects: str, reach: Reach, flag: str) -> Port:
    return Port(name, number, number, node, listens, connects, reach, f"`{flag}`", (flag,), node == "head")


TANDEM_PORT = 7700
"""`wire.port` of a deployment. The recipe's own default, 0, takes free ports, which no firewall can be told of."""

PORTS: tuple[Port, ...] = (
    Port("tandem-work", TANDEM_PORT, TANDEM_PORT, "learner", "the learner: tickets, groups, heartbeats",
         "actors", "cluster", "`wire.port`"),
    Port("tandem-bulk", TANDEM_PORT + 1, TANDEM_PORT + 1, "learner", "the learner: weights in chunks",
         "actors", "cluster", "`wire.port` + 1"),
    Port("tandem-news", TANDEM_PORT + 2, TANDEM_PORT + 2, "learner", "the learner: new versions, small deltas",
         "actors", "cluster", "`wire.port` + 2"),
    Port("tandem-metrics", TANDEM_PORT + 3, TANDEM_PORT + 3, "learner",
         "the learner: figures for Prometheus, without a password; on loopback unless `metrics.host` says otherwise",
         "a Prometheus, if there is one", "cluster", "`metrics.port`"),
    _ray("gcs-server", 6379, "head", "Ray's GCS", "every node, `tandem --ray-address`", "cluster", "--port"),
    _ray("object-manager", 8076, "every", "Ray's object store", "every node", "cluster", "--object-manager-port"),
    _ray("node-manager", 8077, "every", "Ray's raylet", "every node", "cluster", "--node-manager-port"),
    _ray("runtime-env", 8078, "every", "Ray's runtime environment agent", "the node's own raylet", "cluster",
         "--runtime-env-agent-port"),
    _ray("agent-grpc", 8079, "every", "Ray's dashboard agent", "the head", "cluster", "--dashboard-agent-grpc-port"),
    _ray("metrics", 8080, "every", "Ray's own metrics", "a Prometheus, if there is one", "cluster",
         "--metrics-export-port"),
    _ray("agent-http", 52365, "every", "Ray's dashboard agent: jobs, health", "the head, KubeRay's probes", "cluster",
         "--dashboard-agent-listen-port"),
    Port("workers", 10002, 10999, "every", "Ray's worker processes, the launcher's and the actors' among them",
         "every node", "cluster", "`--min-worker-port`, `--max-worker-port`",
         ("--min-worker-port", "--max-worker-port")),
    _ray("dashboard", 8265, "head", "Ray's dashboard and job server, on loopback (in Kubernetes on the pod's address)",
         "people through a tunnel; KubeRay's operator and its submitter", "head", "--dashboard-port"),
    _ray("client", 10001, "head", "the Ray client server, which Ray always starts", "nobody", "closed",
         "--ray-client-server-port"),
    Port("monitor-metrics", 44217, 44217, "head", "metrics of Ray's autoscaler", "a Prometheus, if there is one",
         "closed", "`AUTOSCALER_METRIC_PORT` in the environment", head_only=True),
    Port("board-metrics", 44227, 44227, "head", "metrics of Ray's dashboard", "a Prometheus, if there is one",
         "closed", "`DASHBOARD_METRIC_PORT` in the environment", head_only=True),
)  # fmt: skip


def in_cluster() -> Iterator[Port]:
    """The ports that nodes of a cluster open to each other; firewalls admit these, from the cluster alone."""
    return (port for port in PORTS if port.reach == "cluster")


def ray_start_flags(role: Role) -> list[str]:
    """Flags of `ray start` that give every port of that node its number.

    The worker's are also the ones that `ray symmetric-run` can pass on, since it hands both sides the same.
    """
    chosen = [port for port in PORTS if role == "head" or not port.head_only]
    return [flag for port in chosen for flag in port.start_flags()]


def markdown() -> str:
    """The table as docs/operations.md shows it."""
    where = {"every": "every node", "head": "Ray's head", "learner": "the learner's node"}
    firewall = {"cluster": "the cluster's nodes", "head": "nobody", "closed": "nobody"}
    lines = [
        "| Port (TCP) | Name | Listens | On | Connects | Firewall admits | Changed by |",
        "|---|---|---|---|---|---|---|",
    ]
    for port in PORTS:
        cells = (port.numbers, f"`{port.name}`", port.listens, where[port.node], port.connects, firewall[port.reach])
        lines.append(f"| {' | '.join(cells)} | {port.change} |")
    return "\n".join(lines)


def aws_permissions(group: str) -> list[dict[str, object]]:
    """Inbound rules of the security group `group`, for its own members; SSH is not among them."""
    return [
        {
            "IpProtocol": "tcp",
            "FromPort": port.first,
            "ToPort": port.last,
            "UserIdGroupPairs": [{"GroupId": group, "Description": f"Tandem {port.name}"}],
        }
        for port in in_cluster()
    ]


def nft_rules(network: str) -> str:
    """An nftables table that closes every port of the table but to `network` (an address or prefix) and loopback."""
    family = "ip6" if ":" in network else "ip"
    admitted = ", ".join(port.numbers for port in in_cluster())
    every = ", ".join(port.numbers for port in PORTS)
    return (
        "table inet tandem {\n  chain input {\n    type filter hook input priority 0; policy accept;\n"
        "    iif lo accept\n"
        f"    {family} saddr {network} tcp dport {{ {admitted} }} accept\n"
        f"    tcp dport {{ {every} }} drop\n"
        "  }\n}\n"
    )


def main(argv: Sequence[str]) -> int:
    match argv:
        case []:
            print(markdown())
        case ["flags", "head"]:
            print(" ".join(ray_start_flags("head")))
        case ["flags", "worker"]:
            print(" ".join(ray_start_flags("worker")))
        case ["aws", group]:
            print(json.dumps(aws_permissions(group)))
        case ["nft", network]:
            print(nft_rules(network), end="")
        case _:
            print(__doc__, file=sys.stderr)
            return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
