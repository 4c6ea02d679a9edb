"""Where an actor finds its learner and its keys; and an actor's whole loop at a learner that refuses its key."""

from __future__ import annotations

import asyncio
import json
from dataclasses import replace
from pathlib import Path

import pytest

from actor import loop as loop_module
from actor.fake_engine import FakeEngine
from actor.finding import Address, file_finder, finder, fixed
from actor.loop import ActorLoop, LearnerLost
from protocol import handshakes, keys
from protocol.errors import KeysError
from protocol.hub import Hub
from protocol.keys import LearnerKeys, allow, load_actor_keys, load_learner_keys, make_keys, new_pair
from protocol.messages import Hello, Message, Refused
from protocol.rundir import RunDir, write_json
from tests.hub_harness import DEADLINE_S, RunningHub


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunDir:
    """A run whose learner has keys, with its endpoint.json."""
    monkeypatch.setattr(keys, "REREAD_S", 0.0)
    monkeypatch.setattr(handshakes, "FIRST_PAUSE_S", 0.02)
    monkeypatch.setattr(handshakes, "LONGEST_PAUSE_S", 0.1)
    monkeypatch.setattr(loop_module, "HELLO_EVERY_S", 0.1)
    run = RunDir(tmp_path / "run").create()
    make_keys(run.keys)
    write_json(run.endpoint, {"work": "tcp://127.0.0.1:6", "keys": True})
    return run


def learner_keys(run: RunDir) -> LearnerKeys:
    return load_learner_keys(run.keys)


def test_address_alone_is_a_learner_without_keys() -> None:
    assert finder("tcp://127.0.0.1:5")() == Address("tcp://127.0.0.1:5", None)


def test_address_with_a_key_file(run: RunDir) -> None:
    assert finder("tcp://10.0.0.1:5", str(run.actor_keys))() == Address(
        "tcp://10.0.0.1:5", load_actor_keys(run.actor_keys)
    )


def test_endpoint_file_says_whether_the_keys_beside_it_are_wanted(run: RunDir) -> None:
    find = finder(str(run.endpoint))
    assert find() == Address("tcp://127.0.0.1:6", load_actor_keys(run.actor_keys))
    write_json(run.endpoint, {"work": "tcp://127.0.0.1:7", "keys": False})
    assert find() == Address("tcp://127.0.0.1:7", None)
    write_json(run.endpoint, {"work": "tcp://127.0.0.1:8"})
    assert find() == Address("tcp://127.0.0.1:8", None)


def test_endpoint_file_with_a_key_file_of_the_actors_own(run: RunDir, tmp_path: Path) -> None:
    make_keys(tmp_path / "mine")
    mine = tmp_path / "mine" / "actor.json"
    assert file_finder(run.endpoint, str(mine))().keys == load_actor_keys(mine)


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"work": 5}', "{"])
def test_endpoint_file_that_says_nothing_is_asked_again(run: RunDir, content: str) -> None:
    run.endpoint.write_text(content)
    with pytest.raises(ValueError):
        finder(str(run.endpoint))()
    run.endpoint.unlink()
    with pytest.raises(FileNotFoundError):
        finder(str(run.endpoint))()


def test_key_file_that_cannot_be_used_ends_the_search(run: RunDir) -> None:
    with pytest.raises(ValueError, match=r"--key: found 'none\.json', allowed: a copy of RUN/keys/actor\.json"):
        fixed("tcp://127.0.0.1:5", "none.json")
    run.actor_keys.chmod(0o644)
    with pytest.raises(KeysError, match=r"actor\.json: found mode 0644"):
        fixed("tcp://127.0.0.1:5", str(run.actor_keys))
    with pytest.raises(KeysError, match=r"actor\.json: found mode 0644"):
        finder(str(run.endpoint))()


# --- the loop ---


