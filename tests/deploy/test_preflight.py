"""What is refused before anything is started, with the key's name."""

from __future__ import annotations

import socket

import pytest

from deploy.preflight import preflight
from protocol.errors import RecipeError
from tests.learner.test_loop import recipe_of


def test_a_metrics_port_in_use_is_refused() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        recipe = recipe_of(task={"grader": "integer"}, metrics={"port": taken.getsockname()[1]})
        with pytest.raises(RecipeError, match=r"^metrics\.port: found \d+, .* allowed: a free port, 0 for any"):
            preflight(recipe, lambda _: None)
