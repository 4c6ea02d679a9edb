"""Frames: round trips of every message, golden bytes, and what happens to damaged ones."""

from __future__ import annotations

import contextlib
import hashlib
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from protocol import codec
from protocol import messages as m
from protocol.errors import MalformedFrame, OversizedFrame, UnknownVersion, WireError

ids = st.builds(m.TicketId, st.integers(-(2**31), 2**31), st.integers(0, 2**62))
id_lists = st.lists(ids, max_size=3).map(tuple)
text = st.text(max_size=20)
tokens = st.lists(st.integers(0, 2**31 - 1), max_size=6).map(tuple)
seconds = st.floats(0, 1e6)
counts = st.integers(0, 2**50)
versions = st.integers(0, 2**40)
specs = st.lists(
    st.builds(
        m.TensorSpec,
        text,
        st.sampled_from(["bfloat16", "int32"]),
        st.lists(counts, max_size=3).map(tuple),
        counts,
        text,
    ),
    max_size=3,
).map(tuple)


@st.composite
def groups(draw: st.DrawFn) -> m.Group:
    completions = []
    for _ in range(draw(st.integers(0, 3))):
        length = draw(st.integers(0, 5))
        starts = sorted(draw(st.sets(st.integers(1, length - 1)))) if length > 1 else []
        spans = tuple((draw(versions), start) for start in [0, *starts]) if length else ()
        scores = draw(st.dictionaries(text, st.floats(-10, 10), max_size=2)) | {"reward": draw(st.floats(-10, 10))}
        reason = draw(st.sampled_from(["stop", "length", "abort"]))
        completions.append(m.Completion(length, spans, reason, scores, draw(text), draw(text)))
    total = sum(completion.num_tokens for completion in completions)
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    return m.Group(
        draw(ids), draw(st.sampled_from(["train", "eval"])), draw(counts), draw(text), draw(tokens), draw(seconds),
        tuple(completions), draw(seconds), draw(seconds),
        rng.integers(0, 1000, total, dtype="<i4").tobytes(), rng.normal(size=total).astype("<f4").tobytes(),
        b"\1" * total,
    )  # fmt: skip


samplings = st.builds(m.Sampling, counts, seconds, seconds, counts, seconds, st.lists(text, max_size=2).map(tuple))
FROM_ACTOR = st.one_of(
    st.builds(m.Hello, text, text, counts, id_lists, id_lists, versions, counts, text),
    st.builds(m.Heartbeat, id_lists, id_lists, counts, versions, text, seconds, counts, seconds, counts, seconds),
    groups(),
    st.builds(m.Failed, ids, counts, text),
    st.builds(m.Goodbye, text, text),
    st.just(m.ManifestRequest()),
    st.builds(m.ChunkRequest, versions, counts, counts),
)
FROM_LEARNER = st.one_of(
    st.builds(
        m.Welcome, text, text, text, counts, text, text, seconds, seconds, counts, counts,
        st.sampled_from(["keep", "recompute"]), counts, counts, seconds,
        st.dictionaries(text, st.one_of(text, counts, seconds, st.booleans()), max_size=3),
    ),
    st.just(m.Rehello()),
    st.builds(m.Refused, text),
    st.builds(
        m.Ticket, ids, st.sampled_from(["train", "eval"]), counts, tokens, text, text, counts, samplings,
        counts, versions,
    ),
    st.builds(m.Ack, id_lists),
    st.builds(m.Beat, versions),
    st.builds(m.Cancel, id_lists),
    st.builds(m.Drain, text, st.booleans()),
    st.builds(m.Manifest, versions, counts, specs, counts, text, counts, versions, counts),
    st.builds(m.Chunk, versions, counts, st.binary(max_size=50)),
    st.builds(m.Gone, versions, versions),
)  # fmt: skip


@given(FROM_ACTOR)
def test_codec_round_trips_what_actors_send(message: Any) -> None:
    assert codec.decode_from_actor([bytes(frame) for frame in codec.encode(message)]) == message


@given(FROM_LEARNER)
def test_codec_round_trips_what_the_learner_sends(message: Any) -> None:
    assert codec.decode_from_learner([bytes(frame) for frame in codec.encode(message)]) == message


