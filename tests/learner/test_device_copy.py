"""What changed since the last version, found where the model is, as the host would find it. Here that is the CPU."""

from __future__ import annotations

import torch

from learner.device_copy import Change, DeviceCopy, write
from learner.publish import flatten
from protocol.deltas import DeltaCoder
from protocol.messages import TensorSpec
from protocol.tensors import nbytes
from protocol.weights import make_snapshot

NAN, OTHER_NAN = 0x7FC0, 0x7FC1


def state(seed: int, share: float = 0.0) -> dict[str, torch.Tensor]:
    """Weights, of which a share has moved by one bit pattern since seed 0."""
    fixed, moving = torch.Generator().manual_seed(0), torch.Generator().manual_seed(seed)
    found: dict[str, torch.Tensor] = {}
    for name, shape, dtype in [
        ("wide", (40, 30), torch.bfloat16), ("norm", (30,), torch.float32), ("scale", (), torch.float32),
        ("none", (0, 3), torch.bfloat16), ("counts", (7,), torch.int64), ("flags", (5,), torch.bool),
    ]:  # fmt: skip
        tensor = (10 * torch.randn(shape, generator=fixed)).to(dtype)
        if share and dtype is torch.bfloat16:
            moved = torch.rand(shape, generator=moving) < share
            tensor = (tensor.view(torch.int16) + moved.to(torch.int16)).view(torch.bfloat16)
        found[name] = tensor
    return found


def assembled(changes: dict[str, Change], specs: tuple[TensorSpec, ...], before: torch.Tensor) -> torch.Tensor:
    buffer = before.clone()
    for spec in specs:
        write(changes[spec.name], buffer[spec.offset : spec.offset + nbytes(spec)])
    return buffer


def test_changes_bring_a_host_copy_up_to_date_and_encode_to_the_same_delta() -> None:
    copy = DeviceCopy()
    first = copy.advance(state(0))
    assert all(indices is None for indices, _ in first.values()), "there was nothing before"
    specs, before = flatten(state(0))
    assert torch.equal(assembled(first, specs, torch.zeros_like(before)), before)
    last = make_snapshot(1, 0, specs, before.numpy().data)
    for version, share in enumerate((0.01, 0.0, 0.1), start=2):
        now = state(version, share)
        changes = copy.advance(now)
        buffer = assembled(changes, specs, before)
        assert torch.equal(buffer, flatten(now)[1])
        new = make_snapshot(version, 0, specs, buffer.numpy().data)
        changed = [changes[spec.name][0] for spec in specs]
        given = DeltaCoder().encode(last, new, [None if one is None else one.numpy() for one in changed])
        assert given is not None and given == DeltaCoder().encode(last, new)
        last, before = new, buffer


def test_tensor_that_changed_everywhere_or_looks_otherwise_is_copied_whole() -> None:
    copy = DeviceCopy()
    copy.advance(state(0))
    now = state(1, 0.9) | {"norm": torch.ones(31), "more": torch.ones(3)}
    changes = copy.advance(now)
    assert {name for name, (indices, _) in changes.items() if indices is None} == {"wide", "norm", "more"}
    specs, buffer = flatten(now)
    untouched = {"scale", "counts", "flags"}
    before = torch.zeros_like(buffer)
    for spec in specs:
        if spec.name in untouched:
            before[spec.offset : spec.offset + nbytes(spec)] = buffer[spec.offset : spec.offset + nbytes(spec)]
    assert torch.equal(assembled(changes, specs, before), buffer)


def test_bits_are_compared_and_not_values() -> None:
    def of(*bits: int) -> dict[str, torch.Tensor]:
        return {"w": torch.tensor([*bits, *[0] * 20], dtype=torch.int32).to(torch.int16).view(torch.bfloat16)}

    copy = DeviceCopy()
    copy.advance(of(NAN, 0x0000, NAN))
    indices, bits = copy.advance(of(NAN, -0x8000, OTHER_NAN))["w"]
    assert indices is not None and indices.tolist() == [1, 2]
    assert bits.tolist() == [-0x8000, OTHER_NAN]
