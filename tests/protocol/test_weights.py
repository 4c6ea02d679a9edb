"""Manifest, digests and layout: every damaged bit is found, and the staged file is what safetensors reads."""

from __future__ import annotations

import threading
from itertools import pairwise
from pathlib import Path
from unittest import mock

import msgspec
import pytest
import torch
from safetensors.torch import load_file

from protocol import weights
from protocol.errors import WeightsError
from protocol.messages import Delta, Manifest, TensorSpec
from protocol.tensors import DTYPES, dtype_name, nbytes, safetensors_header, tensor_view
from protocol.weights import (
    SHARED_OUT_BYTES,
    Snapshot,
    check_chain,
    check_data,
    check_manifest,
    chunk_ranges,
    digests,
    layout,
    make_snapshot,
    manifest_digest,
    tensor_digest,
)
from tests.hub_harness import delta
from tests.hub_harness import snapshot as numbered

DATA = bytes(range(26))
SPECS = layout([("empty", "int64", (0, 4)), ("scalar", "float32", ()), ("a", "bfloat16", (2, 3)), ("b", "int16", (5,))])


def snapshot(data: bytes = DATA[:26]) -> Snapshot:
    return make_snapshot(3, 7, SPECS, memoryview(data))


def resealed(manifest: Manifest, **changes: object) -> Manifest:
    """A manifest with other fields and a digest that fits them."""
    changed = msgspec.structs.replace(manifest, **changes)
    return msgspec.structs.replace(changed, digest=manifest_digest(changed))


def test_layout_puts_tensors_one_after_the_other_without_gaps() -> None:
    assert [(spec.name, spec.offset, nbytes(spec)) for spec in SPECS] == [
        ("empty", 0, 0),
        ("scalar", 0, 4),
        ("a", 4, 12),
        ("b", 16, 10),
    ]


def test_layout_puts_larger_elements_first_and_keeps_the_order_of_equal_ones() -> None:
    dtypes = ["int8", "bfloat16", "float64", "bool", "float32", "float16", "int64", "bfloat16", "int32", "uint8"]
    specs = layout((f"w{n}", dtype, (n + 1,)) for n, dtype in enumerate(dtypes))
    assert [spec.name for spec in specs] == [f"w{n}" for n in (2, 6, 4, 8, 1, 5, 7, 0, 3, 9)]
    assert all(spec.offset % DTYPES[spec.dtype][0] == 0 for spec in specs), "each is aligned to its elements"
    assert [spec.shape for spec in layout((f"w{n}", "bfloat16", (n,)) for n in (3, 1, 2))] == [(3,), (1,), (2,)]


def test_layout_refuses_an_unknown_dtype_by_name() -> None:
    with pytest.raises(ValueError, match="tensor x: dtype 'complex64', allowed: bfloat16, "):
        layout([("x", "complex64", (1,))])


@pytest.mark.parametrize("name", DTYPES)
def test_dtype_table_agrees_with_torch(name: str) -> None:
    tensor = torch.zeros(3, dtype=getattr(torch, name))
    assert dtype_name(tensor.dtype) == name
    assert tensor.element_size() == DTYPES[name][0]


def test_snapshot_digests_each_tensor_and_the_manifest() -> None:
    made = snapshot().manifest
    assert (made.version, made.step, made.total_bytes) == (3, 7, 26)
    assert [spec.digest for spec in made.tensors] == [
        tensor_digest(b""),
        tensor_digest(DATA[:4]),
        tensor_digest(DATA[4:16]),
        tensor_digest(DATA[16:26]),
    ]
    check_manifest(made)
    check_data(made, memoryview(DATA))


def test_tensor_digest_is_xxh3_128() -> None:
    assert tensor_digest(b"") == "99aa06d3014798d86001c324468d497f"  # the published test vector


