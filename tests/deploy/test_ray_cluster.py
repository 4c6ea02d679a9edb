"""How GPUs are divided between the two sides; the rest of the launcher is tested by whole runs (tests/test_cli.py)."""

from __future__ import annotations

import pytest

from deploy.ray_cluster import share_gpus, split_gpus, visible_gpus
from protocol.config import Recipe, parse_recipe


def recipe(**actor: object) -> Recipe:
    return parse_recipe({"actor": actor}, "test")


@pytest.mark.parametrize(
    ("visible", "actors", "learner"),
    [(["0"], ["0"], ["0"]), (["0", "1"], ["0"], ["1"]), (["3", "5", "7"], ["3", "5"], ["7"])],
)
def test_split_gpus_gives_the_learner_the_last_of_several(
    visible: list[str], actors: list[str], learner: list[str]
) -> None:
    assert split_gpus(visible) == (actors, learner)


@pytest.mark.parametrize(
    ("actor", "gpus", "share"),
    [
        ({}, 0, 0.0),
        ({}, 1, 0.5),
        ({"count": 2}, 1, 0.25),
        ({}, 2, 1.0),
        ({"gpus": 2.0}, 4, 2.0),
        ({"engine": "fake"}, 2, 0.0),
    ],
)
def test_share_gpus_fills_in_what_the_recipe_leaves_open(actor: dict[str, object], gpus: int, share: float) -> None:
    assert share_gpus(recipe(**actor), gpus).actor.gpus == share


def test_visible_gpus_keeps_the_names_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-aa, GPU-bb")
    assert visible_gpus(2) == ["GPU-aa", "GPU-bb"]
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    assert visible_gpus(2) == ["0", "1"]
