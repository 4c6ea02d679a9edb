"""How a joined cluster's GPUs are divided; joining itself is in tests/real."""

from __future__ import annotations

import pytest

from deploy.placement import Node
from deploy.site import cluster_shares, left_for_actors, this_machine
from protocol.config import Recipe, parse_recipe
from protocol.errors import RecipeError


def recipe(learner: dict[str, object] | None = None, **actor: object) -> Recipe:
    return parse_recipe({"actor": actor, "learner": learner or {}}, "test")


def nodes(here: float, *others: float) -> list[Node]:
    return [Node("10.0.0.1", 8, here, True), *(Node(f"10.0.0.{i}", 8, gpus) for i, gpus in enumerate(others, 2))]


@pytest.mark.parametrize(
    ("wanted", "cluster", "shares"),
    [
        (recipe(), nodes(0), (0.0, 0.0)),
        (recipe(), nodes(1), (0.5, 0.5)),
        (recipe(count=2), nodes(1), (0.5, 0.25)),
        (recipe({"device": "cpu"}, count=2), nodes(1), (0.0, 0.5)),
        (recipe(count=3), nodes(1, 4), (1.0, 1.0)),
        (recipe(count=3), nodes(0, 4), (0.0, 1.0)),
        (recipe(gpus=2.0), nodes(2, 4), (1.0, 2.0)),
        (recipe({"processes": 2}, count=4), nodes(2, 4), (2.0, 1.0)),
        (recipe(engine="fake"), nodes(2), (1.0, 0.0)),
    ],
)
def test_cluster_shares_give_the_learner_its_own(
    wanted: Recipe, cluster: list[Node], shares: tuple[float, float]
) -> None:
    assert cluster_shares(wanted, cluster) == shares


@pytest.mark.parametrize(("here", "allowed"), [(0.0, 1), (2.0, 2)])
def test_cluster_shares_refuse_more_processes_than_the_node_has_gpus(here: float, allowed: int) -> None:
    with pytest.raises(RecipeError, match=rf"learner\.processes: found 3, allowed here: at most {allowed}"):
        cluster_shares(recipe({"processes": 3}), nodes(here, 8))


def test_left_for_actors_takes_the_learners_part_off_its_own_node_only() -> None:
    here, other = nodes(1, 4)
    assert left_for_actors(here, 0.5) == Node("10.0.0.1", 8, 0.5, True)
    assert left_for_actors(other, 0.5) == other


def test_this_machine_without_gpus_changes_nothing() -> None:
    wanted = recipe({"device": "cpu"}, engine="fake")
    site = this_machine(wanted)
    assert (site.recipe, site.joined, site.learner_host, site.node_id) == (wanted, False, "", "")
