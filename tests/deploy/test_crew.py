"""The launcher's reading of the wish, with a cluster that exists in memory only; with Ray: test_cli.py, tests/real."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import pytest

from deploy import crew as crew_module
from deploy.crew import Crew
from deploy.fleet import Fleet, Sight
from deploy.site import Site
from protocol.config import parse_recipe
from protocol.rundir import RunDir
from protocol.scaling import Member, Wish, read_members, read_wish, write_wish
from tests.deploy.test_fleet import FakeCluster

SERVING = Sight("running", "10.0.0.1", working=True, phase="serving")


class View:
    def __init__(self) -> None:
        self.notes: list[str] = []

    def doing(self, what: str) -> contextlib.AbstractContextManager[object]:
        self.note(what)
        return contextlib.nullcontext()

    def note(self, text: str) -> None:
        self.notes.append(text)

    def update(self, status: dict[str, Any]) -> None: ...


class Scene:
    """A crew whose Ray is a `FakeCluster` that `failures` times does not start."""

    def __init__(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failures: int = 0, **recipe: object) -> None:
        self.run, self.view, self.cluster = RunDir(tmp_path / "run").create(), View(), FakeCluster()
        self.now, self.opened, self.failures = 100.0, 0, failures
        monkeypatch.setattr(crew_module.time, "monotonic", lambda: self.now)
        monkeypatch.setattr(Crew, "open", lambda crew: self.open(crew))
        self.crew = Crew(Site(parse_recipe(recipe, "test")), self.run, tmp_path, self.view)
        self.crew.__enter__()

    def open(self, crew: Crew) -> None:
        self.opened += 1
        if self.opened <= self.failures:
            raise OSError("Ray did not start")
        crew.fleet = Fleet(self.cluster, 60.0, self.view.note)

    def tick(self, **status: object) -> list[Member]:
        self.now += 1.0
        self.crew.tick(status)
        self.cluster.sights |= dict.fromkeys(self.cluster.sights, SERVING)
        return read_members(self.run)


def test_recipes_number_is_the_first_wish(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scene = Scene(tmp_path, monkeypatch, actor={"count": 2})
    assert read_wish(scene.run) == Wish(2, "the recipe")
    assert [member.state for member in scene.tick()] == ["pending", "pending"]
    assert [member.serves for member in scene.tick()] == [True, True]


def test_changed_wish_is_said_with_who_wished(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scene = Scene(tmp_path, monkeypatch)
    scene.tick()
    write_wish(scene.run, Wish(3, "tandem scale"))
    assert len(scene.tick()) == 3
    assert scene.view.notes == ["1 -> 3 actors (tandem scale)"]
    assert scene.crew.figures()["actors_wanted"] == 3
    scene.run.scale.write_text("{")
    assert len(scene.tick()) == 3, "what cannot be read changes nothing"


def test_ray_is_left_alone_until_somebody_is_wanted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scene = Scene(tmp_path, monkeypatch, actor={"count": 0})
    scene.tick()
    assert scene.opened == 0
    write_wish(scene.run, Wish(1, "tandem scale"))
    scene.tick()
    assert (scene.opened, scene.cluster.started) == (1, [0])


def test_ray_that_fails_is_tried_again_after_a_pause(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scene = Scene(tmp_path, monkeypatch, failures=1)
    for _ in range(5):
        assert scene.tick() == []
    assert scene.opened == 1
    assert scene.view.notes == ["Ray does not do what it should; tried again in 10 s: Ray did not start"]
    scene.now += crew_module.PAUSE_S
    assert len(scene.tick()) == 1


def test_autoscaling_writes_its_proposal_as_a_wish(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scene = Scene(tmp_path, monkeypatch, autoscale={"enabled": True, "window_steps": 1, "patience": 1})
    waiting = {"step_s": 10.0, "wait_s": 5.0, "actors_busy_share": 1.0, "actors_serving": 1.0}
    scene.tick()
    assert len(scene.tick(step=1, **waiting)) == 2
    wish = read_wish(scene.run)
    assert wish is not None
    assert wish.actors == 2
    assert wish.by.startswith("autoscale: in 1 steps the learner waited 50% of the time")
    assert scene.view.notes == [f"1 -> 2 actors ({wish.by})"]


def test_wish_left_at_the_desk_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scene = Scene(tmp_path, monkeypatch)
    said: list[Any] = []

    class Desk:
        def exchange(self, *laid: object) -> Wish | None:
            said.append(laid)
            return Wish(2, "tandem scale") if len(said) == 1 else None

    scene.tick()
    scene.crew.desk = Desk()  # type: ignore[assignment]
    scene.tick()
    assert read_wish(scene.run) == Wish(2, "tandem scale")
    assert len(scene.tick()) == 2
    address, wanted, members = said[-1]
    assert (address, wanted, [member.name for member in members]) == (None, 2, ["actor-0"]), "no learner listens yet"
