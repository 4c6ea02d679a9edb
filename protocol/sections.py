"""The recipe's sections: every key with its type, default and meaning. `config.py` joins them into a recipe.

Models are frozen and refuse unknown keys. Runtime state is never stored here. docs/recipe.md is the page for people.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

from protocol.addresses import AUTO, bind_address, check_host, check_port_number

Positive = Annotated[int, Field(ge=1)]
Count = Annotated[int, Field(ge=0)]
PositiveFloat = Annotated[float, Field(gt=0)]
NotNegative = Annotated[float, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]
TomlArray = Field(strict=False)
"""Sections are strict (a string is no number), but TOML has no tuples: an array becomes one, its items stay strict."""


def _count_or_all(value: Any) -> Any:
    """One fault for both types that are allowed, where a union would give two."""
    if value == "all" or (isinstance(value, int) and not isinstance(value, bool) and value >= 0):
        return value
    raise PydanticCustomError("count_or_all", 'an integer, 0 or more, or "all"')


CountOrAll = Annotated[int | Literal["all"], BeforeValidator(_count_or_all)]


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


class FieldsConfig(Section):
    """Which field of a record is what; an empty name: the usual ones are looked for."""

    prompt: str = ""
    input: str = ""
    """Text that belongs behind the prompt, as in Alpaca's records; beside "instruction" one called "input" is found."""
    answer: str = ""
    solution: str = ""
    """Response to demonstrate: the warm start's, and what method = "sft" trains on."""
    chosen: str = ""
    rejected: str = ""


class TaskConfig(Section):
    name: Literal["arithmetic", "jsonl", "gsm8k", "hub", "reasoning_gym"] = "arithmetic"
    max_operand: Positive = 20
    """arithmetic: a and b are drawn from 0..max_operand."""
    train: str = ""
    """jsonl, gsm8k: file of problems, one JSON object a line. gsm8k: else what `tandem data fetch gsm8k` brought."""
    heldout: str = ""
    """jsonl, gsm8k: file of the held-out problems; else they are split off `train` by seed."""
    dataset: str = ""
    """hub: id of the data set (owner/name). reasoning_gym: name of the task, such as "chain_sum"."""
    subset: str = ""
    """hub: the configuration of the data set, such as "main"."""
    train_split: str = "train"
    heldout_split: str = ""
    """hub: split of the held-out problems; else they are split off `train_split` by seed."""
    fields: FieldsConfig = FieldsConfig()
    options: dict[str, bool | int | float | str] = {}
    """reasoning_gym: the task's own settings, such as min_terms = 2."""
    size: Positive = 10_000
    """reasoning_gym: problems to generate for training."""
    grader: Annotated[str, Field(min_length=1)] = "integer"
    """Name of a grader, a weighted sum of graders' scores, or a user's function as module:function."""
    template: str = "chat"
    """The prompt: the model's chat template, "r1_zero", "question_only", or a file with {question} in it."""
    solution_format: Literal["plain", "r1_zero"] = "plain"
    """r1_zero: a demonstrated solution becomes "<think> reasoning </think> <answer> answer </answer>"."""
    over_long: Literal["refuse", "leave_out"] = "refuse"
    """Training problems and pairs that do not fit into model.max_model_len; held-out problems are never left out."""
    system_prompt: str = ""
    """chat: put before the prompt through the model's chat template."""

    @model_validator(mode="after")
    def _files(self) -> TaskConfig:
        if self.name == "jsonl" and not self.train:
            raise ValueError('train: found "", allowed: a file of problems, since task.name = "jsonl"')
        if self.name in ("hub", "reasoning_gym") and not self.dataset:
            raise ValueError(f'dataset: found "", allowed: the name of one, since task.name = "{self.name}"')
        if self.system_prompt and self.template != "chat":
            raise ValueError(
                f'system_prompt: found one with task.template = "{self.template}", allowed: with "chat" only'
            )
        return self


