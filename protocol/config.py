"""The recipe: one TOML file that says everything about a run. Both sides, the launcher and `--resume` read it here.

Models are frozen and refuse unknown keys. What one key alone cannot show to be wrong is checked in `Recipe.check`;
what needs files or the model's own configuration is checked by the launcher before anything starts
(`deploy/preflight.py`). Runtime state is never stored here.
"""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from protocol.errors import RecipeError

Positive = Annotated[int, Field(ge=1)]
PositiveFloat = Annotated[float, Field(gt=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]
TomlArray = Field(strict=False)
"""Sections are strict (a string is no number), but TOML has no tuples: an array becomes one, its items stay strict."""

LOOPBACK_HOSTS = ("127.0.0.1", "localhost", "::1")

RESUMABLE_KEYS = (
    "steps", "optim.lr", "optim.schedule", "optim.min_lr_ratio", "optim.max_grad_norm", "checkpoint.every_steps",
    "checkpoint.keep", "actor.count", "actor.max_running", "actor.kv_cache_gib", "actor.threads", "actor.gpus",
    "learner.microbatch_tokens", "learner.threads", "learner.device", "wire.port", "eval.examples_shown",
)  # fmt: skip
"""Keys that `--resume` may change: none of them alters what the finished steps meant."""


class Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False, validate_default=True)


class ModelConfig(Section):
    path: str = "bundled"
    """Local directory, hub id, or "bundled" (SmolLM2-135M-Instruct, built from a package, no hub needed)."""
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Compute type of the learner, type of the weights on the wire and in the engine. Master weights are float32."""
    max_model_len: Positive = 256
    """Tokens of prompt and completion together, in the engine."""
    attention: Literal["sdpa", "eager"] = "sdpa"


class TaskConfig(Section):
    name: Literal["arithmetic", "jsonl"] = "arithmetic"
    max_operand: Positive = 20
    """arithmetic: a and b are drawn from 0..max_operand."""
    train: str = ""
    """jsonl: file with one {"prompt", "answer"} object a line (and "solution", for a warm start)."""
    heldout: str = ""
    """jsonl: file of the held-out problems."""
    grader: Literal["integer", "exact"] = "integer"
    """integer: the answer must be the only integer at the end; exact: the stripped text must be equal."""
    system_prompt: str = ""
    """Put before the prompt through the model's chat template."""

    @model_validator(mode="after")
    def _files(self) -> TaskConfig:
        if self.name == "jsonl" and not self.train:
            raise ValueError('train: found "", allowed: a file of problems, since task.name = "jsonl"')
        return self


class RolloutConfig(Section):
    groups_per_step: Positive = 16
    group_size: Positive = 8
    max_tokens: Positive = 16
    temperature: Annotated[float, Field(gt=0, le=10)] = 1.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    top_k: Annotated[int, Field(ge=0)] = 0
    min_p: Fraction = 0.0
    accept_sampling_bias: bool = False
    """Must be true to train on completions drawn with top_p, top_k or min_p: the gradient is then biased."""
    stop: Annotated[tuple[str, ...], TomlArray] = ()
    max_lag: Annotated[int, Field(ge=0, le=64)] = 1
    """Steps by which the weights that began a completion may be behind. 0: strictly on-policy, no overlap."""
    max_attempts: Positive = 5
    """A ticket that failed so often is counted as failed and left out."""
    straggler_s: PositiveFloat = 120.0
    """A lease older than this that blocks the next batch is cancelled and issued again."""


class GrpoConfig(Section):
    advantage: Literal["group_mean_std", "group_mean", "leave_one_out", "batch_normalized", "none"] = "group_mean_std"
    """GRPO; Dr. GRPO; RLOO; REINFORCE++; the reward itself, which goes with loss = no_baseline alone."""
    std_eps: PositiveFloat = 1e-4
    loss: Literal["no_baseline", "reinforce_with_baseline", "grpo_clip", "gspo", "cispo"] = "grpo_clip"
    """The first two know no ratio; gspo: the sequence's ratio; cispo: the weight is clipped, no gradient is lost."""
    clip_low: Fraction = 0.2
    clip_high: PositiveFloat = 0.2
    aggregation: Literal["token_mean", "sequence_mean", "constant"] = "token_mean"
    """token_mean: over the batch's tokens (DAPO); sequence_mean: per sequence, then over sequences (GRPO); constant:
    by `max_tokens` (Dr. GRPO)."""
    importance_cap: Annotated[float, Field(ge=0)] = 2.0
    """Truncated importance sampling: weight per token min(exp(old - engine), cap). 0: no correction."""
    skip_zero_advantage: bool = True
    """Leave completions whose advantage is exactly 0 out of forward and backward: their gradient is 0."""


class OptimConfig(Section):
    lr: PositiveFloat = 1e-5
    betas: Annotated[tuple[Fraction, Fraction], TomlArray] = (0.9, 0.95)
    eps: PositiveFloat = 1e-8
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    max_grad_norm: PositiveFloat = 1.0
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    schedule: Literal["constant", "cosine"] = "constant"
    min_lr_ratio: Fraction = 0.1
    """cosine: the last step's learning rate as a share of `lr`."""
    epochs: Positive = 1
    """Passes over one rollout batch."""
    minibatches: Positive = 1
    """Optimizer updates a pass."""


class WarmStartConfig(Section):
    examples: Annotated[int, Field(ge=0)] = 0
    """Demonstrations of the SFT phase before the first step; 0: no warm start."""
    epochs: Positive = 2
    batch_size: Positive = 16
    lr: PositiveFloat = 2e-5


