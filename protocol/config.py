"""The recipe: one TOML file that says everything about a run. Both sides, the launcher and `--resume` read it here.

The sections and their keys are in `sections.py`. What one key alone cannot show to be wrong is checked in
`Recipe.check`; what needs files, graders or the model's own configuration is checked by the launcher before anything
starts (`deploy/preflight.py`).
"""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError, model_validator

from protocol.errors import RecipeError
from protocol.sections import (
    ActorConfig,
    AutoscaleConfig,
    CheckpointConfig,
    DpoConfig,
    EvalConfig,
    ExpertIterationConfig,
    GrpoConfig,
    GuardConfig,
    LearnerConfig,
    MetricsConfig,
    ModelConfig,
    OptimConfig,
    RolloutConfig,
    Section,
    SftConfig,
    TaskConfig,
    WarmStartConfig,
    WeightsConfig,
    WireConfig,
)

Method = Literal["grpo", "expert_iteration", "sft", "dpo", "eval"]
OFFLINE_METHODS = ("sft", "dpo")
"""Learn from a data set: without evaluation they need no actor."""
ROLLOUT_METHODS = ("grpo", "expert_iteration")
"""Learn from what the actors draw."""
DEFAULT_STEPS = 15

RESUMABLE_KEYS = (
    "steps", "token_budget", "optim.lr", "optim.schedule", "optim.min_lr_ratio", "optim.max_grad_norm",
    "checkpoint.every_steps", "checkpoint.keep", "actor.count", "actor.max_running", "actor.kv_cache_gib",
    "actor.threads", "actor.gpus", "actor.cpus", "actor.drain_s", "actor.wait_for_room",
    "autoscale.enabled", "autoscale.min_actors", "autoscale.max_actors", "autoscale.window_steps",
    "autoscale.patience", "learner.microbatch_tokens", "learner.packing", "learner.threads",
    "learner.device", "learner.processes", "wire.host", "wire.port", "wire.no_keys_on_trusted_network",
    "eval.examples_shown", "eval.every_steps", "eval.share", "guard.policy", "guard.lr_factor",
    "guard.max_rollbacks", "weights.chunk_mib", "weights.window", "weights.parity", "weights.parity_every",
    "weights.parity_nats", "weights.anchor_every", "metrics.serve", "metrics.host", "metrics.port",
    "metrics.engine_every_s", "metrics.sample_every_s", "metrics.keep_logprobs", "metrics.wandb",
    "metrics.wandb_project",
)  # fmt: skip
"""Keys that `--resume` may change: none of them alters what the finished steps meant."""


