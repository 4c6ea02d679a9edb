"""The run's keys on disk: private from the first byte, made once; the allow-list while it changes."""

from __future__ import annotations

import json
import logging
import os
import stat
from pathlib import Path

import pytest

from protocol import keys, rundir
from protocol.errors import KeysError
from protocol.keys import AllowList, KeyPair, allow, is_key, load_actor_keys, load_learner_keys, make_keys, new_pair


@pytest.fixture
def made(tmp_path: Path) -> Path:
    make_keys(tmp_path / "keys")
    return tmp_path / "keys"


def modes(directory: Path) -> dict[str, int]:
    return {
        path.relative_to(directory).as_posix(): stat.S_IMODE(path.stat().st_mode)
        for path in (directory, *directory.rglob("*"))
    }


# --- making ---


@pytest.mark.parametrize("umask", [0o000, 0o022, 0o077])
def test_keys_are_private_whatever_the_umask(tmp_path: Path, umask: int) -> None:
    before = os.umask(umask)
    try:
        make_keys(tmp_path / "keys")
    finally:
        os.umask(before)
    assert modes(tmp_path / "keys") == {
        ".": 0o700,
        "learner.json": 0o600,
        "actor.json": 0o600,
        "allowed": 0o700,
        "allowed/actors.pub": 0o600,
    }


