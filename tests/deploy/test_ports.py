"""The table of ports: what it may contain, the flags and firewall rules made from it, its place in the documents."""

from __future__ import annotations

import json
import re
import subprocess
from itertools import pairwise
from pathlib import Path

import pytest

from deploy.ports import PORTS, TANDEM_PORT, aws_permissions, in_cluster, main, markdown, nft_rules, ray_start_flags
from tests.node_harness import missing

ROOT = Path(__file__).resolve().parents[2]


def flag_values(flags: list[str]) -> dict[str, int]:
    return {flag.partition("=")[0]: int(flag.partition("=")[2]) for flag in flags}


def test_table_has_names_that_kubernetes_takes_and_no_number_twice() -> None:
    assert len({port.name for port in PORTS}) == len(PORTS)
    assert all(re.fullmatch(r"(?=.*[a-z])[a-z0-9]([a-z0-9-]{0,13}[a-z0-9])?", port.name) for port in PORTS)
    for lower, higher in pairwise(sorted(PORTS, key=lambda port: port.first)):
        assert lower.first <= lower.last < higher.first, (lower.name, higher.name)
    assert [port.numbers for port in PORTS[:4]] == [str(TANDEM_PORT + index) for index in range(4)]


def test_ray_takes_the_flags_and_every_port_that_it_draws_is_fixed() -> None:
    from ray.scripts.scripts import start as ray_start

    head, worker = ray_start_flags("head"), ray_start_flags("worker")
    for flags, side in ((head, ["--head"]), (worker, ["--address", "10.0.0.1:6379"])):
        ray_start.make_context("start", [*side, *flags])
    offered = {option for parameter in ray_start.params for option in parameter.opts if option.endswith("-port")}
    assert offered == set(flag_values(head)), "ports that `ray start` can fix, and those that the table does"
    # Ray 2.60 refuses a worker with --port, and has no use for the flags of what runs on the head alone.
    assert set(flag_values(head)) - set(flag_values(worker)) == {
        "--port", "--dashboard-port", "--ray-client-server-port"
    }  # fmt: skip
    assert flag_values(worker).items() <= flag_values(head).items()


def test_numbers_without_a_flag_are_rays_own() -> None:
    from ray.autoscaler._private import constants
    from ray.dashboard import consts

    fixed = {port.name: port.first for port in PORTS if port.node == "head" and port.name.endswith("-metrics")}
    assert fixed == {"monitor-metrics": constants.AUTOSCALER_METRIC_PORT, "board-metrics": consts.DASHBOARD_METRIC_PORT}


def test_firewalls_admit_the_cluster_to_its_ports_and_to_nothing_else() -> None:
    rules = aws_permissions("sg-1")
    admitted = {number for rule in rules for number in range(rule["FromPort"], rule["ToPort"] + 1)}  # type: ignore[call-overload]
    assert admitted == {number for port in in_cluster() for number in range(port.first, port.last + 1)}
    assert all([pair["GroupId"] for pair in rule["UserIdGroupPairs"]] == ["sg-1"] for rule in rules)  # type: ignore[attr-defined]
    closed = [port for port in PORTS if port.reach != "cluster"]
    assert {port.name for port in closed} >= {"dashboard", "client"}
    assert not any(port.first in admitted for port in closed)


def test_nft_rules_admit_one_network_and_drop_the_rest() -> None:
    text = nft_rules("10.1.0.0/16")
    accepted = re.search(r"ip saddr 10\.1\.0\.0/16 tcp dport \{ (.*) \} accept", text)
    dropped = re.search(r"^    tcp dport \{ (.*) \} drop", text, re.MULTILINE)
    assert accepted and dropped
    assert accepted[1].split(", ") == [port.numbers for port in in_cluster()]
    assert dropped[1].split(", ") == [port.numbers for port in PORTS]
    assert "ip6 saddr fd00::/8 tcp" in nft_rules("fd00::/8")


def test_nft_takes_the_rules() -> None:
    if lacking := missing():
        pytest.skip(lacking)
    done = subprocess.run(["unshare", "--net", "nft", "--check", "-f", "-"], input=nft_rules("10.1.0.0/16"), text=True,
                          capture_output=True, timeout=20, check=False)  # fmt: skip
    assert done.returncode == 0, done.stderr


def test_operations_page_has_the_table() -> None:
    page = (ROOT / "docs" / "operations.md").read_text("utf-8")
    shown = page.split("<!-- ports:begin -->")[1].split("<!-- ports:end -->")[0].strip()
    assert shown == markdown(), "make it anew with `python -m deploy.ports`"


def test_command_prints_what_the_files_are_made_from(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["flags", "worker"]) == 0
    assert capsys.readouterr().out.split() == ray_start_flags("worker")
    assert main(["aws", "sg-2"]) == 0
    assert json.loads(capsys.readouterr().out) == aws_permissions("sg-2")
    assert main(["flags", "nobody"]) == 2
    assert "python -m deploy.ports" in capsys.readouterr().err
