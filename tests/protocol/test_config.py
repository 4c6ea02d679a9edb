"""The recipe: what is refused, with which words, what `--set` changes and what a resumed run may change."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from protocol.config import (
    RESUMABLE_KEYS,
    Recipe,
    apply_override,
    changed_keys,
    check_resumable,
    load_recipe,
    parse_recipe,
)
from protocol.errors import RecipeError
from protocol.sections import RolloutConfig

RECIPES = sorted((Path(__file__).resolve().parents[2] / "recipes").glob("*.toml"))


def refusal(**data: Any) -> str:
    with pytest.raises(RecipeError) as caught:
        parse_recipe(data, "r.toml")
    return str(caught.value)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.name)
def test_recipe_in_the_repository_is_valid(path: Path) -> None:
    assert load_recipe(path).name == path.stem


def test_recipes_were_found() -> None:
    assert "demo.toml" in [path.name for path in RECIPES]


def test_recipe_without_keys_has_the_defaults() -> None:
    recipe = parse_recipe({}, "r.toml")
    assert recipe == Recipe()
    assert (recipe.steps, recipe.rollout.group_size, recipe.wire.host) == (15, 8, "auto")


def test_recipe_is_frozen() -> None:
    with pytest.raises(ValueError, match="frozen"):
        Recipe().rollout.max_lag = 3  # type: ignore[misc]


@pytest.mark.parametrize(
    ("data", "key", "allowed"),
    [
        ({"stepz": 3}, "stepz", "steps"),
        ({"rollout": {"groupsize": 8}}, "rollout.groupsize", "group_size"),
        ({"wire": {"Port": 1}}, "wire.Port", "port"),
    ],
)
def test_unknown_key_is_refused_with_the_keys_of_its_section(data: dict[str, Any], key: str, allowed: str) -> None:
    text = refusal(**data)
    assert text.startswith(f"r.toml: {key}: unknown key; allowed here: ")
    assert allowed in text.partition("allowed here: ")[2].split(", ")


@pytest.mark.parametrize(
    ("data", "key", "found"),
    [
        ({"steps": "15"}, "steps", "'15'"),
        ({"steps": True}, "steps", "True"),
        ({"steps": 1.5}, "steps", "1.5"),
        ({"steps": 3.0}, "steps", "3.0"),
        ({"steps": -1}, "steps", "-1"),
        ({"name": 7}, "name", "7"),
        ({"name": "../up"}, "name", "'../up'"),
        ({"model": "bundled"}, "model", "'bundled'"),
        ({"model": {"dtype": "float16"}}, "model.dtype", "'float16'"),
        ({"optim": {"lr": "1e-5"}}, "optim.lr", "'1e-5'"),
        ({"optim": {"lr": float("nan")}}, "optim.lr", "nan"),
        ({"optim": {"lr": float("inf")}}, "optim.lr", "inf"),
        ({"optim": {"lr": -1.0}}, "optim.lr", "-1.0"),
        ({"optim": {"betas": [0.9, 0.95, 1]}}, "optim.betas", "[0.9, 0.95, 1]"),
        ({"optim": {"betas": [0.9, "0.95"]}}, "optim.betas.1", "'0.95'"),
        ({"rollout": {"stop": "x"}}, "rollout.stop", "'x'"),
        ({"rollout": {"stop": [1]}}, "rollout.stop.0", "1"),
        ({"learner": {"gradient_checkpointing": 1}}, "learner.gradient_checkpointing", "1"),
        ({"wire": {"port": 65536}}, "wire.port", "65536"),
    ],
)
def test_wrong_type_or_range_is_refused_naming_key_and_value(data: dict[str, Any], key: str, found: str) -> None:
    text = refusal(**data)
    assert text.startswith(f"r.toml: {key}: found {found}, allowed: ")
    assert not text.endswith("allowed: ")


def test_toml_values_of_the_right_meaning_are_taken() -> None:
    recipe = parse_recipe(
        {"optim": {"lr": 1, "betas": [0, 0.5]}, "rollout": {"stop": ["a", "b"], "temperature": 2}}, "r.toml"
    )
    assert recipe.optim.betas == (0.0, 0.5)
    assert recipe.rollout.stop == ("a", "b")
    assert (recipe.optim.lr, recipe.rollout.temperature) == (1.0, 2.0)


@pytest.mark.parametrize(
    ("data", "parts"),
    [
        ({"rollout": {"group_size": 1}}, ("rollout.group_size: found 1", "at least 2")),
        ({"optim": {"minibatches": 3}}, ("optim.minibatches: found 3", "divisor of rollout.groups_per_step = 16")),
        ({"optim": {"minibatches": 32}}, ("optim.minibatches: found 32", "divisor")),
        ({"rollout": {"max_tokens": 256}}, ("rollout.max_tokens: found 256", "less than model.max_model_len = 256")),
        ({"rollout": {"top_p": 0.9}}, ("rollout.top_p: found 0.9", "rollout.accept_sampling_bias = true")),
        ({"rollout": {"top_k": 5}}, ("rollout.top_k: found 5", "accept_sampling_bias")),
        ({"rollout": {"min_p": 0.1}}, ("rollout.min_p: found 0.1", "accept_sampling_bias")),
        ({"actor": {"max_running": 7}}, ("actor.max_running: found 7", "at least rollout.group_size = 8")),
        (
            {"warm_start": {"examples": 8, "batch_size": 16}},
            ("warm_start.batch_size: found 16", "at most warm_start.examples = 8"),
        ),
        ({"task": {"name": "jsonl"}}, ("task.train: found", 'task.name = "jsonl"', "allowed: a file")),
        ({"wire": {"host": "0.0.0.0"}}, ("wire.host: found '0.0.0.0'", 'allowed: "auto"', "no wildcard")),
        ({"wire": {"port": 65534}}, ("wire.port: found 65534", "at most 65533: bulk and news take the two ports")),
        ({"wire": {"dead_after_s": 1.0}}, ("wire.dead_after_s: found 1.0", "at least 3 x heartbeat_s = 3.0")),
    ],
)
def test_impossible_combination_is_refused_with_what_is_allowed(data: dict[str, Any], parts: tuple[str, ...]) -> None:
    text = refusal(**data)
    assert text.startswith(f"r.toml: {parts[0]}")
    for part in parts:
        assert part in text


def test_sampling_bias_is_taken_when_it_is_accepted_by_name() -> None:
    assert RolloutConfig(top_p=0.9, accept_sampling_bias=True).top_p == 0.9
    recipe = parse_recipe({"rollout": {"top_k": 4, "accept_sampling_bias": True}}, "r.toml")
    assert recipe.rollout.top_k == 4


def test_every_fault_has_a_line_of_its_own() -> None:
    lines = refusal(steps=-1, rollout={"bogus": 1, "max_lag": -1}).splitlines()
    assert [line.split(": ")[1] for line in lines] == ["steps", "rollout.max_lag", "rollout.bogus"]


@pytest.mark.parametrize(("max_lag", "limit"), [(0, 0), (1, 1), (2, 3)])
def test_token_lag_that_no_token_reaches_is_refused(max_lag: int, limit: int) -> None:
    assert f"grpo.max_token_lag: found {limit}, allowed: -1 (off), or less than rollout.max_lag = {max_lag}" in refusal(
        rollout={"max_lag": max_lag}, grpo={"max_token_lag": limit}
    )
    recipe = parse_recipe({"rollout": {"max_lag": limit + 1}, "grpo": {"max_token_lag": limit}}, "r.toml")
    assert recipe.grpo.max_token_lag == limit


@pytest.mark.parametrize(
    ("engine", "parity", "every"), [("vllm", "stop", 7), ("vllm", "warn", 7), ("vllm", "off", 0), ("fake", "stop", 0)]
)
def test_engines_are_probed_unless_their_logprobs_mean_nothing(engine: str, parity: str, every: int) -> None:
    recipe = parse_recipe({"actor": {"engine": engine}, "weights": {"parity": parity, "parity_every": 7}}, "r.toml")
    assert recipe.parity_every == every


# --- files and --set ---


def test_load_recipe_reads_toml_and_applies_overrides_in_order(tmp_path: Path) -> None:
    path = tmp_path / "r.toml"
    path.write_text('name = "x"\n[rollout]\nmax_lag = 0\n')
    recipe = load_recipe(
        path, ("rollout.max_lag=2", "optim.lr=3e-6", "name=run-7", 'rollout.stop=["a"]', "steps=3", "steps=4")
    )
    assert (recipe.rollout.max_lag, recipe.optim.lr, recipe.name, recipe.steps) == (2, 3e-6, "run-7", 4)
    assert recipe.rollout.stop == ("a",)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("steps", "--set steps: expected KEY=VALUE"),
        ("=4", "--set =4: expected KEY=VALUE"),
        ("steps.x=1", "--set steps.x=1: steps is a value, not a section"),
        ("rollout.nope=1", "rollout.nope: unknown key"),
        ("steps=many", "steps: found 'many', allowed: "),
        ("nope.deep=1", "nope: unknown key"),
    ],
)
def test_wrong_override_is_refused(tmp_path: Path, override: str, message: str) -> None:
    path = tmp_path / "r.toml"
    path.write_text("steps = 3\n")
    with pytest.raises(RecipeError) as caught:
        load_recipe(path, (override,))
    assert message in str(caught.value)


def test_missing_and_broken_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"none\.toml: no such file"):
        load_recipe(tmp_path / "none.toml")
    (tmp_path / "bad.toml").write_text("steps = = 3")
    with pytest.raises(RecipeError, match=r"bad\.toml: not a TOML file"):
        load_recipe(tmp_path / "bad.toml")
    (tmp_path / "binary.toml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(RecipeError, match=r"binary\.toml: not a TOML file"):
        load_recipe(tmp_path / "binary.toml")


def test_apply_override_makes_sections_that_are_missing() -> None:
    data: dict[str, Any] = {}
    apply_override(data, "wire.port=5")
    assert data == {"wire": {"port": 5}}


# --- resume ---


def changed(old: Recipe, *overrides: str) -> Recipe:
    data = old.model_dump()
    for override in overrides:
        apply_override(data, override)
    return parse_recipe(data, "new")


def test_resumable_keys_exist() -> None:
    keys = set()
    for section, value in Recipe().model_dump().items():
        keys |= {f"{section}.{key}" for key in value} if isinstance(value, dict) else {section}
    assert set(RESUMABLE_KEYS) <= keys


def test_resume_may_change_what_does_not_alter_finished_steps() -> None:
    old = Recipe()
    assert check_resumable(old, old) == {}
    new = changed(old, "steps=30", "optim.lr=2e-5", "actor.count=3", "wire.port=4000")
    assert check_resumable(old, new) == {
        "steps": (15, 30),
        "optim.lr": (1e-5, 2e-5),
        "actor.count": (1, 3),
        "wire.port": (0, 4000),
    }


@pytest.mark.parametrize(
    ("override", "key"),
    [
        ("seed=1", "seed"),
        ("rollout.group_size=4", "rollout.group_size"),
        ("rollout.temperature=0.7", "rollout.temperature"),
        ("grpo.loss=cispo", "grpo.loss"),
        ("task.max_operand=9", "task.max_operand"),
        ("model.path=elsewhere", "model.path"),
        ("optim.minibatches=2", "optim.minibatches"),
    ],
)
def test_resume_keeps_what_finished_steps_meant(override: str, key: str) -> None:
    old = Recipe()
    new = changed(old, override, "steps=30")
    assert set(changed_keys(old, new)) == {key, "steps"}
    with pytest.raises(RecipeError) as caught:
        check_resumable(old, new)
    kept, _, may_change = str(caught.value).partition("It may change: ")
    assert f"{key}: the run has " in kept
    assert "steps:" not in kept
    assert "optim.lr" in may_change


@pytest.mark.parametrize(
    ("recipe", "key"),
    [
        ({"method": "sft", "optim": {"epochs": 3}}, "optim.epochs"),
        ({"method": "expert_iteration", "optim": {"minibatches": 2}}, "optim.minibatches"),
        ({"method": "dpo", "grpo": {"kl_coef": 0.1}}, "grpo.kl_coef"),
        ({"method": "sft", "warm_start": {"examples": 16}}, "warm_start.examples"),
        ({"method": "eval", "steps": 3}, "steps"),
        ({"method": "eval", "eval": {"prompts": 0}}, "eval.prompts"),
        ({"method": "expert_iteration", "rollout": {"dynamic_sampling": True}}, "rollout.dynamic_sampling"),
        (
            {"rollout": {"dynamic_sampling": True}, "grpo": {"advantage": "batch_normalized"}},
            "rollout.dynamic_sampling",
        ),
        ({"eval": {"prompts": 0, "every_steps": 2}}, "eval.every_steps"),
        ({"steps": 0}, "steps"),
        ({"guard": {"policy": "rollback"}}, "checkpoint.every_steps"),
        ({"grpo": {"importance_mode": "mask", "importance_cap": 0.9}}, "grpo.importance_cap"),
        ({"grpo": {"importance_mode": "mask", "importance_floor": 1.0}}, "grpo.importance_cap"),
        ({"grpo": {"importance_floor": 0.5}}, "grpo.importance_floor"),
        ({"grpo": {"importance_level": "sequence", "importance_cap": 0.0}}, "grpo.importance_mode"),
        ({"grpo": {"importance_level": "sequence", "proximal": "engine"}}, "grpo.importance_mode"),
        ({"grpo": {"overlong_buffer": 4}}, "grpo.overlong_buffer"),
        ({"grpo": {"overlong": "penalty"}}, "grpo.overlong_buffer"),
        ({"rollout": {"max_filtered_per_step": 3}}, "rollout.max_filtered_per_step"),
        ({"method": "sft", "eval": {"max_tokens": 256}}, "eval.max_tokens"),
    ],
)
def test_what_would_do_nothing_or_nonsense_is_refused_by_name(recipe: dict[str, Any], key: str) -> None:
    with pytest.raises(RecipeError) as refused:
        parse_recipe(recipe, "r.toml")
    assert f"r.toml: {key}" in str(refused.value)


@pytest.mark.parametrize("method", ["sft", "dpo", "eval"])
def test_rollout_keys_stand_in_no_ones_way_who_rolls_nothing_out(method: str) -> None:
    rollout = {"group_size": 500, "top_p": 0.9, "max_tokens": 4000}
    parse_recipe({"method": method, "rollout": rollout, "eval": {"max_tokens": 16}}, "r.toml")