class RolloutConfig(Section):
    groups_per_step: Positive = 16
    group_size: Positive = 8
    max_tokens: Positive = 16
    temperature: Annotated[float, Field(gt=0, le=10)] = 1.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    top_k: Count = 0
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
    dynamic_sampling: bool = False
    """grpo: groups whose rewards are all equal are filtered and replaced (DAPO); each is counted."""
    max_filtered_per_step: Count = 0
    """dynamic_sampling: beyond so many in one step, equal groups are trained on as they are. 0: 8 x groups_per_step."""


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
    proximal: Literal["learner", "engine"] = "learner"
    """Policy in the ratio's denominator. learner: its own, recomputed before the first update, with importance weights
    for what lies between it and the engine (decoupled PPO); engine: the one that drew the tokens, without weights."""
    importance_cap: NotNegative = 2.0
    """Upper bound of the importance weight exp(proximal - engine). 0: no correction."""
    importance_floor: NotNegative = 0.0
    """importance_mode = "mask": the lower bound."""
    importance_level: Literal["token", "sequence"] = "token"
    """sequence: one weight for all tokens of a completion, the product of its tokens' ratios."""
    importance_mode: Literal["truncate", "mask"] = "truncate"
    """truncate: weights above the cap become the cap (TIS); mask: what lies outside the bounds is left out."""
    kl_coef: NotNegative = 0.0
    """Weight of the KL to the reference, the model as GRPO found it. 0: no reference is kept."""
    kl_estimator: Literal["k1", "k3"] = "k3"
    kl_in: Literal["loss", "reward"] = "loss"
    max_token_lag: Annotated[int, Field(ge=-1)] = -1
    """Tokens drawn by weights more than so many steps back are left out of the loss; -1: none is. `rollout.max_lag`
    bounds the lag of all tokens, this one those of completions that crossed versions or waited."""
    overlong: Literal["none", "penalty", "mask"] = "none"
    """Completions that reach for rollout.max_tokens. penalty: DAPO's soft punishment; mask: cut ones are left out."""
    overlong_buffer: Count = 0
    """penalty: tokens before rollout.max_tokens over which it grows from 0 to overlong_penalty."""
    overlong_penalty: PositiveFloat = 1.0
    skip_zero_advantage: bool = True
    """Leave completions whose advantage is exactly 0 out of forward and backward: their gradient is 0."""


class SftConfig(Section):
    epochs: Positive = 1
    """Passes over the pairs."""
    batch_size: Positive = 16
    """Pairs of one update; a step is one update."""
    aggregation: Literal["token_mean", "sequence_mean", "constant"] = "token_mean"
    """Denominator of the loss, also expert iteration's: tokens; each sequence's, then sequences; `constant`."""
    constant: PositiveFloat = 256.0
    """constant: each sequence's sum is divided by this."""


class ExpertIterationConfig(Section):
    min_reward: float = 1.0
    """Completions of at least this reward are kept."""
    max_per_question: Count = 0
    """Kept completions of one question at most, the first ones; 0: all."""
    deduplicate: bool = True
    """Of equal completions of a question one is kept."""
    batch_size: Positive = 16
    """Kept completions of one update."""
    epochs: Positive = 1
    """Passes over what a step kept."""


class DpoConfig(Section):
    beta: PositiveFloat = 0.1
    epochs: Positive = 1
    batch_size: Positive = 8
    """Pairs of one update; a step is one update."""
    label_smoothing: Annotated[float, Field(ge=0, lt=0.5)] = 0.0
    """Assumed share of pairs whose preference is the wrong way round (conservative DPO)."""


class OptimConfig(Section):
    lr: PositiveFloat = 1e-5
    betas: Annotated[tuple[Fraction, Fraction], TomlArray] = (0.9, 0.95)
    eps: PositiveFloat = 1e-8
    weight_decay: NotNegative = 0.0
    max_grad_norm: PositiveFloat = 1.0
    warmup_steps: Count = 0
    schedule: Literal["constant", "cosine"] = "constant"
    min_lr_ratio: Fraction = 0.1
    """cosine: the last step's learning rate as a share of `lr`."""
    epochs: Positive = 1
    """Passes over one rollout batch."""
    minibatches: Positive = 1
    """Optimizer updates a pass."""


class WarmStartConfig(Section):
    examples: Count = 0
    """Demonstrations of the SFT phase before the first step; 0: no warm start."""
    epochs: Positive = 2
    batch_size: Positive = 16
    lr: PositiveFloat = 2e-5


