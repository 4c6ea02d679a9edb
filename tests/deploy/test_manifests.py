"""The files of deploy/ray, deploy/kuberay and deploy/docker: by Ray's own code, and against the table of ports.

Nothing is started and nothing is fetched. What cannot be checked offline (KubeRay's operator, image builds)
docs/operations.md names.
"""

from __future__ import annotations

import copy
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from deploy.ports import PORTS, in_cluster, ray_start_flags

ROOT = Path(__file__).resolve().parents[2]
RAY_FILES = ("local", "aws")
NUMBERS = {port.name: port for port in PORTS}


def load(path: str) -> list[Any]:
    return list(yaml.safe_load_all((ROOT / "deploy" / path).read_text("utf-8")))


# --- ray up ---------------------------------------------------------------------------------------------------------


def prepared(config: dict[str, Any]) -> dict[str, Any]:
    """The configuration as `ray up` completes and checks it. Raises what Ray raises."""
    from ray.autoscaler._private.util import prepare_config, validate_config

    config = prepare_config(copy.deepcopy(config))
    validate_config(config)
    return config


def ray_start(config: dict[str, Any], side: str) -> dict[str, Any]:
    """Parameters of the last `ray start` of that side, parsed by Ray's own command."""
    from ray.scripts.scripts import start

    words = shlex.split(config[f"{side}_start_ray_commands"][-1])
    return dict(start.make_context("start", words[words.index("start") + 1 :]).params)


def check_ray_config(config: dict[str, Any]) -> None:
    """AssertionError unless ports, token and object store are as deployments of Tandem need them."""
    config = prepared(config)
    for side in ("head", "worker"):
        command = config[f"{side}_start_ray_commands"][-1]
        ports = [word for word in shlex.split(command) if re.match(r"--[a-z-]+-port=|--port=", word)]
        assert sorted(ports) == sorted(ray_start_flags("head" if side == "head" else "worker")), side
        assert command.startswith("source ~/tandem/environment;"), "the token's environment"
        assert ray_start(config, side)["object_store_memory"] == 1 << 30
    assert ray_start(config, "head")["dashboard_host"] == "127.0.0.1"
    assert "--address=$RAY_HEAD_IP:6379" in shlex.split(config["worker_start_ray_commands"][-1])
    environment = next(command for command in config["setup_commands"] if command.endswith("~/tandem/environment"))
    assert "RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH=~/.ray/auth_token" in environment
    assert config["file_mounts"]["~/.ray/auth_token"] == "~/.ray/auth_token"
    assert "chmod 600 ~/.ray/auth_token" in config["setup_commands"]


@pytest.mark.parametrize("name", RAY_FILES)
def test_ray_takes_the_cluster_file(name: str) -> None:
    (config,) = load(f"ray/{name}.yaml")
    check_ray_config(config)


def mutated(name: str, change: str) -> dict[str, Any]:
    (config,) = load(f"ray/{name}.yaml")
    start = config["head_start_ray_commands"]
    match change:
        case "misspelt key":
            config["file_mount"] = config.pop("file_mounts")
        case "text for a number":
            config["upscaling_speed"] = "fast"
        case "random port":
            start[-1] = start[-1].replace(" --node-manager-port=8077", "")
        case "other port":
            start[-1] = start[-1].replace("--min-worker-port=10002", "--min-worker-port=20002")
        case "open dashboard":
            start[-1] = start[-1].replace("--dashboard-host=127.0.0.1", "--dashboard-host=0.0.0.0")
        case "head's flag on a worker":
            config["worker_start_ray_commands"][-1] += " --port=6379"
        case "no token":
            del config["file_mounts"]["~/.ray/auth_token"]
    return dict(config)


RAY_FAULTS = {
    "misspelt key": (jsonschema.ValidationError, "file_mount"),
    "text for a number": (jsonschema.ValidationError, "'fast' is not of type 'number'"),
    "random port": (AssertionError, "head"),
    "other port": (AssertionError, "head"),
    "open dashboard": (AssertionError, "0.0.0.0"),
    "head's flag on a worker": (AssertionError, "worker"),
    "no token": (KeyError, "auth_token"),
}


