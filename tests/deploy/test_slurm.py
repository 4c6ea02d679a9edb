"""deploy/slurm/train.sbatch: its ports and flags, and what it does with signals, exit codes and requeued jobs.

Slurm and Ray are small stand-ins here; `tests/real/test_slurm.py` runs the same script on two nodes with a real Ray.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import stat
import subprocess
from pathlib import Path

import pytest

from deploy.ports import TANDEM_PORT, ray_start_flags
from tests.slurm_harness import SCRIPT, slurm_environment, wait_for, write_program

TEXT = SCRIPT.read_text("utf-8")
RAY = '#!/bin/bash\necho "$@" >>"$SHIM/ray.calls"\nwhile [[ $1 != -- ]]; do shift; done\nshift\n"$@"\n'
TANDEM = """#!/bin/bash
echo "$@" >>"$SHIM/tandem.calls"
stat -c %a "$RAY_AUTH_TOKEN_PATH" "$TANDEM_JOB_DIR" >"$SHIM/modes"
cp "$RAY_AUTH_TOKEN_PATH" "$SHIM/token"
trap 'echo stopped >>"$SHIM/tandem.calls"; exit 3' TERM
touch "$SHIM/ready"
"""
WAITS = "while true; do sleep 0.05; done"


def ray_flags() -> list[str]:
    """The flags between `ray_flags=(` and `)`, without comments."""
    body = re.search(r"^ray_flags=\((.*?)^\)", TEXT, re.MULTILINE | re.DOTALL)
    assert body
    return [line.split("#")[0].strip() for line in body[1].strip().splitlines()]


@pytest.fixture
def env(tmp_path: Path) -> dict[str, str]:
    """A job of one node whose `ray symmetric-run` runs the command, and whose tandem runs until it is stopped."""
    environment = slurm_environment(tmp_path, job=os.getpid(), nodes=1)
    write_program(tmp_path / "env" / "bin" / "ray", RAY)
    write_program(tmp_path / "env" / "bin" / "tandem", TANDEM + WAITS)
    write_program(Path(environment["SHIM"]) / "hostname", "#!/bin/bash\necho 10.0.0.1 fd00::1\n")
    return environment


def start(env: dict[str, str], *arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(["bash", str(SCRIPT), *arguments], env=env, stdout=subprocess.PIPE, text=True,
                            stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL)  # fmt: skip


def run_and_stop(env: dict[str, str], signum: signal.Signals) -> tuple[int, str]:
    """(exit code, output) of a job that gets a signal while tandem works."""
    job = start(env, "a.toml", "a-run", "--set", 'task.name="two words"')
    try:
        wait_for((Path(env["SHIM"]) / "ready").exists, "tandem to start", 20, job)
        job.send_signal(signum)
        output, _ = job.communicate(timeout=20)
    finally:
        job.kill()
    return job.returncode, output


def calls(env: dict[str, str], program: str) -> list[str]:
    file = Path(env["SHIM"]) / f"{program}.calls"
    return file.read_text().splitlines() if file.exists() else []


def test_script_is_sound_shell() -> None:
    assert subprocess.run(["bash", "-n", SCRIPT], check=False, timeout=10).returncode == 0
    if shutil.which("shellcheck"):
        done = subprocess.run(["shellcheck", SCRIPT], capture_output=True, text=True, check=False, timeout=30)
        assert done.returncode == 0, done.stdout


def test_script_has_the_ports_of_the_table() -> None:
    assert [flag for flag in ray_flags() if "-port=" in flag] == ray_start_flags("worker")
    assert f"\nwire_port={TANDEM_PORT}\n" in TEXT
    assert f"\ngcs_port={ray_start_flags('head')[0].removeprefix('--port=')}\n" in TEXT


def test_flags_are_those_that_ray_takes_on_both_sides() -> None:
    from ray.scripts.scripts import start as ray_start
    from ray.scripts.symmetric_run import curate_and_validate_ray_start_args as validate

    address = ["--address", "10.0.0.1:6379"]
    passed_on = validate([*address, "--min-nodes", "2", *ray_flags()])
    assert passed_on == ray_flags()
    for side in (["--head", "--port=6379", "--node-ip-address=10.0.0.1"], [*address, "--block"]):
        parsed = ray_start.make_context("start", [*side, *passed_on]).params
        assert (parsed["node_manager_port"], parsed["max_worker_port"]) == (8077, 10999)
        assert (parsed["port"] is None) == ("--head" not in side), "the worker refuses what only the head may have"


def test_time_limit_stops_the_run_and_requeues_the_job(env: dict[str, str]) -> None:
    code, output = run_and_stop(env, signal.SIGUSR1)
    assert code == 3, output
    runs, address = env["TANDEM_RUNS"], r"[\d.:a-f]+:6379"
    first, stopped = calls(env, "tandem")
    assert re.fullmatch(f"train a.toml --name a-run --runs {runs} --ray-address {address}"
                        f' --set wire.port={TANDEM_PORT} --set task.name="two words"', first)  # fmt: skip
    assert stopped == "stopped"
    assert calls(env, "scontrol") == [f"requeue {env['SLURM_JOB_ID']}"]


def test_cancelled_job_stops_the_run_and_stays_out_of_the_queue(env: dict[str, str]) -> None:
    code, output = run_and_stop(env, signal.SIGTERM)
    assert code == 3, output
    assert calls(env, "tandem")[-1] == "stopped"
    assert calls(env, "scontrol") == []


def test_job_that_comes_back_resumes_its_run(env: dict[str, str]) -> None:
    run = Path(env["TANDEM_RUNS"]) / "a-run"
    run.mkdir(parents=True)
    (run / "recipe.toml").touch()
    run_and_stop(env, signal.SIGTERM)
    assert calls(env, "tandem")[0].startswith(f"train --resume {run} --ray-address ")


@pytest.mark.parametrize("code", [0, 4])
def test_exit_code_is_tandems_and_no_run_that_ended_is_requeued(env: dict[str, str], tmp_path: Path, code: int) -> None:
    write_program(tmp_path / "env" / "bin" / "tandem", TANDEM + f"exit {code}")
    job = start(env, "a.toml", "a-run")
    output, _ = job.communicate(timeout=20)
    assert job.returncode == code, output
    assert calls(env, "scontrol") == []


def test_token_is_private_new_for_each_job_and_removed(env: dict[str, str]) -> None:
    shims, tokens = Path(env["SHIM"]), set()
    for _ in range(2):
        (shims / "ready").unlink(missing_ok=True)
        run_and_stop(env, signal.SIGTERM)
        tokens.add((shims / "token").read_text())
        assert (shims / "modes").read_text().split() == ["600", "700"]
    assert len(tokens) == 2
    assert all(re.fullmatch("[0-9a-f]{64}", token) for token in tokens)
    assert not list((Path(env["HOME"]) / ".tandem").iterdir())
    assert not any(token in call for token in tokens for call in calls(env, "ray"))


def test_missing_arguments_are_refused(env: dict[str, str]) -> None:
    job = start(env, "a.toml")
    output, _ = job.communicate(timeout=10)
    assert job.returncode == 2
    assert "usage: sbatch train.sbatch RECIPE NAME" in output
    assert stat.S_ISREG(SCRIPT.stat().st_mode)