def refuses(hub: Hub, peer: bytes, message: Message) -> None:
    """Heard at all: that is what these tests wait for."""
    hub.send(peer, Refused("heard"))


async def ends(actor: ActorLoop) -> BaseException:
    with pytest.raises(Exception) as raised:
        await asyncio.wait_for(actor.run(), DEADLINE_S)
    return raised.value


async def test_actor_ends_at_once_with_keys_that_others_can_read(run: RunDir) -> None:
    run.actor_keys.chmod(0o644)
    error = await ends(ActorLoop(str(run.endpoint), "a", engine=FakeEngine()))
    assert isinstance(error, KeysError)
    assert "found mode 0644" in str(error)


async def test_actor_finds_keys_beside_the_endpoint(run: RunDir) -> None:
    with RunningHub(keys=learner_keys(run), answer=refuses) as learner:
        write_json(run.endpoint, {"work": learner.hub.work_endpoint, "keys": True})
        assert str(await ends(ActorLoop(str(run.endpoint), "a", engine=FakeEngine()))) == "heard"
        assert isinstance(learner.received[0][1], Hello)


async def test_actor_whose_key_is_refused_says_so_at_its_end(run: RunDir) -> None:
    stranger = replace(load_actor_keys(run.actor_keys), own=new_pair())
    with RunningHub(keys=learner_keys(run)) as learner:
        address = Address(learner.hub.work_endpoint, stranger)
        error = await ends(ActorLoop(lambda: address, "a", engine=FakeEngine(), lost_learner_s=3.0))
    assert isinstance(error, LearnerLost)
    assert f"no word from the learner at {address.work} for" in str(error)
    assert f"does not accept this actor's key: put its public key {stranger.own.public} into" in str(error)
    assert stranger.own.secret not in str(error)


async def test_actor_without_a_key_file_is_told_to_have_one(run: RunDir) -> None:
    with RunningHub(keys=learner_keys(run)) as learner:
        error = await ends(ActorLoop(learner.hub.work_endpoint, "a", engine=FakeEngine(), lost_learner_s=2.0))
    assert isinstance(error, LearnerLost)
    assert "wants keys, this actor has none: give it a key file" in str(error)


async def test_actor_is_heard_when_its_key_is_allowed_later(run: RunDir) -> None:
    late = replace(load_actor_keys(run.actor_keys), own=new_pair())
    with RunningHub(keys=learner_keys(run), answer=refuses) as learner:
        actor = ActorLoop(lambda: Address(learner.hub.work_endpoint, late), "a", engine=FakeEngine())
        ending = asyncio.create_task(ends(actor))
        async with asyncio.timeout(DEADLINE_S):
            while not learner.hub.turned_away.counts["rejected"] >= 2:  # noqa: ASYNC110 - another thread's
                await asyncio.sleep(0.01)
        allow(learner_keys(run).allowed, "late", late.own.public)
        assert str(await ending) == "heard"


async def test_actor_takes_the_new_keys_of_a_learner_that_has_new_ones(run: RunDir) -> None:
    """The run's keys were removed and made anew; the actor looks again, as it does for an address."""
    old = load_actor_keys(run.actor_keys)
    for path in (run.keys / "learner.json", run.actor_keys, run.keys / "allowed" / "actors.pub"):
        path.unlink()
    make_keys(run.keys)
    with RunningHub(keys=learner_keys(run), answer=refuses) as learner:
        found = [Address(learner.hub.work_endpoint, old)] * 3
        write_json(run.endpoint, {"work": learner.hub.work_endpoint, "keys": True})
        look = finder(str(run.endpoint))
        actor = ActorLoop(lambda: found.pop() if found else look(), "a", engine=FakeEngine())
        assert str(await ends(actor)) == "heard"
        assert not found


def test_address_shows_no_secret(run: RunDir) -> None:
    address = finder(str(run.endpoint))()
    assert json.loads(run.actor_keys.read_text())["secret"] not in repr(address)