@pytest.mark.parametrize("name", RAY_FILES)
@pytest.mark.parametrize("change", RAY_FAULTS)
def test_faults_in_a_cluster_file_are_found(name: str, change: str) -> None:
    fault, message = RAY_FAULTS[change]
    with pytest.raises(fault, match=message):
        check_ray_config(mutated(name, change))


def test_local_head_is_found_by_its_workers_and_starts_them() -> None:
    """Ray 2.60 by itself takes 127.0.0.1 where there is no route outside, and its new autoscaler starts no worker."""
    (config,) = load("ray/local.yaml")
    assert ray_start(config, "head")["node_ip_address"] == config["provider"]["head_ip"]
    assert " RAY_enable_autoscaler_v2=0 ray start --head " in config["head_start_ray_commands"][-1]


@pytest.mark.parametrize("name", RAY_FILES)
def test_cluster_file_brings_all_that_the_set_up_needs(name: str) -> None:
    (config,) = load(f"ray/{name}.yaml")
    mounts = {remote: local for remote, local in config["file_mounts"].items() if remote != "~/.ray/auth_token"}
    assert all(remote == f"~/tandem/{local}" and (ROOT / local).exists() for remote, local in mounts.items())
    assert set(mounts.values()) == {"protocol", "actor", "learner", "deploy", "recipes", "pyproject.toml", "Makefile",
                                    "README.md", "LICENSE"}  # fmt: skip
    assert any("make setup" in command for command in config["setup_commands"])


def test_aws_learner_is_no_spot_machine_and_no_group_is_made_by_ray() -> None:
    (config,) = load("ray/aws.yaml")
    types = prepared(config)["available_node_types"]
    assert config["head_node_type"] == "learner"
    assert "InstanceMarketOptions" not in types["learner"]["node_config"]
    assert types["actors"]["node_config"]["InstanceMarketOptions"] == {"MarketType": "spot"}
    assert (types["actors"]["min_workers"], types["actors"]["max_workers"]) == (1, config["max_workers"])
    # Without SecurityGroupIds Ray makes a group that admits SSH from everywhere.
    assert all(node["node_config"]["SecurityGroupIds"] for node in types.values())


# --- KubeRay --------------------------------------------------------------------------------------------------------


def clusters() -> dict[str, dict[str, Any]]:
    (cluster,), (job,) = load("kuberay/raycluster.yaml"), load("kuberay/rayjob.yaml")
    return {"raycluster": cluster["spec"], "rayjob": job["spec"]["rayClusterSpec"]}


