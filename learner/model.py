"""The policy as the learner holds it: fp32 master weights, logprobs of packed responses, the weights to publish.

The forward pass runs on the weights that are published, not on the master weights: `compute()` rounds every parameter
to `model.dtype` once for each optimizer update (gradients pass through to the masters in fp32), so that the learner and
an engine that serves this version look at the same bits. Casting once is also cheaper than autocast, which would cast
for every microbatch and keep norms, embeddings and the residual stream in fp32.

With several ranks each holds a part of every master weight (`sharding.py`), and whatever computes, or looks at whole
tensors, is called by all of them at once.

Only response positions go through the vocabulary head, in chunks. Knows no loss, no optimizer and no step; called by
`step.py`, `trainer.py`, `publish.py` and `checkpoint.py`. This is the only module of the learner that imports
transformers.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from learner import sharding
from learner.batch import PackedBatch, Row, Sample, pack_lines
from learner.joining import pick_device
from learner.ranks import ALONE, Ranks
from learner.telemetry.mfu import MatmulShape
from learner.tensor_files import write_tensors
from protocol.sections import LearnerConfig, ModelConfig

HEAD_CHUNK_LOGITS = 16 * 2**20
"""Logits computed at once (64 MiB in fp32)."""
KEPT_LOGITS = 128 * 2**20
"""Logits of one microbatch kept for backward (512 MiB in fp32); chunks beyond that are computed again instead."""
SELF_CHECK_BOUND_NATS = 1e-3
"""Largest difference of one token's logprob, in fp32, between the packed path and the model's own forward."""
CPU = torch.device("cpu")
FAST_BF16_CPU = ("avx512_bf16", "amx_bf16", "bf16")


@dataclass(frozen=True)
class LogprobOutput:
    """Of the N response tokens of a packed batch, in its order."""

    logprobs: Tensor
    """[N] float32, with gradient where gradients are on: log p(token) at the ticket's temperature."""
    entropy: Tensor | None
    """[N] float32 without gradient, nats, of the same distribution; None if it was not asked for."""