def test_no_key_is_readable_for_others_while_it_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Looked at at the last moment before each file gets its name: a temporary file has the content by then."""
    seen = []
    replace = os.replace

    def looking(source: str, target: Path) -> None:
        seen.append((Path(target).name, stat.S_IMODE(os.stat(source).st_mode)))
        replace(source, target)

    created = []
    mkstemp = rundir.tempfile.mkstemp

    def making(*args: object, **options: object) -> tuple[int, str]:
        descriptor, name = mkstemp(*args, **options)
        created.append(stat.S_IMODE(os.fstat(descriptor).st_mode))
        return descriptor, name

    monkeypatch.setattr(rundir.os, "replace", looking)
    monkeypatch.setattr(rundir.tempfile, "mkstemp", making)
    before = os.umask(0)
    try:
        make_keys(tmp_path / "keys")
    finally:
        os.umask(before)
    assert seen == [("learner.json", 0o600), ("actors.pub", 0o600), ("actor.json", 0o600)]
    assert created == [0o600] * 3


def test_both_sides_read_what_belongs_together(made: Path) -> None:
    learner, actor = load_learner_keys(made), load_actor_keys(made / "actor.json")
    assert actor.learner == learner.own.public
    assert learner.allowed == made / "allowed"
    assert (made / "allowed" / "actors.pub").read_text() == actor.own.public + "\n"
    assert len({learner.own.public, learner.own.secret, actor.own.public, actor.own.secret}) == 4
    assert all(is_key(key) for key in (learner.own.public, learner.own.secret, actor.own.public, actor.own.secret))


def test_a_run_keeps_its_keys_and_two_runs_share_none(made: Path, tmp_path: Path) -> None:
    before = {path.name: path.read_bytes() for path in made.rglob("*") if path.is_file()}
    make_keys(made)
    assert {path.name: path.read_bytes() for path in made.rglob("*") if path.is_file()} == before
    make_keys(tmp_path / "other")
    assert load_learner_keys(tmp_path / "other").own.public != load_learner_keys(made).own.public


def test_keys_that_were_removed_are_made_anew_and_a_withdrawn_one_stays_withdrawn(made: Path) -> None:
    first = load_actor_keys(made / "actor.json").own.public
    (made / "allowed" / "actors.pub").unlink()
    make_keys(made)
    assert not list((made / "allowed").iterdir()), "a resume lets nobody in again"
    (made / "actor.json").unlink()
    make_keys(made)
    second = load_actor_keys(made / "actor.json").own.public
    assert second != first
    assert AllowList(made / "allowed").name_of(second) == "actors"
    assert AllowList(made / "allowed").name_of(first) is None


# --- what is refused ---


@pytest.mark.parametrize("name", ["learner.json", "actor.json", ".", "allowed"])
@pytest.mark.parametrize("mode", [0o040, 0o004, 0o020, 0o001])
def test_what_others_can_reach_is_refused_by_name(made: Path, name: str, mode: int) -> None:
    path = made / name
    path.chmod(stat.S_IMODE(path.stat().st_mode) | mode)
    found = f"{stat.S_IMODE(path.stat().st_mode):04o}"
    with pytest.raises(KeysError, match=f"^{path}: found mode {found}, allowed: 0[67]00"):
        make_keys(made)


def test_each_side_checks_its_own_file_before_it_uses_it(made: Path) -> None:
    (made / "actor.json").chmod(0o644)
    with pytest.raises(KeysError, match=r"actor\.json: found mode 0644, allowed: 0600"):
        load_actor_keys(made / "actor.json")
    (made / "learner.json").chmod(0o640)
    with pytest.raises(KeysError, match=r"learner\.json: found mode 0640, allowed: 0600"):
        load_learner_keys(made)


def test_a_file_of_another_user_is_refused(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if os.geteuid() == 0:
        os.chown(made / "actor.json", 4711, 0)
    else:
        pytest.skip("needs root to give a file away")
    with pytest.raises(KeysError, match=r"actor\.json: found owner 4711, allowed: the user who runs this"):
        load_actor_keys(made / "actor.json")


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        ("", "found no JSON"),
        ("[]", "learner: found no key"),
        ("{}", "learner: found no key"),
        ('{"learner": "LEARNER", "public": "short", "secret": "SECRET"}', "public: found no key"),
        ('{"learner": "LEARNER", "public": "LEARNER", "secret": "SECRET"}', "that is not of its secret"),
        ('{"learner": "LEARNER", "public": "LEARNER", "secret": 5}', "secret: found no key"),
    ],
)  # fmt: skip
def test_a_damaged_file_is_named_and_its_secret_is_not(made: Path, content: str, complaint: str) -> None:
    path, held = made / "actor.json", load_actor_keys(made / "actor.json")
    path.write_text(content.replace("LEARNER", held.learner).replace("SECRET", held.own.secret))
    with pytest.raises(KeysError, match=complaint) as raised:
        load_actor_keys(path)
    assert str(path) in str(raised.value)
    assert held.own.secret not in str(raised.value)
    assert raised.value.__cause__ is None


def test_missing_keys_are_named_with_what_to_do(tmp_path: Path, made: Path) -> None:
    with pytest.raises(
        KeysError, match=r"learner\.json: no such file; allowed: .*wire.no_keys_on_trusted_network = true"
    ):
        load_learner_keys(tmp_path / "none")
    with pytest.raises(FileNotFoundError):
        load_actor_keys(tmp_path / "none")
    other = json.loads((made / "actor.json").read_text()) | {"learner": new_pair().public}
    (made / "actor.json").write_text(json.dumps(other))
    with pytest.raises(KeysError, match=r"actor\.json: found the public key .* of another learner"):
        make_keys(made)


def test_no_secret_is_in_what_is_printed(made: Path) -> None:
    learner, actor = load_learner_keys(made), load_actor_keys(made / "actor.json")
    shown = f"{learner!r} {actor!r} {learner} {actor} {[actor.own]}"
    assert learner.own.public in shown
    assert learner.own.secret not in shown
    assert actor.own.secret not in shown


@pytest.mark.parametrize("text", ["", "a" * 39, "a" * 41, "#" * 40, "a" * 39 + "\n", "ä" * 40, None, 5, b"a" * 40])
def test_what_is_no_key_is_told(text: object) -> None:
    assert is_key(new_pair().public)
    assert not is_key(text)


# --- the allow-list ---


class Clock:
    now = 0.0

    def __call__(self) -> float:
        self.now += keys.REREAD_S
        return self.now


def test_allow_list_follows_its_directory(made: Path) -> None:
    allowed, pair = AllowList(made / "allowed", Clock()), new_pair()
    assert allowed.name_of(pair.public) is None
    allow(made / "allowed", "lab-2", pair.public)
    assert allowed.name_of(pair.public) == "lab-2"
    (made / "allowed" / "lab-2.pub").write_text(new_pair().public)  # written by hand, in place
    assert allowed.name_of(pair.public) is None
    allow(made / "allowed", "lab-2", pair.public)
    assert allowed.name_of(pair.public) == "lab-2"
    (made / "allowed" / "lab-2.pub").unlink()
    assert allowed.name_of(pair.public) is None
    assert allowed.name_of(load_actor_keys(made / "actor.json").own.public) == "actors"


def test_allow_list_is_read_again_a_few_times_a_second_at_most(made: Path) -> None:
    now = 0.0
    allowed, pair = AllowList(made / "allowed", lambda: now), new_pair()
    assert allowed.name_of(pair.public) is None
    allow(made / "allowed", "late", pair.public)
    now += keys.REREAD_S * 0.9
    assert allowed.name_of(pair.public) is None
    now += keys.REREAD_S * 0.2
    assert allowed.name_of(pair.public) == "late"


def test_allow_list_that_cannot_be_trusted_lets_nobody_in(made: Path, caplog: pytest.LogCaptureFixture) -> None:
    actor = load_actor_keys(made / "actor.json").own.public
    allowed = AllowList(made / "allowed", Clock())
    assert allowed.name_of(actor) == "actors"
    with caplog.at_level(logging.ERROR, "protocol.keys"):
        (made / "allowed").chmod(0o777)
        assert allowed.name_of(actor) is None
        assert allowed.name_of(actor) is None
    assert [record.getMessage() for record in caplog.records] == [
        f"nobody is let in: {made / 'allowed'}: found mode 0777, allowed: 0700, nothing for others (go-rwx mends 077;"
        " but take keys that others could read for known, and make new ones)"
    ]
    (made / "allowed").chmod(0o700)
    assert allowed.name_of(actor) == "actors"
    (made / "allowed").rename(made / "elsewhere")
    assert allowed.name_of(actor) is None


@pytest.mark.parametrize("content", ["", "no key", "x" * 10_000])
def test_allow_list_passes_over_a_file_without_a_key_and_names_it(
    made: Path, caplog: pytest.LogCaptureFixture, content: str
) -> None:
    (made / "allowed" / "broken.pub").write_text(content)
    (made / "allowed" / "notes.txt").write_text(content)
    allowed = AllowList(made / "allowed", Clock())
    with caplog.at_level(logging.ERROR, "protocol.keys"):
        assert allowed.name_of(load_actor_keys(made / "actor.json").own.public) == "actors"
    assert [record.getMessage().split(": ")[0] for record in caplog.records] == [str(made / "allowed" / "broken.pub")]


@pytest.mark.parametrize(("name", "public"), [("a/b", None), ("", None), (".hidden", None), ("good", "no key")])
def test_allow_refuses_what_is_no_name_or_no_key(made: Path, name: str, public: str | None) -> None:
    with pytest.raises(ValueError, match="allowed key: found"):
        allow(made / "allowed", name, public or new_pair().public)


def test_pair_is_of_curve() -> None:
    pair = new_pair()
    assert isinstance(pair, KeyPair)
    assert pair.public != pair.secret
