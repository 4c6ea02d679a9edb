"""What lies on a run's desk, without Ray; actors and `tandem scale` use it for real in tests/real/test_nodes.py."""

from __future__ import annotations

from pathlib import Path

import pytest

from deploy import desk
from deploy.desk import Desk, model_files, run_of
from protocol.errors import RecipeError
from protocol.rundir import RunDir
from tests.tiny_model import make_tiny_model

LAID: desk.Laid = {"wanted": 2, "members": [{"name": "actor-0", "state": "running"}]}


def test_wish_is_given_to_the_launcher_once() -> None:
    mailbox = Desk()
    assert mailbox.exchange({"work": "tcp://10.0.0.1:7700", "keys": None}, LAID) == (None, False)
    assert mailbox.leave_wish({"actors": 3, "by": "tandem scale"}) == LAID
    assert mailbox.exchange(None, LAID) == ({"actors": 3, "by": "tandem scale"}, False)
    assert mailbox.exchange(None, LAID) == (None, False)


def test_desk_tells_what_was_laid_out_last() -> None:
    mailbox = Desk()
    assert (mailbox.address(), mailbox.files()) == (None, None)
    address = {"work": "tcp://10.0.0.1:7700", "keys": None}
    mailbox.exchange(address, LAID)
    mailbox.lay_files({"config.json": b"{}"})
    assert mailbox.address() == address
    assert mailbox.files() == {"config.json": b"{}"}
    assert mailbox.exchange(None, LAID)[1], "the launcher need not send the files again"
    assert mailbox.address() is None, "the learner is gone"


def test_model_files_are_all_but_weights_and_code(tmp_path: Path) -> None:
    directory = make_tiny_model(tmp_path / "tiny")
    (directory / "modeling_own.py").write_text("raise SystemExit")
    (directory / "pytorch_model.bin").write_bytes(b"x")
    (directory / ".cache").mkdir()
    files = model_files(directory)
    assert {"config.json", "tokenizer.json"} <= files.keys()
    assert not [name for name in files if name.endswith((".safetensors", ".bin", ".py"))]
    assert files["config.json"] == (directory / "config.json").read_bytes()


def test_model_file_that_is_too_large_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(desk, "LARGEST_FILE", 10)
    (tmp_path / "merges.txt").write_text("more than ten bytes")
    with pytest.raises(RecipeError, match=r"merges\.txt: 19 bytes, allowed"):
        model_files(tmp_path)


def test_scaling_at_an_address_where_nobody_listens_is_refused_at_once() -> None:
    with pytest.raises(RecipeError, match=r"--ray-address: nobody listens at 127\.0\.0\.1:1 "):
        desk.remote_run("127.0.0.1:1", "").__enter__()


@pytest.mark.parametrize("name", ["demo", "demo-2", "a-b-c"])
def test_run_of_is_the_name_in_a_label(tmp_path: Path, name: str) -> None:
    assert run_of(RunDir(tmp_path / name).create().label) == name