class PolicyModel:
    """A causal language model with fp32 master weights. See the module's docstring."""

    def __init__(
        self, network: PreTrainedModel, config: ModelConfig, learner: LearnerConfig, on_host: bool = False
    ) -> None:
        """`on_host`: stay on the CPU, to be brought to the ranks' devices by `shard`."""
        self.network = network.to(torch.float32).eval()  # always eval: dropout would make old and new logprobs differ
        self.device = CPU if on_host else pick_device(learner.device)
        self.network.to(self.device)
        self._whole: sharding.Whole | None = None
        self._published_names: list[str] = []
        """Of a sharded model, in order."""
        self.publish_dtype: torch.dtype = getattr(torch, config.dtype)
        self.compute_dtype = pick_compute_dtype(self.publish_dtype, self.device)
        self.attention = config.attention
        self.shape = MatmulShape.of(self.network)
        self._computing = False
        if learner.gradient_checkpointing:
            enable_gradient_checkpointing(self.network)

    @property
    def vocabulary(self) -> int:
        """Token ids that the model knows: 0..vocabulary - 1."""
        return self.network.get_input_embeddings().weight.shape[0]

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Master weights (float32), tied ones once."""
        return self.network.named_parameters()

    @property
    def sharded(self) -> bool:
        """Whether this process holds a part of every tensor only."""
        return self._whole is not None

    def shard(self, ranks: Ranks) -> None:
        """Divide the weights over the ranks and bring them to their devices.

        Raises ValueError for a model whose tensors have other names on disk than in memory, or are others."""
        named, live = self.network.state_dict(), self.live_state()
        if any(name not in named or named[name].data_ptr() != tensor.data_ptr() for name, tensor in live.items()):
            raise ValueError(
                f"learner.processes: found {ranks.size}, allowed: 1 for a model of type"
                f" {self.network.config.model_type!r}, whose tensors are converted when they are published"
            )
        self._published_names = list(live)
        self.device = ranks.device
        self.compute_dtype = pick_compute_dtype(self.publish_dtype, self.device)
        whole = sharding.Whole(self.network, self._logprobs_and_entropy)
        kinds = set(self.network._no_split_modules or ())
        layers = [module for module in self.network.modules() if type(module).__name__ in kinds]
        sharding.shard(whole, layers, ranks, self.compute_dtype)
        self._whole = whole

    @contextmanager
    def compute(self) -> Iterator[None]:
        """Within: the network's weights are the published ones, in the compute type; gradients go to the masters.

        Enter it once for the forward and backward passes of an optimizer update, leave it before the update. (Layers
        that gradient checkpointing computes again in backward must find the same weights, hence one context for both.)
        """
        if self._computing:
            yield
            return
        self._computing = True
        try:
            with self._published_weights():
                yield
        finally:
            self._computing = False

    @contextmanager
    def _published_weights(self) -> Iterator[None]:
        if self._whole is None and self.publish_dtype == torch.float32:
            yield
        elif self._whole is None:
            with swapped_parameters(self.network, self._published_value):
                yield
        elif self.publish_dtype == self.compute_dtype:  # what FSDP gathers is rounded
            try:
                yield
            finally:
                sharding.reshard(self._whole)
        else:
            with self._shards_of(lambda _, part: part.to(self.publish_dtype)):
                yield

    @contextmanager
    def _shards_of(self, value: Callable[[str, Tensor], Tensor]) -> Iterator[None]:
        """Within, a sharded network computes with other weights: `value(name, this rank's part of the masters)`."""
        assert self._whole is not None
        with sharding.holding(dict(self.named_parameters()), value):
            try:
                yield
            finally:
                sharding.reshard(self._whole)

    def _published_value(self, master: Tensor) -> Tensor:
        return _Round.apply(master, self.publish_dtype, self.compute_dtype)

    def logprobs(self, packed: PackedBatch, with_entropy: bool) -> LogprobOutput:
        """Logprobs of the response tokens at each ticket's temperature, and their distributions' entropies.

        With gradients on, call it inside `compute()`; raises RuntimeError otherwise.
        """
        if torch.is_grad_enabled() and not self._computing:
            raise RuntimeError("logprobs with gradients: expected to be called inside PolicyModel.compute()")
        with self.compute():
            return self._forward(packed.to(self.device), with_entropy)

    def frozen_copy(self) -> dict[str, Tensor]:
        """The weights of this moment as they are published, by parameter name, on the model's device: a reference.

        Its memory is one copy of the model in `model.dtype`.
        """
        return {name: p.detach().to(self.publish_dtype, copy=True) for name, p in self.named_parameters()}

    def frozen_logprobs(self, weights: dict[str, Tensor], packed: PackedBatch) -> Tensor:
        """[N] float32 logprobs of the response tokens under a `frozen_copy`, without gradient.

        Not inside `compute()`. Raises ValueError if the weights are of another model."""
        names = {id(parameter): name for name, parameter in self.named_parameters()}
        if weights.keys() != set(names.values()):
            raise ValueError("the reference's weights are of another model")
        if self._whole is None:
            held = swapped_parameters(self.network, lambda p: self._frozen_value(weights[names[id(p)]]))
        else:
            held = self._shards_of(lambda name, _: sharding.local(weights[name]))
        with torch.no_grad(), held:
            return self._forward(packed.to(self.device), with_entropy=False).logprobs

    def _frozen_value(self, weight: Tensor) -> Tensor:
        return weight.to(self.device, self.compute_dtype)

    def spread(self, weights: Mapping[str, Tensor], ranks: Ranks) -> dict[str, Tensor]:
        """Whole published tensors by parameter name, which rank 0 has, divided over the ranks, one after the other."""
        found = {}
        for name, parameter in self.named_parameters():
            weight = weights[name] if ranks.leads else torch.empty(parameter.shape, dtype=self.publish_dtype)
            found[name] = sharding.part_of(ranks.broadcast(weight.contiguous()), parameter)
        return found

    def _forward(self, packed: PackedBatch, with_entropy: bool) -> LogprobOutput:
        return LogprobOutput(*(self._whole or self._logprobs_and_entropy)(packed, with_entropy))

    def _logprobs_and_entropy(self, packed: PackedBatch, with_entropy: bool) -> tuple[Tensor, Tensor | None]:
        attention = packed.attention
        if self.attention == "eager":  # adds its mask to the scores, so a bool mask would mean something else
            dtype = self.network.get_input_embeddings().weight.dtype
            attention = torch.zeros_like(attention, dtype=dtype).masked_fill(~attention, torch.finfo(dtype).min)
        hidden = self.network.base_model(
            input_ids=packed.input_ids, attention_mask=attention, position_ids=packed.position_ids, use_cache=False
        ).last_hidden_state
        predicting = hidden.flatten(0, 1).index_select(0, packed.predict_index)
        head = self.network.get_output_embeddings()
        output = head_logprobs(
            predicting, head.weight, getattr(head, "bias", None), packed.target_ids, packed.temperature, with_entropy
        )
        return output.logprobs, output.entropy

    def published_state(self, device: torch.device = CPU) -> dict[str, Tensor]:
        """The weights of a version: name -> contiguous tensor in `model.dtype` on `device`.

        Names and order are those of `save_pretrained` (tied tensors once, no wrapper's prefixes). An immutable copy:
        training on does not change it.
        """
        return {
            name: tensor.to(device, self.published_dtype(tensor), copy=True).contiguous()
            for name, tensor in self.whole_tensors()
        }

    def whole_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """The tensors of `live_state`, one after the other; those of a sharded model put together, rounded before."""
        for name, tensor in self.live_state().items():
            rounded = tensor.to(self.published_dtype(tensor)) if self.sharded else tensor
            yield name, sharding.whole_of(rounded)

    def published_dtype(self, tensor: Tensor) -> torch.dtype:
        """The type in which one of the model's tensors is published."""
        return self.publish_dtype if tensor.is_floating_point() else tensor.dtype

    def live_state(self) -> dict[str, Tensor]:
        """The tensors of `published_state` as they are: master weights, no copies, of a sharded model its parts."""
        if self.sharded:
            named = self.network.state_dict()
            return {name: named[name].detach() for name in self._published_names}
        tied = set(getattr(self.network, "all_tied_weights_keys", None) or ())
        state: dict[str, Tensor] = {}
        seen: set[int] = set()
        named = self.network.state_dict()
        for name, tensor in sorted(
            named.items(), key=lambda item: item[0] in tied
        ):  # the name that is kept comes first
            if tensor.data_ptr() in seen and tensor.numel():
                continue
            seen.add(tensor.data_ptr())
            state[name] = tensor.detach()
        return dict(revert_weight_conversion(self.network, state))

    def export(self, directory: Path, tokenizer: Any) -> None:
        """Write a Hugging Face directory that transformers and vLLM load: weights in `model.dtype`, configuration,
        generation configuration, tokenizer and its chat template."""
        directory.mkdir(parents=True, exist_ok=True)
        write_tensors(self.published_state(), directory / "model.safetensors", {"format": "pt"})
        config = type(self.network.config).from_dict(self.network.config.to_dict())
        config.architectures = [type(self.network).__name__]
        config.dtype = str(self.publish_dtype).removeprefix("torch.")
        config.save_pretrained(directory)
        if self.network.generation_config is not None:
            self.network.generation_config.save_pretrained(directory)
        tokenizer.save_pretrained(directory)

    def self_check(self) -> None:
        """Compare the packed path with the model's own forward, one sequence at a time, in fp32.

        Raises ValueError if a logprob differs by more than SELF_CHECK_BOUND_NATS: the model does something between
        its hidden states and its logits (scaling, soft-capping) or between its tokens (recurrence) that packing skips.
        """
        rows = _self_check_rows(self.network.get_input_embeddings().num_embeddings)
        lines = [(rows[0],), tuple(rows[1:])]  # two rows that share a line, and one that is padded
        with torch.no_grad():
            packed = self._forward(pack_lines(lines).to(self.device), with_entropy=False).logprobs
            plain = torch.cat([self._plain_logprobs(row, sample) for row in rows for sample in row.samples])
        worst = float((packed - plain).abs().max())
        if not worst <= SELF_CHECK_BOUND_NATS:
            raise ValueError(
                f"model.path: a model of type {self.network.config.model_type!r} cannot be trained here: its own"
                f" forward and the packed forward disagree by {worst:.3g} nats on a test batch, allowed: at most"
                f" {SELF_CHECK_BOUND_NATS:g} (logit scaling, soft-capping and recurrent layers are not supported)"
            )

    def _plain_logprobs(self, row: Row, sample: Sample) -> Tensor:
        tokens = torch.tensor([[*row.prompt_ids, *sample.token_ids.tolist()]], device=self.device)
        logits = self.network(input_ids=tokens, use_cache=False).logits[0, :-1].float() / row.temperature
        chosen = logits.log_softmax(-1).gather(-1, tokens[0, 1:, None])[:, 0]
        return chosen[len(row.prompt_ids) - 1 :]


def load_model(path: Path, config: ModelConfig, learner: LearnerConfig, ranks: Ranks = ALONE) -> PolicyModel:
    """Load a causal language model for training and check that packing means what the model means; divide it over the
    ranks, where there are several. (Each of them reads it whole into its host memory for a moment.)

    Sets torch's CPU threads to `learner.threads` (0: left alone; of several ranks each takes its part of the cores).
    Raises ValueError, naming `model.path`, for a directory without a causal language model, for missing weights and for
    a model that `self_check` refuses; naming `learner.processes`, for one that cannot be divided.
    """
    if learner.threads or not ranks.alone:
        share_cores(learner, shared=False, processes=ranks.size)
    try:
        network, info = AutoModelForCausalLM.from_pretrained(
            path, dtype=torch.float32, attn_implementation=config.attention, output_loading_info=True
        )
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"model.path: {path} does not hold a causal language model that loads: {error}") from error
    if info["missing_keys"] or info["mismatched_keys"]:
        wrong = sorted([*info["missing_keys"], *(str(key) for key in info["mismatched_keys"])])
        raise ValueError(f"model.path: {path} lacks weights (or has them in another shape): {', '.join(wrong[:5])}")
    check_packable(network.config, config.max_model_len)
    model = PolicyModel(network, config, learner, on_host=not ranks.alone)
    model.self_check()
    if not ranks.alone:
        model.shard(ranks)
    return model