class Recipe(Section):
    name: str = Field(default="run", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")
    method: Method = "grpo"
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0
    steps: Annotated[int, Field(ge=0)] = DEFAULT_STEPS
    """sft, dpo: at most so many updates; 0, there the default: as many as the epochs make."""
    token_budget: Annotated[int, Field(ge=0)] = 0
    """Response tokens after which training ends with the step in hand: drawn ones (grpo, expert_iteration), or trained
    on (sft, dpo). 0: `steps` says how long."""
    model: ModelConfig = ModelConfig()
    task: TaskConfig = TaskConfig()
    rollout: RolloutConfig = RolloutConfig()
    grpo: GrpoConfig = GrpoConfig()
    expert_iteration: ExpertIterationConfig = ExpertIterationConfig()
    sft: SftConfig = SftConfig()
    dpo: DpoConfig = DpoConfig()
    optim: OptimConfig = OptimConfig()
    warm_start: WarmStartConfig = WarmStartConfig()
    eval: EvalConfig = EvalConfig()
    guard: GuardConfig = GuardConfig()
    learner: LearnerConfig = LearnerConfig()
    actor: ActorConfig = ActorConfig()
    autoscale: AutoscaleConfig = AutoscaleConfig()
    weights: WeightsConfig = WeightsConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    metrics: MetricsConfig = MetricsConfig()
    wire: WireConfig = WireConfig()

    @model_validator(mode="before")
    @classmethod
    def _default_steps(cls, data: Any) -> Any:
        """What runs over a data set runs over all of it, unless told otherwise; an evaluation trains nothing."""
        if isinstance(data, dict) and data.get("method") in (*OFFLINE_METHODS, "eval"):
            return {"steps": 0} | data
        return data

    @model_validator(mode="after")
    def check(self) -> Recipe:
        """Refuse combinations that no single key shows."""
        self._check_method()
        if self.method == "grpo":
            self._check_grpo()
        self._check_sampling()
        self._check_sizes()
        return self

    def _check_method(self) -> None:
        if self.method in ROLLOUT_METHODS and not self.steps:
            raise ValueError(f'steps: found 0, allowed with method = "{self.method}": 1 or more')
        if self.method == "eval":  # keys of training stand in nobody's way
            if self.steps:
                raise ValueError(f'steps: found {self.steps}, allowed with method = "eval": 0, it trains nothing')
            if not self.eval.wanted:
                raise ValueError('eval.prompts: found 0, allowed with method = "eval": 1 or more, or "all"')
            return
        if self.warm_start.examples and self.method not in ROLLOUT_METHODS:
            raise ValueError(
                f"warm_start.examples: found {self.warm_start.examples}, allowed with method = "
                f'"{self.method}": 0, a warm start goes before {" or ".join(ROLLOUT_METHODS)}'
            )
        for key, value in (
            ("rollout.dynamic_sampling", self.rollout.dynamic_sampling),
            ("grpo.kl_coef", self.grpo.kl_coef),
        ):
            if value and self.method != "grpo":
                raise ValueError(f'{key}: found {value} with method = "{self.method}", allowed: with "grpo"')
        passes = {"optim.epochs": self.optim.epochs, "optim.minibatches": self.optim.minibatches}
        for key, count in passes.items():
            if count > 1 and self.method != "grpo":
                raise ValueError(
                    f'{key}: found {count} with method = "{self.method}", allowed: 1; [{self.method}] has epochs and'
                    " batch_size of its own"
                )
        if self.eval.every_steps and not self.eval.wanted:
            raise ValueError(
                f"eval.every_steps: found {self.eval.every_steps}, allowed with eval.prompts = 0: 0, there is nothing"
                " to evaluate"
            )
        if self.guard.policy == "rollback" and not self.checkpoint.every_steps:
            raise ValueError(
                'checkpoint.every_steps: found 0, allowed with guard.policy = "rollback": 1 or more, there must be'
                " checkpoints to go back to"
            )

    def _check_grpo(self) -> None:
        rollout, grpo = self.rollout, self.grpo
        if rollout.group_size < 2 and grpo.advantage not in ("none", "batch_normalized"):
            raise ValueError(
                f"rollout.group_size: found {rollout.group_size}, allowed: at least 2 with grpo.advantage ="
                f' "{grpo.advantage}" (a group of one has no baseline)'
            )
        if rollout.group_size < 2 and rollout.dynamic_sampling:
            raise ValueError("rollout.group_size: found 1, allowed with rollout.dynamic_sampling: at least 2")
        if grpo.advantage in ("none", "batch_normalized") and rollout.dynamic_sampling:
            raise ValueError(
                f'rollout.dynamic_sampling: found true with grpo.advantage = "{grpo.advantage}", allowed: false, since'
                " groups of equal rewards have a gradient there"
            )
        if (grpo.loss == "no_baseline") != (grpo.advantage == "none"):
            raise ValueError(
                f'grpo.advantage: found "{grpo.advantage}" with grpo.loss = "{grpo.loss}", allowed: "none" (the raw'
                ' rewards) with "no_baseline", and with no other loss'
            )
        sequences = rollout.groups_per_step * rollout.group_size
        if rollout.groups_per_step % self.optim.minibatches:
            raise ValueError(
                f"optim.minibatches: found {self.optim.minibatches}, allowed: a divisor of rollout.groups_per_step ="
                f" {rollout.groups_per_step} (a minibatch is made of whole groups; {sequences} completions a step)"
            )
        unclipped = grpo.loss in ("no_baseline", "reinforce_with_baseline")
        if unclipped and (updates := self.optim.epochs * self.optim.minibatches) > 1:
            raise ValueError(
                f'grpo.loss: found "{grpo.loss}" with {updates} updates a step (optim.epochs x optim.minibatches),'
                " allowed: 1, since it does not correct for the drift between them; the losses with a ratio do"
            )
        if unclipped and grpo.proximal == "engine":
            raise ValueError(f'grpo.proximal: found "engine" with grpo.loss = "{grpo.loss}", which has no ratio')
        self._check_importance()
        if rollout.max_filtered_per_step and not rollout.dynamic_sampling:
            raise ValueError(
                f"rollout.max_filtered_per_step: found {rollout.max_filtered_per_step}, allowed without"
                " dynamic_sampling: 0"
            )
        if grpo.overlong != "penalty" and grpo.overlong_buffer:
            raise ValueError(
                f'grpo.overlong_buffer: found {grpo.overlong_buffer}, allowed with overlong = "{grpo.overlong}": 0'
            )
        if grpo.overlong == "penalty" and not 0 < grpo.overlong_buffer <= rollout.max_tokens:
            raise ValueError(
                f'grpo.overlong_buffer: found {grpo.overlong_buffer}, allowed with overlong = "penalty": 1 to'
                f" rollout.max_tokens = {rollout.max_tokens}"
            )

    def _check_importance(self) -> None:
        grpo = self.grpo
        cap, floor, masks = grpo.importance_cap, grpo.importance_floor, grpo.importance_mode == "mask"
        if floor and not masks:
            raise ValueError(
                f"grpo.importance_floor: found {floor}, allowed with importance_mode ="
                f' "{grpo.importance_mode}": 0; "mask" has a lower bound'
            )
        off = "grpo.proximal is the engine" if grpo.proximal == "engine" else "importance_cap is 0" if not cap else ""
        if off and (masks or grpo.importance_level == "sequence"):
            raise ValueError(
                f"grpo.importance_mode, importance_level: found {grpo.importance_mode}, {grpo.importance_level},"
                f" allowed while {off}: the defaults, there are no importance weights"
            )
        if masks and not floor < 1 < cap:
            raise ValueError(
                f"grpo.importance_cap: found {cap} above importance_floor = {floor}, allowed with importance_mode ="
                ' "mask": bounds on either side of 1, the weight of a token that is on-policy'
            )

    def _check_sampling(self) -> None:
        if self.method not in ROLLOUT_METHODS:
            self._check_eval_sampling()
            return
        rollout = self.rollout
        biased = [k for k, off in (("top_p", 1.0), ("top_k", 0), ("min_p", 0.0)) if getattr(rollout, k) != off]
        if biased and not rollout.accept_sampling_bias:
            raise ValueError(
                f"rollout.{biased[0]}: found {getattr(rollout, biased[0])}, allowed: off, since the learner cannot see"
                " which tokens were cut away; rollout.accept_sampling_bias = true accepts the biased gradient"
            )
        if rollout.max_tokens >= self.model.max_model_len:
            raise ValueError(
                f"rollout.max_tokens: found {rollout.max_tokens}, allowed: less than model.max_model_len ="
                f" {self.model.max_model_len} (the prompt needs room, too)"
            )
        if rollout.group_size > self.actor.max_running:
            raise ValueError(
                f"actor.max_running: found {self.actor.max_running}, allowed: at least rollout.group_size ="
                f" {rollout.group_size} (a group runs as a whole)"
            )

        self._check_eval_sampling()

    def _check_eval_sampling(self) -> None:
        if not self.eval.temperature and self.eval.samples > 1:
            raise ValueError(
                f"eval.samples: found {self.eval.samples}, allowed with eval.temperature = 0: 1, greedy completions are"
                " all the same"
            )
        if self.eval.wanted and self.eval_sampling_tokens >= self.model.max_model_len:
            raise ValueError(
                f"eval.max_tokens: found {self.eval_sampling_tokens}, allowed: less than model.max_model_len ="
                f" {self.model.max_model_len} (the prompt needs room, too)"
            )

    def _check_sizes(self) -> None:
        scale = self.autoscale
        if scale.enabled and not scale.min_actors <= self.actor.count <= scale.max_actors:
            raise ValueError(
                f"actor.count: found {self.actor.count}, allowed with autoscale.enabled: {scale.min_actors} to"
                f" {scale.max_actors}, its limits"
            )
        if self.method == "grpo" and self.grpo.max_token_lag >= self.rollout.max_lag:
            raise ValueError(
                f"grpo.max_token_lag: found {self.grpo.max_token_lag}, allowed: -1 (off), or less than"
                f" rollout.max_lag = {self.rollout.max_lag} (no token is older)"
            )
        if self.weights.chunk_mib > self.wire.max_frame_mib:
            raise ValueError(
                f"weights.chunk_mib: found {self.weights.chunk_mib}, allowed: at most wire.max_frame_mib ="
                f" {self.wire.max_frame_mib} (a chunk is one frame)"
            )
        if self.warm_start.examples and self.warm_start.batch_size > self.warm_start.examples:
            raise ValueError(
                f"warm_start.batch_size: found {self.warm_start.batch_size}, allowed: at most warm_start.examples ="
                f" {self.warm_start.examples}"
            )

    @property
    def needs_actors(self) -> bool:
        """Whether anything is to be drawn from the model at all."""
        return self.method not in OFFLINE_METHODS or self.eval.wanted

    @property
    def parity_every(self) -> int:
        """Versions from one probe of an actor to the next; 0: none. The fake engine's logprobs are of no model."""
        return 0 if self.weights.parity == "off" or self.actor.engine == "fake" else self.weights.parity_every

    @property
    def eval_sampling_tokens(self) -> int:
        return self.eval.max_tokens or self.rollout.max_tokens


def load_recipe(path: Path, overrides: tuple[str, ...] = ()) -> Recipe:
    """Read a TOML recipe and apply `--set a.b=value` overrides (values are TOML; bare words are strings).

    Raises RecipeError, naming the file and every wrong key with what was found and what is allowed.
    """
    try:
        data = tomllib.loads(path.read_text())
    except FileNotFoundError:
        raise RecipeError(f"{path}: no such file") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path}: not a TOML file: {error}") from None
    for override in overrides:
        apply_override(data, override)
    return parse_recipe(data, str(path))


