"""How GPUs are divided between the two sides, and where Ray's files lie; whole runs are in tests/test_cli.py."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest

from actor.staging import Staging, engine_prefix
from deploy.launch import remove_left_over
from deploy.ray_cluster import RAY_DIR_PREFIX, _short_directory, share_gpus, visible_gpus
from protocol.config import Recipe, parse_recipe
from protocol.errors import RecipeError
from protocol.rundir import RunDir


def recipe(device: str = "auto", processes: int = 1, **actor: object) -> Recipe:
    return parse_recipe({"actor": actor, "learner": {"device": device, "processes": processes}}, "test")


@pytest.mark.parametrize(
    ("device", "actor", "visible", "actors", "learner", "each"),
    [
        ("auto", {}, [], [], [], 0.0),
        ("auto", {}, ["0"], ["0"], ["0"], 0.5),
        ("auto", {"count": 2}, ["0"], ["0"], ["0"], 0.25),
        ("auto", {"gpus": 0.3}, ["0"], ["0"], ["0"], 0.3),
        ("cpu", {}, ["0"], ["0"], [], 1.0),
        ("auto", {}, ["0", "1"], ["0"], ["1"], 1.0),
        ("auto", {"count": 2}, ["0", "1"], ["0"], ["1"], 0.5),
        ("auto", {"count": 3}, ["3", "5", "7"], ["3", "5"], ["7"], 0.5),
        ("auto", {"gpus": 2.0}, ["3", "5", "7"], ["3", "5"], ["7"], 2.0),
        ("cpu", {"count": 2}, ["0", "1"], ["0", "1"], [], 1.0),
        ("auto", {"engine": "fake"}, ["0", "1"], [], ["1"], 0.0),
        ("auto", {"count": 0}, ["0"], ["0"], ["0"], 0.5),
        ("auto", {"processes": 2}, ["3", "5", "7", "8"], ["3", "5"], ["7", "8"], 1.0),
        ("auto", {"processes": 3}, ["3", "5", "7", "8"], ["3"], ["5", "7", "8"], 1.0),
        ("auto", {"processes": 2, "engine": "fake"}, ["0", "1"], [], ["0", "1"], 0.0),
        ("cpu", {"processes": 2}, [], [], [], 0.0),
    ],
)
def test_share_gpus_divides_what_is_there(
    device: str, actor: dict[str, object], visible: list[str], actors: list[str], learner: list[str], each: float
) -> None:
    shares = share_gpus(recipe(device, **actor), visible)
    assert (shares.actors, shares.learner, shares.each_actor) == (actors, learner, each)


@pytest.mark.parametrize(
    ("actor", "visible", "complaint"),
    [
        ({"gpus": 1.0}, [], "found 1 for each of 1 actors, allowed here: what fits 0 GPUs"),
        ({"gpus": 2.0}, ["0", "1"], "what fits 1 GPUs beside those of the learner"),
        ({"gpus": 1.0, "count": 2, "processes": 2}, ["0", "1", "2"], "what fits 1 GPUs beside those of the learner"),
        ({"processes": 2}, [], "learner.processes: found 2, allowed here: 1, since no GPU is visible"),
        ({"processes": 2}, ["0"], "learner.processes: found 2, allowed here: at most 1 of 1 GPUs"),
        ({"processes": 3}, ["0", "1", "2"], "found 3, allowed here: at most 2 of 3 GPUs, one of which the actors want"),
        ({"gpus": 0.6, "count": 2}, ["0"], "found 0.6 for each of 2 actors"),
        ({"gpus": 0.6, "count": 3}, ["0", "1", "2"], "found 0.6 for each of 3 actors"),
        ({"gpus": 1.5}, ["0", "1", "2", "3"], "found 1.5, allowed: up to 1, or a whole number"),
    ],
)
def test_share_gpus_refuses_what_does_not_fit(actor: dict[str, object], visible: list[str], complaint: str) -> None:
    with pytest.raises(RecipeError, match=complaint):
        share_gpus(recipe(**actor), visible)


def test_ray_lives_in_a_directory_whose_sockets_have_short_names(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "a-directory-of-a-batch-system"))
    directory = f"{_short_directory()}/{RAY_DIR_PREFIX}12345678"
    socket = f"{directory}/session_2026-11-22_13-00-57_984163_4194304/sockets/plasma_store"
    assert len(socket) <= 107
    monkeypatch.setattr(tempfile, "tempdir", "/var/tmp")
    assert _short_directory() == "/var/tmp"


def test_visible_gpus_keeps_the_names_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-aa, GPU-bb")
    assert visible_gpus(2) == ["GPU-aa", "GPU-bb"]
    assert visible_gpus(1) == ["GPU-aa"]
    assert visible_gpus(0) == [], "a name of a GPU that is not there"
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    assert visible_gpus(2) == ["0", "1"]


@pytest.mark.parametrize("name", ["demo", "d" * 64, "a demo [2]"])
def test_end_of_a_run_leaves_the_files_of_another_run_of_that_name(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str
) -> None:
    """Two checkouts that both run the demo: both runs are called "demo"."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    ours, theirs = (RunDir(tmp_path / user / name).create() for user in ("a", "b"))
    assert ours.label != theirs.label
    assert RunDir(ours.path).label == ours.label, "the same for every process of the run"
    staged = [
        tmp_path / name for run in (ours, theirs) for name in (Staging(run.label).name, f"{engine_prefix(run.label)}x")
    ]
    for directory in staged:
        directory.mkdir()
    remove_left_over(ours)
    assert [directory.exists() for directory in staged] == [False, False, True, True]