class EvalConfig(Section):
    prompts: CountOrAll = 64
    """Held-out problems; "all": of a file, split or data set of their own; 0: no evaluation."""
    samples: Positive = 4
    """Completions a problem."""
    temperature: NotNegative = 1.0
    """0: greedy, the likeliest token each time."""
    max_tokens: Count = 0
    """0: as in `rollout`."""
    every_steps: Count = 0
    """Evaluate in the background every so many steps, too. 0: before and after only."""
    share: Annotated[float, Field(gt=0, le=1)] = 0.25
    """Of the tickets in the actors' hands, those of a background evaluation."""
    examples_shown: Count = 4

    @property
    def wanted(self) -> bool:
        """Whether anything is evaluated."""
        return self.prompts != 0


class GuardConfig(Section):
    policy: Literal["off", "warn", "stop", "rollback"] = "warn"
    """What a collapse brings: nothing, a line, the end of the run, or the last good checkpoint on a new branch."""
    window: Positive = 3
    """Steps in a row that a signal must last; also the steps over which the reward is averaged."""
    reward_drop: Fraction = 0.5
    """Reward below this share of the best so far. 0: not watched."""
    entropy_low: NotNegative = 0.15
    """Entropy of the sampled tokens below this multiple of the first steps'. 0: not watched."""
    entropy_high: NotNegative = 4.0
    zero_variance_share: Fraction = 0.9
    """Share of groups without variance, while the reward is below `solved_reward`. 0: not watched."""
    solved_reward: float = 0.95
    length_factor: NotNegative = 4.0
    """Mean length beyond this multiple of the first steps', or below its inverse. 0: not watched."""
    duplicate_share: Fraction = 0.5
    """Share of the commonest completion among those of different prompts. 0: not watched."""
    grad_norm_factor: NotNegative = 20.0
    """Gradient norm beyond this multiple of the median so far. 0: not watched."""
    kl_max: NotNegative = 1.0
    """KL in nats a token, of the learner to the engine's policy, and to the reference where there is one. 0: not
    watched."""
    lr_factor: Annotated[float, Field(gt=0, le=1)] = 0.3
    """rollback: the learning rate is multiplied by this."""
    max_rollbacks: Positive = 3
    """rollback: after so many the run stops instead."""


class LearnerConfig(Section):
    device: Literal["auto", "cpu", "cuda"] = "auto"
    processes: Positive = 1
    """Processes of the learner, one for each of its GPUs: weights, gradients and moments are divided over them (FSDP2).
    Several on a CPU are for tests."""
    microbatch_tokens: Positive = 2048
    """Budget of packed tokens (padding included) of one forward and backward pass."""
    packing: bool = True
    """Several prompts in one line under the block mask, where they fit; false: one a line, padded to the longest."""
    threads: Count = 0
    """CPU threads of the mathematics; 0: all cores, half of them while engines generate beside it."""
    gradient_checkpointing: bool = False


class ActorConfig(Section):
    count: Count = 1
    """Actors that the launcher starts; 0: none until `tandem scale`, or actors started by hand (`tandem actor`)."""
    drain_s: PositiveFloat = 60.0
    """Scaled down: time in which an actor may finish what it holds; then its tickets go back."""
    wait_for_room: bool = False
    """True: more actors than the cluster has room for are no error at the start; they wait until it grows."""
    engine: Literal["vllm", "fake"] = "vllm"
    max_running: Positive = 64
    """Completions that the engine runs at once."""
    kv_cache_gib: PositiveFloat = 1.0
    """CPU engine: memory of the KV cache."""
    gpu_memory_utilization: Fraction = 0.85
    """GPU engine: share of the GPU that vLLM may take (of the fraction given to the actor)."""
    threads: Count = 0
    """CPU engine: OpenMP threads; 0: all cores."""
    cpus: Annotated[float, Field(gt=0)] = 1.0
    """CPUs that each actor asks of Ray."""
    gpus: NotNegative = 0.0
    """GPUs that each actor asks of Ray; 0: one where there are two or more, half of one where there is one."""
    enforce_eager: bool = True
    start_timeout_s: PositiveFloat = 600.0
    grader_workers: Positive = 1
    grader_timeout_s: PositiveFloat = 5.0
    fake_token_s: NotNegative = 0.0
    """fake engine: seconds that one token takes (all completions at once), asleep."""