@pytest.mark.parametrize("size", [SHARED_OUT_BYTES - 1, SHARED_OUT_BYTES, 3 * SHARED_OUT_BYTES + 5])
def test_digests_by_threads_are_those_of_one(size: int) -> None:
    specs = layout([("a", "uint8", (size // 2,)), ("b", "uint8", (1,)), ("c", "uint8", (size - size // 2 - 1,))])
    data = memoryview((DATA * (size // len(DATA) + 1))[:size])
    threads = set()

    def digest(part: memoryview) -> str:
        threads.add(threading.get_ident())
        return tensor_digest(part)

    two_cores = mock.patch.object(weights, "num_threads", return_value=2)
    with mock.patch.object(weights, "tensor_digest", digest), two_cores:
        found = digests(specs, data)
    assert found == [tensor_digest(data[spec.offset : spec.offset + nbytes(spec)]) for spec in specs]
    assert (threading.get_ident() in threads) is (size < SHARED_OUT_BYTES)
    made = make_snapshot(1, 1, specs, data)
    check_data(made.manifest, data)
    for spec in specs:
        damaged = bytearray(data)
        damaged[spec.offset + nbytes(spec) - 1] ^= 1
        with pytest.raises(WeightsError, match=f"version 1: wrong digest of tensor {spec.name}"):
            check_data(made.manifest, memoryview(damaged))


def test_check_data_finds_every_single_bit_flip() -> None:
    made = snapshot()
    for bit in range(8 * len(DATA)):
        damaged = bytearray(DATA)
        damaged[bit // 8] ^= 1 << bit % 8
        owner = next(spec.name for spec in SPECS if spec.offset <= bit // 8 < spec.offset + nbytes(spec))
        with pytest.raises(WeightsError, match=f"version 3: wrong digest of tensor {owner}"):
            check_data(made.manifest, memoryview(damaged))


@pytest.mark.parametrize("data", [DATA[:-1], DATA + b"\0", b""])
def test_check_data_refuses_another_length(data: bytes) -> None:
    with pytest.raises(WeightsError, match=f"{len(data)} bytes, expected 26"):
        check_data(snapshot().manifest, memoryview(data))


def test_check_data_refuses_another_version_of_the_same_shape() -> None:
    with pytest.raises(WeightsError, match="wrong digest of tensor scalar"):
        check_data(snapshot().manifest, memoryview(snapshot(bytes(26)).data))


@pytest.mark.parametrize(
    "changes",
    [
        {"version": 4},
        {"step": 8},
        {"branch": 1},
        {"total_bytes": 25},
        {"tensors": SPECS},
        {"digest": ""},
        {"digest": "0" * 32},
    ],
)
def test_manifest_digest_covers_every_field(changes: dict[str, object]) -> None:
    with pytest.raises(WeightsError, match="its digest does not fit its fields"):
        check_manifest(msgspec.structs.replace(snapshot().manifest, **changes))


def test_check_manifest_refuses_gaps_overlaps_and_wrong_sums() -> None:
    made = snapshot().manifest
    first, *rest = made.tensors
    gap = (first, *(msgspec.structs.replace(spec, offset=spec.offset + 2) for spec in rest))
    with pytest.raises(WeightsError, match="scalar at 2, not 0"):
        check_manifest(resealed(made, tensors=gap))
    with pytest.raises(WeightsError, match="26 bytes, not 30"):
        check_manifest(resealed(made, total_bytes=30))
    check_manifest(resealed(made, branch=1))


def test_check_manifest_refuses_tensors_that_cannot_be() -> None:
    """Nobody who listens to news need be ready for anything but WeightsError."""
    made = snapshot().manifest
    unknown = (*made.tensors[:3], msgspec.structs.replace(made.tensors[3], dtype="float4"))
    with pytest.raises(WeightsError, match="version 3: tensor b: dtype 'float4', allowed: bfloat16, "):
        check_manifest(resealed(made, tensors=unknown))
    negative = (TensorSpec("a", "int8", (-2, 3), 0), TensorSpec("b", "int8", (12,), -6))
    with pytest.raises(WeightsError, match=r"version 3: a of shape \(-2, 3\)"):
        check_manifest(resealed(made, tensors=negative, total_bytes=6))


# --- chains of deltas ---


VERSIONS = [numbered(number) for number in range(1, 5)]
CHAIN = tuple(delta(base, new, 300)[0] for base, new in pairwise(VERSIONS))
NEWEST = VERSIONS[-1].manifest


def with_delta(place: int, **changes: object) -> tuple[Delta, ...]:
    """The chain with a delta that says something else."""
    chain = list(CHAIN)
    chain[place] = msgspec.structs.replace(chain[place], **changes)
    return tuple(chain)


@pytest.mark.parametrize("first", range(4))
def test_check_chain_accepts_what_leads_to_the_manifest(first: int) -> None:
    check_chain(NEWEST, CHAIN[first:])


@pytest.mark.parametrize(
    "chain",
    [
        CHAIN[:2],
        CHAIN[:1],
        CHAIN[::-1],
        (*CHAIN, CHAIN[-1]),
        (CHAIN[0], CHAIN[2]),
        (CHAIN[1], CHAIN[1], CHAIN[2]),
        with_delta(2, digest="0" * 32),
        with_delta(2, digest=""),
        with_delta(2, version=5),
        with_delta(1, base_digest="0" * 32),
        with_delta(1, base=1),
        with_delta(1, version=2),
        with_delta(1, digest=CHAIN[0].digest),
        with_delta(0, digest=CHAIN[1].digest),
        with_delta(0, version=1),
    ],
)
def test_check_chain_refuses_deltas_that_do_not_lead_to_the_manifest(chain: tuple[Delta, ...]) -> None:
    with pytest.raises(WeightsError, match=r"version 4: a chain of deltas that makes \[.*\], expected \["):
        check_chain(NEWEST, chain)


@pytest.mark.parametrize(
    "chain",
    [with_delta(0, nbytes=-1), with_delta(1, nbytes=-300), with_delta(2, nbytes=401), with_delta(1, nbytes=2**60)],
)
def test_check_chain_refuses_deltas_of_impossible_sizes(chain: tuple[Delta, ...]) -> None:
    """Whoever pulls them makes room for them first."""
    with pytest.raises(WeightsError, match=r"version 4: deltas of \[.*\] bytes, of 1000"):
        check_chain(NEWEST, chain)
    check_chain(NEWEST, with_delta(2, nbytes=400))


# --- pieces and files ---


def test_chunk_is_a_view_and_never_reaches_outside() -> None:
    made = snapshot()
    assert bytes(made.chunk(4, 10) or b"") == DATA[4:14]
    assert bytes(made.chunk(16, 10) or b"") == DATA[16:26]
    for offset, length in [(-1, 2), (0, 27), (26, 1), (20, 7), (0, 0), (5, -1), (1 << 70, 1)]:
        assert made.chunk(offset, length) is None


@pytest.mark.parametrize(
    ("total", "chunk", "expected"),
    [
        (0, 4, []),
        (1, 4, [(0, 1)]),
        (8, 4, [(0, 4), (4, 4)]),
        (10, 4, [(0, 4), (4, 4), (8, 2)]),
        (3, 100, [(0, 3)]),
    ],
)
def test_chunk_ranges_cover_every_byte_once(total: int, chunk: int, expected: list[tuple[int, int]]) -> None:
    assert list(chunk_ranges(total, chunk)) == expected


def test_safetensors_file_gives_the_same_tensors_bit_for_bit(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    tensors = {
        "model.embed": torch.randn(7, 3, generator=generator).to(torch.bfloat16),
        "odd": torch.randint(-128, 127, (3,), dtype=torch.int8, generator=generator),
        "scalar": torch.tensor(3.25),
        "empty": torch.zeros(0, 5, dtype=torch.float16),
        "flag": torch.tensor([True, False, True]),
        "nan": torch.tensor([float("nan"), float("-inf"), -0.0]),
    }
    specs = layout((name, dtype_name(tensor.dtype), tuple(tensor.shape)) for name, tensor in tensors.items())
    data = b"".join(tensors[spec.name].reshape(-1).view(torch.uint8).numpy().tobytes() for spec in specs)
    head = safetensors_header(specs)
    assert len(head) % 8 == 0
    path = tmp_path / "staged.safetensors"
    path.write_bytes(head + data)
    loaded = load_file(path)
    assert set(loaded) == set(tensors)
    for name, tensor in tensors.items():
        assert loaded[name].dtype == tensor.dtype
        assert loaded[name].shape == tensor.shape
        assert torch.equal(loaded[name].reshape(-1).view(torch.uint8), tensor.reshape(-1).view(torch.uint8))


def test_tensor_view_shares_the_buffer_and_reads_what_was_written() -> None:
    buffer = torch.zeros(24, dtype=torch.uint8)
    spec = TensorSpec("x", "bfloat16", (2, 2), offset=8)
    tensor_view(spec, buffer).copy_(torch.tensor([[1.0, -2.0], [0.5, 3.0]]))
    assert buffer[8:16].view(torch.bfloat16).tolist() == [1.0, -2.0, 0.5, 3.0]
    assert buffer[:8].sum() == buffer[16:].sum() == 0
    assert tensor_view(TensorSpec("s", "float32", (), offset=4), buffer).shape == ()
