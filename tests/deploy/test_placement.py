"""How many actors a cluster holds, and what is said when it does not hold them; real clusters are in tests/real."""

from __future__ import annotations

import pytest

from deploy.placement import Node, check_room, room
from protocol.config import Recipe, parse_recipe
from protocol.errors import RecipeError

HEAD = Node("10.0.0.1", 8, 1, here=True)
WORKER = Node("10.0.0.2", 16, 4)


def recipe(**actor: object) -> Recipe:
    return parse_recipe({"actor": actor}, "test")


@pytest.mark.parametrize(
    ("node", "cpus", "gpus", "actors"),
    [
        (HEAD, 1.0, 0.0, 8),
        (HEAD, 3.0, 0.0, 2),
        (HEAD, 0.1, 0.0, 80),
        (HEAD, 1.0, 1.0, 1),
        (HEAD, 1.0, 2.0, 0),
        (WORKER, 1.0, 0.5, 8),
        (WORKER, 1.0, 0.3, 12),
        (WORKER, 1.0, 0.6, 4),
        (WORKER, 1.0, 2.0, 2),
        (WORKER, 8.0, 1.0, 2),
    ],
)
def test_room_counts_whole_actors_of_whole_gpus(node: Node, cpus: float, gpus: float, actors: int) -> None:
    assert room(node, cpus, gpus) == actors


def test_check_room_adds_up_the_nodes() -> None:
    check_room(recipe(count=5, gpus=1.0), [HEAD, WORKER])
    with pytest.raises(RecipeError, match=r"actor\.count: found 6 actors of 1 CPU and 1 GPU each") as caught:
        check_room(recipe(count=6, gpus=1.0), [HEAD, WORKER])
    assert "10.0.0.1 (this one) 8 CPUs and 1 GPU; 10.0.0.2 16 CPUs and 4 GPUs" in str(caught.value)
    assert "allowed: actor.count of at most 5, or actor.wait_for_room = true" in str(caught.value)


def test_check_room_says_what_would_fit_where_not_one_actor_does() -> None:
    with pytest.raises(RecipeError, match=r"allowed: actor\.cpus of at most 16 and actor\.gpus of at most 4, or"):
        check_room(recipe(count=1, gpus=8.0), [HEAD, WORKER])


def test_check_room_lets_actors_wait_for_a_cluster_that_grows() -> None:
    check_room(recipe(count=6, gpus=1.0, wait_for_room=True), [HEAD])
