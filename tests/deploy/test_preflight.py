"""What is refused before anything is started, with the key's name."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest

import deploy.preflight as module
from deploy.preflight import preflight
from protocol.config import Recipe
from protocol.errors import RecipeError
from tests.learner.test_loop import recipe_of


def refused(recipe: Recipe) -> str:
    """With which words."""
    with pytest.raises(RecipeError) as caught:
        preflight(recipe, lambda _: None)
    return str(caught.value)


def test_wandb_that_is_not_installed_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "find_spec", lambda name: None)
    text = refused(recipe_of(task={"grader": "integer"}, metrics={"wandb": "offline"}))
    assert text.startswith('metrics.wandb: found "offline"') and "pip install wandb" in text


def test_wandb_online_without_a_key_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pytest.importorskip("wandb", reason="wandb is not installed (deploy/requirements/dev.txt has it)")
    for name in [name for name in os.environ if name.startswith(("WANDB_", "NETRC"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    online = recipe_of(task={"grader": "integer"}, metrics={"wandb": "online"})
    text = refused(online)
    assert text.startswith('metrics.wandb: found "online", but no key is known here') and "wandb login" in text
    monkeypatch.setenv("WANDB_API_KEY", "short")
    assert "its key cannot be used" in refused(online)
    monkeypatch.setenv("WANDB_API_KEY", "0123456789" * 4)
    module.check_wandb(online)


def test_a_metrics_port_in_use_is_refused() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        recipe = recipe_of(task={"grader": "integer"}, metrics={"port": taken.getsockname()[1]})
        text = refused(recipe)
    assert text.startswith("metrics.port: found ") and "allowed: a free port, 0 for any" in text