def test_strategies_cover_every_message() -> None:
    """A message added to the protocol must be added to the round trips, and to the golden bytes."""
    assert {type(example) for example, _ in GOLDEN} == set(codec.FROM_ACTOR) | set(codec.FROM_LEARNER)


@given(FROM_ACTOR, st.data())
@settings(max_examples=300)
def test_codec_truncated_or_corrupted_frames_raise_wire_errors_only(message: Any, data: st.DataObject) -> None:
    frames = [bytearray(frame) for frame in codec.encode(message)]
    victim = data.draw(st.integers(0, len(frames) - 1))
    fault = data.draw(st.sampled_from(["truncate", "flip", "drop", "append"]))
    if fault == "truncate":
        del frames[victim][data.draw(st.integers(0, max(0, len(frames[victim]) - 1))) :]
    elif fault == "flip" and frames[victim]:
        frames[victim][data.draw(st.integers(0, len(frames[victim]) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    elif fault == "drop":
        del frames[victim]
    else:
        frames.append(bytearray(data.draw(st.binary(max_size=4))))
    with contextlib.suppress(WireError):  # a flip inside a number may also go through, and is then a valid message
        codec.decode_from_actor([bytes(frame) for frame in frames])


@given(st.lists(st.binary(max_size=60), max_size=4))
@settings(max_examples=300)
def test_codec_arbitrary_bytes_raise_wire_errors_only(frames: list[bytes]) -> None:
    with pytest.raises(WireError):
        codec.decode_from_actor(frames)


@pytest.mark.parametrize("cut", range(1, 40))
def test_codec_every_truncation_of_a_head_is_malformed(cut: int) -> None:
    (head,) = codec.encode(m.Failed(m.TicketId(0, 3), 1, "no room left"))
    with pytest.raises(MalformedFrame):
        codec.decode_from_actor([head[:-cut]])


def test_codec_unknown_version_is_named() -> None:
    (head,) = codec.encode(m.Goodbye("bye"))
    with pytest.raises(UnknownVersion, match="version 9, this side speaks 1"):
        codec.decode_from_actor([head[:4] + b"\x09" + head[5:]])


def test_codec_refuses_messages_of_the_other_direction() -> None:
    with pytest.raises(MalformedFrame, match="ack"):
        codec.decode_from_actor(codec.encode(m.Ack((m.TicketId(0, 1),))))


def test_codec_limits_frames_by_number_and_size() -> None:
    limits = codec.Limits(max_frame_bytes=100, max_frames=3)
    with pytest.raises(OversizedFrame, match="4 frames, allowed: 3"):
        codec.decode_from_actor([b"x"] * 4, limits)
    with pytest.raises(OversizedFrame, match="101 bytes, allowed: 100"):
        codec.decode_from_actor([b"x" * 101], limits)


def a_group(**changes: Any) -> m.Group:
    completions = (
        m.Completion(2, ((3, 0), (4, 1)), "stop", {"reward": 1.0, "format": 1.0}, "7"),
        m.Completion(1, ((4, 0),), "length", {"reward": 0.0}),
    )
    group = m.Group(
        m.TicketId(0, 5), "train", 1, "actor-0", (1, 2, 3), 1.0, completions, 0.5, 0.25,
        np.array([7, 8, 9], "<i4").tobytes(), np.array([-0.5, -1, -2], "<f4").tobytes(), b"\1\1\1",
    )  # fmt: skip
    return msgspec.structs.replace(group, **changes)


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"token_ids": b"\0" * 8}, "token_ids has 8 bytes, expected 12"),
        ({"logprobs": b""}, "logprobs has 0 bytes, expected 12"),
        ({"mask": b"\1" * 4}, "mask has 4 bytes, expected 3"),
        ({"completions": (m.Completion(3, ((1, 1),), "stop", {"reward": 0.0}),)}, "do not start at token 0"),
        ({"completions": (m.Completion(3, (), "stop", {"reward": 0.0}),)}, "do not start at token 0"),
        ({"completions": (m.Completion(3, ((1, 0), (2, 3)), "stop", {"reward": 0.0}),)}, "out of order or range"),
        ({"completions": (m.Completion(3, ((1, 0), (2, 2), (3, 1)), "stop", {"reward": 0.0}),)}, "out of order"),
        ({"completions": (m.Completion(3, ((1, 0),), "stop", {"format": 0.0}),)}, 'no finite "reward"'),
        ({"completions": (m.Completion(3, ((1, 0),), "stop", {"reward": float("nan")}),)}, 'no finite "reward"'),
    ],
)
def test_codec_refuses_groups_whose_parts_do_not_fit(changes: dict[str, Any], complaint: str) -> None:
    with pytest.raises(MalformedFrame, match=complaint):
        codec.decode_from_actor(codec.encode(a_group(**changes)))