def apply_override(data: dict[str, Any], override: str) -> None:
    """Put one `a.b=value` into nested recipe data."""
    key, equals, text = override.partition("=")
    if not equals or not key.strip():
        raise RecipeError(f"--set {override}: expected KEY=VALUE, such as optim.lr=1e-5")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text
    *parents, leaf = key.strip().split(".")
    for parent in parents:
        data = data.setdefault(parent, {})
        if not isinstance(data, dict):
            raise RecipeError(f"--set {override}: {parent} is a value, not a section")
    data[leaf] = value


def parse_recipe(data: dict[str, Any], source: str) -> Recipe:
    """Validate recipe data. Raises RecipeError with one line for each fault."""
    try:
        return Recipe.model_validate(data)
    except ValidationError as error:
        raise RecipeError("\n".join(f"{source}: {_describe(fault)}" for fault in error.errors())) from None


def _describe(fault: Any) -> str:
    key = ".".join(str(part) for part in fault["loc"])
    if fault["type"] == "extra_forbidden":
        section: Any = Recipe
        for part in fault["loc"][:-1]:
            section = section.model_fields[part].annotation
        return f"{key}: unknown key; allowed here: {', '.join(sorted(section.model_fields))}"
    message = fault["msg"].removeprefix("Value error, ")
    if fault["type"] == "value_error":
        return f"{key}.{message}" if key else message
    return f"{key}: found {fault['input']!r}, allowed: {message[0].lower()}{message[1:]}"


def changed_keys(old: Recipe, new: Recipe) -> dict[str, tuple[Any, Any]]:
    """Dotted keys whose values differ, with (old, new)."""

    def flatten(data: dict[str, Any], prefix: str = "") -> dict[str, Any]:
        flat: dict[str, Any] = {}
        for key, value in data.items():
            flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
        return flat

    before, after = flatten(old.model_dump()), flatten(new.model_dump())
    return {key: (before.get(key), after.get(key)) for key in before | after if before.get(key) != after.get(key)}


def check_resumable(old: Recipe, new: Recipe) -> dict[str, tuple[Any, Any]]:
    """What `--resume` changes. Raises RecipeError if it changes more than it may."""
    changes = changed_keys(old, new)
    fixed = {key: pair for key, pair in changes.items() if key not in RESUMABLE_KEYS}
    if fixed:
        lines = [f"{key}: the run has {old!r}, found {new!r}" for key, (old, new) in fixed.items()]
        raise RecipeError(
            "a resumed run keeps these keys:\n  " + "\n  ".join(lines) + f"\nIt may change: {', '.join(RESUMABLE_KEYS)}"
        )
    return changes