class AutoscaleConfig(Section):
    enabled: bool = False
    """The launcher changes the number of actors by the measured waiting of both sides."""
    min_actors: Positive = 1
    max_actors: Positive = 8
    window_steps: Positive = 4
    """Steps that are looked at together; also the least between two changes."""
    patience: Positive = 2
    """Windows in a row, one for each step, that must ask for the same."""

    @model_validator(mode="after")
    def _limits(self) -> AutoscaleConfig:
        if self.min_actors > self.max_actors:
            raise ValueError(f"min_actors: found {self.min_actors}, allowed: at most max_actors = {self.max_actors}")
        return self


class WeightsConfig(Section):
    kv: Literal["keep", "recompute"] = "keep"
    """What running completions do with their keys and values at an update."""
    prefix_cache: Literal["version", "shared"] = "version"
    """version: new requests find keys and values of the version that is serving only; shared: older ones, too."""
    chunk_mib: Positive = 8
    window: Positive = 4
    parity: Literal["stop", "warn", "off"] = "stop"
    """What happens when an engine's logprobs are further from the learner's than `parity_nats`."""
    parity_every: Positive = 16
    """An actor is probed at its first version, and then at every so many that it loads."""
    parity_nats: PositiveFloat = 0.1
    """Largest mean difference of a probe's logprobs, a token. Arithmetic in bfloat16 makes 0.04; where engine and
    learner compute in float32, as on a CPU without bfloat16 instructions, 0.002 sees much smaller faults."""
    anchor_every: Count = 0
    """Every so many versions every actor pulls a whole snapshot instead of a delta; 0: none does that need not, 1: no
    deltas at all."""


class CheckpointConfig(Section):
    every_steps: Count = 0
    """0: only at the end and on interruption."""
    keep: Positive = 2


class MetricsConfig(Section):
    serve: bool = True
    """The learner answers Prometheus over HTTP, without a password: figures only, nothing can be changed there."""
    host: str = "127.0.0.1"
    """Address of one interface of the learner's machine; loopback unless a Prometheus elsewhere is to reach it."""
    port: Annotated[int, Field(ge=0, le=65535)] = 0
    """0: a free one; the file metrics-targets-NAME.json beside the run's directory says which."""
    engine_every_s: NotNegative = 15.0
    """An actor sends its engine's own metrics (vLLM's) so often; 0: never."""
    sample_every_s: PositiveFloat = 1.0
    """Between two samples of the run; timeline.jsonl keeps all of them or, of a long run, fewer."""
    keep_logprobs: bool = True
    """The learner's logprobs of each batch are kept in rollouts/, for the browser of rollouts."""
    wandb: Literal["off", "offline", "online"] = "off"
    """Weights & Biases, if it is installed."""
    wandb_project: str = "tandem"

    @model_validator(mode="after")
    def _addresses(self) -> MetricsConfig:
        check_host(self.host)
        return self


class WireConfig(Section):
    host: str = AUTO
    """Address of one interface of the learner's machine. auto: loopback, or this node's address in a joined cluster."""
    port: Annotated[int, Field(ge=0, le=65535)] = 0
    """Port of the work socket; bulk takes the next one, news the one after. 0: free ones."""
    no_keys_on_trusted_network: bool = False
    """True: sockets without keys. Who reaches the ports can act as an actor, and read and change all that passes."""
    heartbeat_s: PositiveFloat = 1.0
    dead_after_s: PositiveFloat = 15.0
    """Silence after which an actor's leases are issued again."""
    lost_learner_s: PositiveFloat = 120.0
    """Silence after which an actor gives up and exits."""
    max_frame_mib: Annotated[int, Field(ge=1, le=64)] = 64
    journal_fsync: bool = False
    """True: an acknowledged group survives the machine; False: it survives the process."""

    @model_validator(mode="after")
    def _addresses(self) -> WireConfig:
        check_host(self.host)
        check_port_number(self.port)
        if self.dead_after_s < 3 * self.heartbeat_s:
            raise ValueError(
                f"dead_after_s: found {self.dead_after_s}, allowed: at least 3 x heartbeat_s = {3 * self.heartbeat_s}"
            )
        return self

    @property
    def address(self) -> str:
        """The numeric address to bind."""
        return bind_address(self.host)