@given(st.lists(st.binary(max_size=30), max_size=5))
def test_join_frames_round_trips(frames: list[bytes]) -> None:
    assert codec.split_frames(codec.join_frames(frames)) == frames


@given(st.lists(st.binary(max_size=30), min_size=1, max_size=3), st.integers(1, 20))
def test_split_frames_refuses_truncation(frames: list[bytes], cut: int) -> None:
    joined = codec.join_frames(frames)
    with pytest.raises(MalformedFrame):
        codec.split_frames(joined[: max(0, len(joined) - cut)])


GOLDEN: list[tuple[Any, str]] = [
    (m.Hello("actor-0", "ab12", 4, (m.TicketId(0, 1),), (), 3, 42, "node"), "7d534a5a1dae5d1e"),
    (m.Heartbeat((m.TicketId(0, 1),), (m.TicketId(0, 2),), 2, 3, "serving", 1.5), "f2a2a1831c7ad98f"),
    (a_group(), "3607f38aa10030ce"),
    (m.Failed(m.TicketId(0, 1), 2, "why"), "fd95f21662f024ed"),
    (m.Goodbye("drained"), "f01afe474113c258"),
    (m.ManifestRequest(), "d04d4454cee60d16"),
    (m.ChunkRequest(3, 8, 16), "d07c4a028aeb1fe3"),
    (m.Welcome("run", "model", "bfloat16", 128, "tcp://b", "tcp://n", 1.0, 15.0, 0, 8), "ff1df943265606e3"),
    (m.Rehello(), "481eed4105ed1593"),
    (m.Refused("no"), "0a4cb7d098c570e5"),
    (m.Ticket(m.TicketId(0, 1), "train", 1, (1, 2), "7", "integer", 8, m.Sampling(16), 5, 2), "29c87942ea664b64"),
    (m.Ack((m.TicketId(-1, 2),)), "8d5c5fcb30b98707"),
    (m.Beat(4), "1352995211dfae45"),
    (m.Cancel((m.TicketId(0, 1),)), "22aa40636b220953"),
    (m.Drain("over"), "89408fa23fce027f"),
    (m.Manifest(1, 0, (m.TensorSpec("w", "bfloat16", (2, 3), 0, "d"),), 12, "", sent_bytes=12), "7b327d70e6a670af"),
    (m.Chunk(3, 8, b"abc"), "1841cd5b5aad2cad"),
    (m.Gone(1, 2), "5098f93f4df646ec"),
]  # fmt: skip
"""Message -> first 16 hex digits of the SHA-256 of its frames. They change only with PROTOCOL_VERSION, or when a field
with a default is appended; `docs/protocol.md` says how to add one."""


@pytest.mark.parametrize(("message", "golden"), GOLDEN, ids=[type(message).__name__ for message, _ in GOLDEN])
def test_codec_golden_bytes(message: Any, golden: str) -> None:
    frames = codec.encode(message)
    assert hashlib.sha256(codec.join_frames(frames)).hexdigest()[:16] == golden


def test_codec_golden_bytes_spelled_out() -> None:
    """One message byte by byte, for people who write a second client."""
    assert codec.encode(m.Ack((m.TicketId(0, 7),))) == [b"TNDM\x01\x82\xa1t\xa3ack\xa3ids\x91\x92\x00\x07"]