def groups(spec: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    yield "head", spec["headGroupSpec"]
    yield from (("worker", group) for group in spec["workerGroupSpecs"])


def autoscaling(spec: dict[str, Any]) -> dict[str, Any]:
    """What Ray's KubeRay autoscaler makes of a cluster, checked by Ray. Raises what Ray raises."""
    from ray.autoscaler._private.kuberay.autoscaling_config import _derive_autoscaling_config_from_ray_cr

    resource = {"metadata": {"name": "tandem", "namespace": "default"}, "spec": copy.deepcopy(spec)}
    return dict(_derive_autoscaling_config_from_ray_cr(resource))


def check_cluster(spec: dict[str, Any]) -> None:
    """AssertionError unless ports, token, user and shared memory are as the pods of Tandem need them."""
    from ray.scripts.scripts import start

    assert spec["authOptions"]["mode"] == "token"
    for side, group in groups(spec):
        parameters = [f"--{key}={value}" for key, value in group["rayStartParams"].items()]
        expected = ray_start_flags("head" if side == "head" else "worker")
        assert sorted(word for word in parameters if "-port=" in word or "--port=" in word) == sorted(expected)
        start.make_context("start", ["--head", *parameters] if side == "head" else parameters)
        pod = group["template"]["spec"]
        (container,) = pod["containers"]
        check_container_ports(side, container)
        assert pod["securityContext"]["runAsNonRoot"] is True
        assert pod["securityContext"]["runAsUser"] > 0
        assert container["securityContext"]["allowPrivilegeEscalation"] is False
        mounts = {mount["mountPath"]: mount["name"] for mount in container["volumeMounts"]}
        volumes = {volume["name"]: volume for volume in pod["volumes"]}
        assert volumes[mounts["/dev/shm"]]["emptyDir"]["medium"] == "Memory"
        assert set(mounts.values()) == set(volumes)
        assert group["template"]["metadata"]["labels"] == {"app.kubernetes.io/part-of": "tandem"}


def check_by_both(spec: dict[str, Any]) -> None:
    check_cluster(spec)
    autoscaling(spec)


def check_container_ports(side: str, container: dict[str, Any]) -> None:
    """Every port is in the table under its name, and everything that the side opens to others is there."""
    named = {port["name"]: port["containerPort"] for port in container["ports"]}
    assert len(named) == len(container["ports"])
    assert all(NUMBERS[name].first == number for name, number in named.items())
    open_here = {port.name for port in PORTS if port.reach != "closed" and (side == "head" or port.node == "every")}
    assert set(named) == open_here - {"workers"}, "Kubernetes names single ports only"


@pytest.mark.parametrize("name", ["raycluster", "rayjob"])
def test_rays_autoscaler_reads_the_cluster(name: str) -> None:
    spec = clusters()[name]
    check_cluster(spec)
    types = autoscaling(spec)["available_node_types"]
    assert types["headgroup"]["resources"]["GPU"] == 1
    assert types["actors"]["resources"]["GPU"] == 1
    expected = {"raycluster": (1, 8), "rayjob": (2, 2)}[name]
    assert (types["actors"]["min_workers"], types["actors"]["max_workers"]) == expected


CLUSTER_FAULTS = {
    "no cpus": (ValueError, "detect `CPU` resources for group actors"),
    "no maximum": (KeyError, "maxReplicas"),
    "no token": (AssertionError, "disabled"),
    "other port": (AssertionError, "node-manager-port=9077"),
    "no port": (AssertionError, "single ports only"),
    "root": (AssertionError, "False is True"),
    "small shm": (KeyError, "/dev/shm"),
}


@pytest.mark.parametrize("change", CLUSTER_FAULTS)
def test_faults_in_a_cluster_are_found(change: str) -> None:
    spec = copy.deepcopy(clusters()["raycluster"])
    worker = spec["workerGroupSpecs"][0]
    container = worker["template"]["spec"]["containers"][0]
    match change:
        case "no cpus":
            del container["resources"]["limits"]["cpu"], container["resources"]["requests"]["cpu"]
        case "no maximum":
            del worker["maxReplicas"]
        case "no token":
            spec["authOptions"]["mode"] = "disabled"
        case "other port":
            worker["rayStartParams"]["node-manager-port"] = "9077"
        case "no port":
            container["ports"].pop()
        case "root":
            worker["template"]["spec"]["securityContext"]["runAsNonRoot"] = False
        case "small shm":  # a container's own /dev/shm has 64 MiB
            container["volumeMounts"].clear()
    fault, message = CLUSTER_FAULTS[change]
    with pytest.raises(fault, match=message):
        check_by_both(spec)


def test_job_and_cluster_describe_the_same_pods() -> None:
    found = clusters()
    assert [group["template"] for _, group in groups(found["rayjob"])] == [
        group["template"] for _, group in groups(found["raycluster"])
    ]
    assert found["rayjob"]["rayVersion"] == found["raycluster"]["rayVersion"]
    pinned = (ROOT / "deploy" / "requirements" / "gpu.txt").read_text()
    assert f"ray[default]=={found['rayjob']['rayVersion']}\n" in pinned


def test_job_resumes_a_run_that_is_there() -> None:
    (job,) = load("kuberay/rayjob.yaml")
    words = shlex.split(job["spec"]["entrypoint"])
    assert words[:2] == ["bash", "-c"]
    assert len(words) == 3
    assert re.findall(r"exec (tandem train \S+ \S+)", words[2]) == [
        "tandem train --resume /runs/demo", "tandem train /opt/tandem/recipes/demo.toml --name"
    ]  # fmt: skip
    assert words[2].count("wire.port=7700") == 2
    (volume,) = load("kuberay/volume.yaml")
    head = job["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]
    claims = [entry.get("persistentVolumeClaim", {}).get("claimName") for entry in head["volumes"]]
    assert volume["metadata"]["name"] in claims


def policy_numbers(rules: list[dict[str, Any]], protocol: str = "TCP") -> list[tuple[int, int]]:
    ports = [port for rule in rules for port in rule["ports"] if port["protocol"] == protocol]
    return [(port["port"], port.get("endPort", port["port"])) for port in ports]


def test_network_policies_admit_the_table() -> None:
    cluster, dashboard, actors = load("kuberay/networkpolicy.yaml")
    expected = [(port.first, port.last) for port in in_cluster()]
    tandem = {"matchLabels": {"app.kubernetes.io/part-of": "tandem"}}
    assert cluster["spec"]["podSelector"] == tandem
    assert cluster["spec"]["ingress"][0]["from"] == [{"podSelector": tandem}]
    assert policy_numbers(cluster["spec"]["ingress"]) == expected
    assert policy_numbers(dashboard["spec"]["ingress"]) == [(NUMBERS["dashboard"].first, NUMBERS["dashboard"].last)]
    to_pods, to_names = actors["spec"]["egress"]
    assert to_pods["to"] == [{"podSelector": tandem}]
    assert policy_numbers([to_pods]) == expected
    assert policy_numbers([to_names]) == policy_numbers([to_names], "UDP") == [(53, 53)]


def test_network_policies_know_the_pods_of_the_manifests() -> None:
    _, dashboard, _ = load("kuberay/networkpolicy.yaml")
    (job,) = load("kuberay/rayjob.yaml")
    submitter = job["spec"]["submitterPodTemplate"]["metadata"]["labels"]
    admitted = [peer["podSelector"]["matchLabels"] for peer in dashboard["spec"]["ingress"][0]["from"]]
    assert submitter in admitted
    assert submitter != {"app.kubernetes.io/part-of": "tandem"}, "it is no node of the cluster"


# --- Docker ---------------------------------------------------------------------------------------------------------


def dockerfile(name: str) -> list[tuple[str, str]]:
    """(instruction, rest) of a Dockerfile, continued lines joined."""
    text = (ROOT / "deploy" / "docker" / f"{name}.Dockerfile").read_text("utf-8")
    lines = [line for line in text.splitlines() if line.strip() and not line.startswith("#")]
    joined = "\n".join(lines).replace("\\\n", " ").splitlines()
    return [(line.split()[0], line.split(maxsplit=1)[1]) for line in joined]


@pytest.mark.parametrize("name", ["cpu", "cuda"])
def test_image_is_built_from_what_is_there_and_let_in(name: str) -> None:
    steps = dockerfile(name)
    copied = [word for instruction, rest in steps if instruction == "COPY" for word in rest.split()[:-1]]
    assert {"protocol", "actor", "learner", "deploy", "recipes", "pyproject.toml"} <= set(copied)
    let_in = (ROOT / ".dockerignore").read_text().splitlines()
    assert let_in[1] == "*", "nothing comes in that is not named"
    for path in copied:
        source = ROOT / path
        assert source.exists(), path
        assert f"!{path}/" in let_in if source.is_dir() else f"!{path}" in let_in, path
    installs = [rest for instruction, rest in steps if "deploy/install.py" in rest and instruction == "RUN"]
    assert len(installs) == 1
    assert installs[0].endswith(f"deploy/install.py --variant {'cpu' if name == 'cpu' else 'gpu'}")


@pytest.mark.parametrize("name", ["cpu", "cuda"])
def test_image_is_pinned_unprivileged_and_holds_no_secret(name: str) -> None:
    steps = dockerfile(name)
    (base,) = [rest for instruction, rest in steps if instruction == "FROM"]
    assert re.fullmatch(r"[a-z/]+:\d+\.\d+\.\d+-[a-z0-9.-]+", base), "a tag with a whole version"
    users = [rest for instruction, rest in steps if instruction == "USER"]
    assert users == ["1000:1000"]
    order = [instruction for instruction, _ in steps]
    assert order.index("USER") > max(index for index, step in enumerate(order) if step == "RUN")
    assert [rest for instruction, rest in steps if instruction == "ENTRYPOINT"] == ['["tandem"]']
    assert "ARG" not in order, "build arguments stay in the image's history"
    settings = " ".join(rest for instruction, rest in steps if instruction == "ENV")
    assert not re.search(r"TOKEN|PASSWORD|SECRET|INDEX_URL", settings)


@pytest.mark.parametrize("name", ["cpu", "cuda"])
def test_image_exposes_the_table(name: str) -> None:
    (exposed,) = [rest.split() for instruction, rest in dockerfile(name) if instruction == "EXPOSE"]
    assert exposed == [port.numbers for port in PORTS if port.reach != "closed"]
