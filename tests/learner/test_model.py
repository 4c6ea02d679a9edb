"""The packed forward against the model's own, one sequence at a time; what is refused; what is published."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import learner.model as model_module
from learner.batch import pack, pack_lines, plan_microbatches
from learner.model import PolicyModel, load_model, pick_compute_dtype
from protocol.sections import LearnerConfig, ModelConfig
from tests.learner.reference import (
    SHAPE,
    foreign_directory,
    plain_distributions,
    plain_logprobs,
    policy,
    random_rows,
    tiny_directory,
    tiny_network,
)  # fmt: skip
from tests.tiny_model import make_tiny_tokenizer

CPU = LearnerConfig(device="cpu")
FP32 = ModelConfig(dtype="float32", max_model_len=64)


def packed_logprobs(model: PolicyModel, budget: int, packing: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(packed, plain, entropy difference) over all microbatches, each token compared with its own sequence."""
    packed, plain, entropies, expected_entropies = [], [], [], []
    with torch.no_grad():
        for lines in plan_microbatches(random_rows(temperature=0.7), budget, packing):
            output = model.logprobs(pack_lines(lines), with_entropy=True)
            packed.append(output.logprobs)
            entropies.append(output.entropy)
            for row in (row for line in lines for row in line):
                for sample in row.samples:
                    plain.append(plain_logprobs(model.network, row, sample))
                    distribution = plain_distributions(model.network, row, sample)
                    expected_entropies.append(-(distribution.exp() * distribution).sum(-1))
    return torch.cat(packed), torch.cat(plain), torch.cat(entropies) - torch.cat(expected_entropies)


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize(("budget", "packing"), [(12, False), (1000, False), (30, True), (1000, True)])
def test_logprobs_equal_one_sequence_at_a_time_at_temperature(
    kind: str, attention: str, budget: int, packing: bool
) -> None:
    packed, plain, entropy_difference = packed_logprobs(policy(kind, attention=attention), budget, packing)
    assert plain.std() > 0.5  # a distribution that has something to get wrong
    torch.testing.assert_close(packed, plain, atol=2e-5, rtol=0)
    assert entropy_difference.abs().max() < 2e-5


def test_logprobs_depend_on_temperature() -> None:
    model = policy()
    with torch.no_grad():
        hot, cold = (model.logprobs(pack(random_rows(temperature=t)), with_entropy=False).logprobs for t in (1.0, 0.7))
    assert (hot - cold).abs().mean() > 0.1


def test_logprobs_gradient_is_the_same_in_chunks_and_recomputed(monkeypatch: pytest.MonkeyPatch) -> None:
    gradients = []
    for chunk, kept, checkpointing in ((2**24, 2**27, False), (61 * 3, 61 * 6, False), (61 * 3, 0, True)):
        monkeypatch.setattr(model_module, "HEAD_CHUNK_LOGITS", chunk)
        monkeypatch.setattr(model_module, "KEPT_LOGITS", kept)
        model = policy("qwen2", checkpointing=checkpointing)
        with model.compute():
            model.logprobs(pack(random_rows()), with_entropy=False).logprobs.square().sum().backward()
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    for other in gradients[1:]:
        for name, gradient in gradients[0].items():
            torch.testing.assert_close(other[name], gradient, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_compute_uses_published_weights_and_gives_gradients_to_the_masters(checkpointing: bool) -> None:
    model = policy(dtype="bfloat16", checkpointing=checkpointing)
    rows = random_rows()
    rounded = tiny_network()
    with torch.no_grad():
        for parameter in rounded.parameters():
            parameter.copy_(parameter.to(torch.bfloat16))
    expected = torch.cat([plain_logprobs(rounded, row, sample) for row in rows for sample in row.samples])
    with model.compute():
        output = model.logprobs(pack(rows), with_entropy=False)
        output.logprobs.sum().backward()
    expected.sum().backward()
    exact = model.compute_dtype == torch.float32  # a CPU with bfloat16 instructions computes in them, with their noise
    torch.testing.assert_close(output.logprobs, expected, atol=2e-5 if exact else 0.2, rtol=0)
    for (name, parameter), reference in zip(model.named_parameters(), rounded.parameters(), strict=True):
        assert isinstance(parameter, torch.nn.Parameter) and parameter.dtype == parameter.grad.dtype == torch.float32
        if exact:
            torch.testing.assert_close(parameter.grad, reference.grad, atol=1e-4, rtol=1e-4, msg=name)


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_bfloat16_compute_keeps_softmax_in_float32_and_the_gradients_direction(
    monkeypatch: pytest.MonkeyPatch, kind: str, attention: str, checkpointing: bool
) -> None:
    """The path of GPUs and of CPUs with bfloat16 instructions, here without them: same type, slower."""
    exact = policy(kind, dtype="float32")
    monkeypatch.setattr(model_module, "pick_compute_dtype", lambda *_: torch.bfloat16)
    model = policy(kind, dtype="bfloat16", attention=attention, checkpointing=checkpointing)
    gradients, logprobs = [], []
    for one in (exact, model):
        with one.compute():
            output = one.logprobs(pack(random_rows()), with_entropy=True)
            output.logprobs.sum().backward()
        logprobs.append(output.logprobs.detach())
        gradients.append(torch.cat([p.grad.flatten() for _, p in one.named_parameters()]))
        assert output.logprobs.dtype == output.entropy.dtype == torch.float32
    assert (logprobs[0] - logprobs[1]).abs().mean() < 0.05
    spacing = torch.tensor(2.0**-7)  # of bfloat16 between 1 and 2: a softmax in it gives multiples of that
    assert ((logprobs[1] / spacing) % 1).abs().max() > 0.01
    assert torch.nn.functional.cosine_similarity(*gradients, dim=0) > 0.999
    assert all(p.dtype == p.grad.dtype == torch.float32 for _, p in model.named_parameters())


def test_logprobs_with_gradients_want_one_context_for_forward_and_backward() -> None:
    with pytest.raises(RuntimeError, match="compute"):
        policy().logprobs(pack(random_rows()), with_entropy=False)


def test_compute_dtype_is_float32_on_a_cpu_without_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    for capabilities, expected in (({"avx2": True}, torch.float32), ({"avx512_bf16": True}, torch.bfloat16)):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda found=capabilities: found)
        assert pick_compute_dtype(torch.bfloat16, torch.device("cpu")) == expected
        assert pick_compute_dtype(torch.bfloat16, torch.device("cuda")) == torch.bfloat16
        assert pick_compute_dtype(torch.float32, torch.device("cpu")) == torch.float32


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_published_state_has_the_names_of_save_pretrained_and_is_a_copy(kind: str, tmp_path: Path) -> None:
    tiny_directory(tmp_path, kind)
    saved = load_file(tmp_path / "model.safetensors")
    model = load_model(tmp_path, ModelConfig(max_model_len=64), CPU)
    published = model.published_state()
    assert published.keys() == saved.keys()
    with torch.no_grad():
        for _, parameter in model.named_parameters():
            parameter.add_(1.0)
    for name, tensor in published.items():
        assert tensor.dtype == torch.bfloat16 and tensor.is_contiguous()
        assert torch.equal(tensor, saved[name].to(torch.bfloat16)), name