class EvalConfig(Section):
    prompts: Annotated[int, Field(ge=0)] = 64
    """Held-out problems; 0: no evaluation."""
    samples: Positive = 4
    """Completions a problem."""
    temperature: PositiveFloat = 1.0
    max_tokens: Annotated[int, Field(ge=0)] = 0
    """0: as in `rollout`."""
    examples_shown: Annotated[int, Field(ge=0)] = 4


class LearnerConfig(Section):
    device: Literal["auto", "cpu", "cuda"] = "auto"
    microbatch_tokens: Positive = 2048
    """Budget of packed tokens (padding included) of one forward and backward pass."""
    threads: Annotated[int, Field(ge=0)] = 0
    """CPU threads of the mathematics; 0: all cores, half of them while engines generate beside it."""
    gradient_checkpointing: bool = False


class ActorConfig(Section):
    count: Annotated[int, Field(ge=0)] = 1
    """Actors that the launcher starts; 0: actors are started by hand (`tandem actor`)."""
    engine: Literal["vllm", "fake"] = "vllm"
    max_running: Positive = 64
    """Completions that the engine runs at once."""
    kv_cache_gib: PositiveFloat = 1.0
    """CPU engine: memory of the KV cache."""
    gpu_memory_utilization: Fraction = 0.85
    """GPU engine: share of the GPU that vLLM may take (of the fraction given to the actor)."""
    threads: Annotated[int, Field(ge=0)] = 0
    """CPU engine: OpenMP threads; 0: all cores."""
    cpus: Annotated[float, Field(gt=0)] = 1.0
    """CPUs that each actor asks of Ray."""
    gpus: Annotated[float, Field(ge=0)] = 0.0
    """GPUs that each actor asks of Ray; 0: one where there are two or more, half of one where there is one."""
    enforce_eager: bool = True
    start_timeout_s: PositiveFloat = 600.0
    grader_workers: Positive = 1
    grader_timeout_s: PositiveFloat = 5.0
    fake_token_s: Annotated[float, Field(ge=0)] = 0.0
    """fake engine: seconds that one token takes (all completions at once), asleep."""


class WeightsConfig(Section):
    kv: Literal["keep", "recompute"] = "keep"
    """What running completions do with their keys and values at an update."""
    chunk_mib: Positive = 8
    window: Positive = 2


class CheckpointConfig(Section):
    every_steps: Annotated[int, Field(ge=0)] = 0
    """0: only at the end and on interruption."""
    keep: Positive = 2


class WireConfig(Section):
    host: str = "127.0.0.1"
    port: Annotated[int, Field(ge=0, le=65535)] = 0
    """Port of the work socket; 0: a free one. Bulk and news always take free ones."""
    heartbeat_s: PositiveFloat = 1.0
    dead_after_s: PositiveFloat = 15.0
    """Silence after which an actor's leases are issued again."""
    lost_learner_s: PositiveFloat = 120.0
    """Silence after which an actor gives up and exits."""
    max_frame_mib: Annotated[int, Field(ge=1, le=64)] = 64
    journal_fsync: bool = False
    """True: an acknowledged group survives the machine; False: it survives the process."""

    @model_validator(mode="after")
    def _loopback(self) -> WireConfig:
        check_loopback(self.host)
        if self.dead_after_s < 3 * self.heartbeat_s:
            raise ValueError(
                f"dead_after_s: found {self.dead_after_s}, allowed: at least 3 x heartbeat_s = {3 * self.heartbeat_s}"
            )
        return self


def check_loopback(host: str) -> None:
    """Raise ValueError unless `host` is a loopback address: sockets are not yet authenticated."""
    numbers = host.split(".")
    in_127 = numbers[0] == "127" and len(numbers) == 4 and all(number.isdecimal() for number in numbers)
    if host not in LOOPBACK_HOSTS and not in_127:
        raise ValueError(
            f"host: found {host!r}, allowed: a loopback address ({', '.join(LOOPBACK_HOSTS)}). Sockets carry no keys"
            " yet, so they are not opened to a network; use an SSH tunnel between machines"
        )


class Recipe(Section):
    name: str = Field(default="run", pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")
    method: Literal["grpo"] = "grpo"
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0
    steps: Positive = 15
    model: ModelConfig = ModelConfig()
    task: TaskConfig = TaskConfig()
    rollout: RolloutConfig = RolloutConfig()
    grpo: GrpoConfig = GrpoConfig()
    optim: OptimConfig = OptimConfig()
    warm_start: WarmStartConfig = WarmStartConfig()
    eval: EvalConfig = EvalConfig()
    learner: LearnerConfig = LearnerConfig()
    actor: ActorConfig = ActorConfig()
    weights: WeightsConfig = WeightsConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    wire: WireConfig = WireConfig()

    @model_validator(mode="after")
    def check(self) -> Recipe:
        """Refuse combinations that no single key shows."""
        rollout = self.rollout
        grpo = self.grpo
        if rollout.group_size < 2 and grpo.advantage not in ("none", "batch_normalized"):
            raise ValueError(
                f"rollout.group_size: found {rollout.group_size}, allowed: at least 2 with grpo.advantage ="
                f' "{grpo.advantage}" (a group of one has no baseline)'
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
        return self

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
    return {key: (before[key], after[key]) for key in before if before[key] != after[key]}


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