def share_cores(learner: LearnerConfig, shared: bool, processes: int = 1) -> None:
    """Set torch's CPU threads: `learner.threads`, or by default all cores, and half of them beside busy engines,
    divided among the learner's processes.

    Threads that meet at barriers lose more to a shared core than a second one gains (12 % of a step on two cores).
    """
    cores = max(1, len(os.sched_getaffinity(0)) // processes)
    torch.set_num_threads(learner.threads or (max(1, cores // 2) if shared else cores))


def check_packable(config: Any, max_model_len: int) -> None:
    """Refuse what depends on a sequence's length beyond the reach of the self-check's short sequences.

    Raises ValueError if a sliding window is shorter than `max_model_len`: the block mask knows no window.
    """
    window = getattr(config, "sliding_window", None)
    if getattr(config, "use_sliding_window", True) and window and window < max_model_len:
        raise ValueError(
            f"model.max_model_len: found {max_model_len}, allowed: at most {window}, the sliding attention window of"
            f" this model of type {config.model_type!r} (training computes full attention)"
        )


def pick_compute_dtype(publish_dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """The type of the arithmetic: `publish_dtype`, except for bfloat16 on a CPU without bfloat16 instructions.

    There a bfloat16 matrix product is 5 to 60 times slower than a float32 one; float32 arithmetic on weights rounded
    to bfloat16 costs nothing but memory and is closer to the exact result.
    """
    if publish_dtype == torch.bfloat16 and device.type == "cpu":
        capabilities = torch.cpu.get_capabilities()
        if not any(capabilities.get(name, False) for name in FAST_BF16_CPU):
            return torch.float32
    return publish_dtype


def enable_gradient_checkpointing(network: PreTrainedModel) -> None:
    """Recompute each layer in backward. transformers only does so for layers in training mode: those get the flag,
    their children do not, so that dropout inside stays off (the self-check sees it if a layer drops out itself)."""
    network.gradient_checkpointing_enable({"use_reentrant": False})
    for module in network.modules():
        if getattr(module, "gradient_checkpointing", False):
            module.training = True


def head_logprobs(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, temperature: Tensor, with_entropy: bool
) -> LogprobOutput:
    """Vocabulary head, temperature and log-softmax over [N, H] hidden states, in chunks of HEAD_CHUNK_LOGITS.

    Softmax and entropy are fp32. Of the first KEPT_LOGITS logits backward keeps the log-softmax; further chunks are
    recomputed there, so memory stays bounded for any N and any vocabulary.
    """
    rows = max(1, HEAD_CHUNK_LOGITS // weight.shape[0])
    logprobs: list[Tensor] = []
    entropies: list[Tensor] = []
    for start in range(0, len(targets), rows):
        part = slice(start, start + rows)
        arguments = (hidden[part], weight, bias, targets[part], temperature[part], with_entropy)
        if (start + rows) * weight.shape[0] <= KEPT_LOGITS or not torch.is_grad_enabled():
            chosen, entropy = _chunk_logprobs(*arguments)
        else:
            chosen, entropy = checkpoint(_chunk_logprobs, *arguments, use_reentrant=False, preserve_rng_state=False)
        logprobs.append(chosen)
        if entropy is not None:
            entropies.append(entropy)
    return LogprobOutput(torch.cat(logprobs), torch.cat(entropies) if with_entropy else None)


def _chunk_logprobs(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, temperature: Tensor, with_entropy: bool
) -> tuple[Tensor, Tensor | None]:
    logits = F.linear(hidden, weight, bias).float() / temperature[:, None]
    all_logprobs = logits.log_softmax(-1)
    entropy = None
    if with_entropy:
        detached = all_logprobs.detach()
        entropy = -(detached.exp() * detached).sum(-1)
    return all_logprobs.gather(-1, targets[:, None])[:, 0], entropy


class _Round(torch.autograd.Function):
    """master -> published value in the compute type; the gradient passes on as it is, not rounded once more."""

    @staticmethod
    def forward(ctx: Any, master: Tensor, publish: torch.dtype, compute: torch.dtype) -> Tensor:
        ctx.master_dtype = master.dtype
        return master.to(publish).to(compute)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return gradient.to(ctx.master_dtype), None, None


@contextmanager
def swapped_parameters(network: nn.Module, replace: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Within, every parameter of `network` is `replace(parameter)`, computed once; tied parameters stay tied."""
    originals = [(m, name, p) for m in network.modules() for name, p in m._parameters.items() if p is not None]
    replaced = {id(p): replace(p) for _, _, p in originals}
    try:
        for module, name, parameter in originals:
            module._parameters[name] = replaced[id(parameter)]  # type: ignore[assignment]  # no leaf, on purpose
        yield
    finally:
        for module, name, parameter in originals:
            module._parameters[name] = parameter


def _self_check_rows(vocabulary: int) -> list[Row]:
    random = np.random.default_rng(0)

    def sample(length: int) -> Sample:
        ids = random.integers(0, vocabulary, length, dtype=np.int32)
        return Sample(ids, np.zeros(length, np.float32), np.ones(length, bool), 0.0, np.zeros(length, np.int32))

    def row(prompt: int, *lengths: int) -> Row:
        ids = tuple(random.integers(0, vocabulary, prompt).tolist())
        return Row(ids, tuple(sample(length) for length in lengths), temperature=1.0)

    return [row(9, 5, 1, 7), row(4, 3, 6), row(3, 2, 2)]