def test_export_loads_in_transformers_with_tokenizer_and_template(tmp_path: Path) -> None:
    tiny_directory(tmp_path / "in", "qwen2", vocab_size=259)
    model = load_model(tmp_path / "in", ModelConfig(max_model_len=64), CPU)
    with torch.no_grad():
        model.network.get_input_embeddings().weight.mul_(1.5)  # trained a little: also the tied head
    tokenizer = make_tiny_tokenizer()
    model.export(tmp_path / "out", tokenizer)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert loaded.dtype == torch.bfloat16 and loaded.config.architectures == ["Qwen2ForCausalLM"]
    published = model.published_state()
    state = loaded.state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in published.items())
    assert torch.equal(state["lm_head.weight"], published["model.embed_tokens.weight"])
    message = [{"role": "user", "content": "1 + 1?"}]
    again = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert again.apply_chat_template(message, tokenize=False) == tokenizer.apply_chat_template(message, tokenize=False)


def test_load_model_takes_a_family_that_packs_rightly(tmp_path: Path) -> None:
    model = load_model(foreign_directory(tmp_path), FP32, CPU)
    packed, plain, _ = packed_logprobs(model, 1000, packing=False)
    torch.testing.assert_close(packed, plain, atol=2e-5, rtol=0)


def test_load_model_refuses_logit_scaling_by_name(tmp_path: Path) -> None:
    from transformers import CohereConfig, CohereForCausalLM

    torch.manual_seed(0)
    CohereForCausalLM(CohereConfig(**SHAPE | {"logit_scale": 0.25})).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"model\.path.*'cohere'.*scaling"):
        load_model(tmp_path, FP32, CPU)


def test_load_model_refuses_a_recurrent_model(tmp_path: Path) -> None:
    from transformers import MambaConfig, MambaForCausalLM

    torch.manual_seed(0)
    config = MambaConfig(vocab_size=61, hidden_size=32, state_size=8, num_hidden_layers=2)
    MambaForCausalLM(config).save_pretrained(tmp_path)
    with pytest.raises((ValueError, TypeError)):
        load_model(tmp_path, FP32, CPU)


def test_load_model_refuses_a_window_shorter_than_the_context(tmp_path: Path) -> None:
    tiny_directory(tmp_path, "qwen2", use_sliding_window=True, sliding_window=16, max_window_layers=0)
    with pytest.raises(ValueError, match=r"model\.max_model_len: found 64, allowed: at most 16"):
        load_model(tmp_path, FP32, CPU)
    load_model(tmp_path, ModelConfig(dtype="float32", max_model_len=16), CPU)


def test_load_model_refuses_missing_weights_and_no_model(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"model\.path: .*nowhere"):
        load_model(tmp_path / "nowhere", FP32, CPU)
    tiny_directory(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"lacks weights.*layers\.1\.mlp\.up_proj"):
        load_model(tmp_path, FP32, CPU)
