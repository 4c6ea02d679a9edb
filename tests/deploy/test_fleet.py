"""The number of actors against a cluster that exists in memory only, and a clock that the test moves."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest

from deploy.fleet import KILL_GRACE_S, LOOK_S, PENDING_SAID_S, RETRY_S, Fleet, Sight
from protocol.scaling import SCALED_DOWN

DRAIN_S = 10.0
SERVING = Sight("running", "10.0.0.1", working=True, phase="serving")


@dataclass
class FakeCluster:
    """Handles are serial numbers; `sights` says what each looks like."""

    started: list[int] = field(default_factory=list)
    removed: list[int] = field(default_factory=list)
    sights: dict[int, Sight] = field(default_factory=dict)

    def start(self, number: int) -> int:
        self.started.append(number)
        self.sights[len(self.started)] = Sight("pending", why="no room")
        return len(self.started)

    def look(self, handle: int) -> Sight:
        assert handle not in self.removed
        return self.sights[handle]

    def remove(self, handle: int) -> None:
        self.removed.append(handle)


class Scene:
    def __init__(self) -> None:
        self.cluster, self.lines, self.now = FakeCluster(), list[str](), 100.0
        self.fleet = Fleet(self.cluster, DRAIN_S, self.lines.append)

    def tick(self, wanted: int, after_s: float = LOOK_S) -> dict[str, str]:
        self.now += after_s
        assert self.fleet.reconcile(wanted, self.now)
        return {member.name: member.state for member in self.fleet.members()}

    def serve(self, *handles: int) -> None:
        self.cluster.sights |= dict.fromkeys(handles, SERVING)


@pytest.fixture
def scene() -> Scene:
    return Scene()


def test_fleet_starts_what_is_missing_once(scene: Scene) -> None:
    assert scene.tick(2) == {"actor-0": "pending", "actor-1": "pending"}
    scene.serve(1)
    assert scene.tick(2) == {"actor-0": "running", "actor-1": "pending"}
    assert scene.tick(3) == {"actor-0": "running", "actor-1": "pending", "actor-2": "pending"}
    assert scene.cluster.started == [0, 1, 2]


def test_fleet_looks_at_once_when_the_wish_changes_and_now_and_then_otherwise(scene: Scene) -> None:
    scene.tick(1)
    assert not scene.fleet.reconcile(1, scene.now + LOOK_S / 2)
    assert scene.fleet.reconcile(2, scene.now + LOOK_S / 2)


def test_surplus_that_holds_nothing_is_removed_at_once(scene: Scene) -> None:
    scene.tick(3)
    scene.serve(1)
    scene.cluster.sights[2] = Sight("starting", "10.0.0.1", working=False)
    assert scene.tick(1) == {"actor-0": "running"}
    assert scene.cluster.removed == [2, 3]


def test_surplus_that_works_is_removed_when_it_has_left(scene: Scene) -> None:
    scene.tick(2)
    scene.serve(1, 2)
    assert scene.tick(1) == {"actor-0": "running", "actor-1": "leaving"}
    scene.cluster.sights[2] = Sight("left", why=f"{SCALED_DOWN} to 1 actors")
    assert scene.tick(1) == {"actor-0": "running"}
    assert scene.cluster.removed == [2]
    assert scene.lines[-1] == "actor-1 is gone"


def test_surplus_that_does_not_leave_is_killed_after_its_deadline(scene: Scene) -> None:
    scene.tick(1)
    scene.serve(1)
    scene.tick(0)
    scene.tick(0, DRAIN_S + KILL_GRACE_S)
    assert scene.cluster.removed == []
    assert scene.tick(0, 0.6) == {}
    assert scene.cluster.removed == [1]
    assert "actor-0 did not leave within 41 s: killed" in scene.lines[-1]


def test_wish_that_comes_back_spares_an_actor_that_was_not_sent_home(scene: Scene) -> None:
    scene.tick(1)
    scene.serve(1)
    assert scene.tick(0) == {"actor-0": "leaving"}
    assert scene.tick(1) == {"actor-0": "running"}
    assert scene.tick(0, DRAIN_S + KILL_GRACE_S) == {"actor-0": "leaving"}, "its deadline begins anew"


@pytest.mark.parametrize(
    ("reason", "started"), [(f"{SCALED_DOWN} to 0 actors", [0, 0]), ("the run is over", [0]), ("", [0])]
)
def test_actor_that_left_is_replaced_only_if_it_was_scaled_down(scene: Scene, reason: str, started: list[int]) -> None:
    scene.tick(1)
    scene.cluster.sights[1] = Sight("left", why=reason)
    scene.tick(1)
    assert scene.cluster.started == started


def test_actor_whose_process_cannot_start_is_tried_again_after_a_while(scene: Scene) -> None:
    scene.tick(1)
    scene.cluster.sights[1] = Sight("failed", "10.0.0.2", "No module named 'vllm'")
    assert scene.tick(1) == {"actor-0": "failed"}
    assert scene.lines == ["actor-0 failed: No module named 'vllm'"]
    scene.tick(1, RETRY_S)
    assert (scene.cluster.started, scene.cluster.removed) == ([0, 0], [1])


def test_waiting_for_room_is_said_once_and_so_is_its_end(scene: Scene) -> None:
    scene.tick(1)
    assert scene.lines == [], "most find room at once"
    scene.tick(1, PENDING_SAID_S)
    scene.tick(1)
    assert scene.lines == ["actor-0 is pending: no room"]
    scene.serve(1)
    scene.tick(1)
    scene.tick(1)
    assert scene.lines == ["actor-0 is pending: no room", "actor-0 has found room on 10.0.0.1"]


def test_refused_actor_is_said_and_tried_again_after_a_while(scene: Scene) -> None:
    scene.tick(1)
    scene.cluster.sights[1] = Sight("refused", "10.0.0.1", "another actor is called actor-0")
    assert scene.tick(1) == {"actor-0": "refused"}
    assert scene.lines == ["actor-0 was refused: another actor is called actor-0"]
    assert scene.cluster.started == [0]
    scene.tick(1, RETRY_S)
    assert (scene.cluster.started, scene.cluster.removed) == ([0, 0], [1])


def test_close_removes_all(scene: Scene) -> None:
    scene.tick(2)
    scene.fleet.close()
    assert scene.cluster.removed == [1, 2]
    assert scene.fleet.members() == []
