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
forms = st.sampled_from(["snapshot", "delta"])
manifests = st.builds(m.Manifest, versions, counts, specs, counts, text, counts)
parts = st.builds(m.DeltaPart, counts, st.sampled_from(["delta", "moves", "zstd", "dense"]), counts)
deltas = st.builds(
    m.Delta, versions, versions, text, text, st.lists(parts, max_size=3).map(tuple), counts, text
)  # fmt: skip


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


@st.composite
def probed(draw: st.DrawFn) -> m.Probed:
    lengths = tuple(draw(st.lists(st.integers(0, 5), max_size=3)))
    buffers = (draw(st.binary(min_size=4 * sum(lengths), max_size=4 * sum(lengths))) for _ in range(2))
    return m.Probed(draw(versions), lengths, draw(text), *buffers)


samplings = st.builds(m.Sampling, counts, seconds, seconds, counts, seconds, st.lists(text, max_size=2).map(tuple))
FROM_ACTOR = st.one_of(
    st.builds(m.Hello, text, text, counts, id_lists, id_lists, versions, counts, text),
    st.builds(m.Heartbeat, id_lists, id_lists, counts, versions, text, seconds, counts, seconds, counts, seconds),
    groups(),
    st.builds(m.Failed, ids, counts, text),
    st.builds(m.Goodbye, text, text),
    probed(),
    st.builds(m.UpdateRequest, versions, text),
    st.builds(m.ChunkRequest, versions, counts, counts, forms),
    st.builds(m.EngineMetrics, st.binary(max_size=50)),
)
FROM_LEARNER = st.one_of(
    st.builds(
        m.Welcome, text, text, text, counts, text, text, seconds, seconds, counts, counts,
        st.sampled_from(["keep", "recompute"]), counts, counts, seconds,
        st.dictionaries(text, st.one_of(text, counts, seconds, st.booleans()), max_size=3),
        st.sampled_from(["version", "shared"]), seconds,
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
    st.builds(m.Probe, versions, st.lists(tokens, max_size=2).map(tuple), counts, counts),
    st.builds(m.Update, manifests, st.lists(deltas, max_size=3).map(tuple), st.binary(max_size=50)),
    st.builds(m.Chunk, versions, counts, forms, st.binary(max_size=50)),
    st.builds(m.Gone, versions, versions, forms),
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


@given(st.one_of(FROM_ACTOR, FROM_LEARNER), st.data())
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
    decode = codec.decode_from_actor if type(message) in codec.FROM_ACTOR else codec.decode_from_learner
    with contextlib.suppress(WireError):  # a flip inside a number may also go through, and is then a valid message
        decode([bytes(frame) for frame in frames])


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
    with pytest.raises(UnknownVersion, match="version 9, this side speaks 2"):
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


@pytest.mark.parametrize(
    ("num_tokens", "token_ids", "logprobs"),
    [((2, 1), 12, 8), ((2, 1), 8, 12), ((2, 1), 11, 11), ((2, -2), 0, 0), ((4, -1), 12, 12), ((), 4, 4)],
)
def test_codec_refuses_probes_whose_parts_do_not_fit(
    num_tokens: tuple[int, ...], token_ids: int, logprobs: int
) -> None:
    with pytest.raises(MalformedFrame, match=rf"probe of {sum(num_tokens)} tokens with buffers of \({token_ids}, "):
        codec.decode_from_actor(codec.encode(m.Probed(1, num_tokens, "", bytes(token_ids), bytes(logprobs))))


@pytest.mark.parametrize("message", [m.ChunkRequest(1, 0, 5), m.ChunkRequest(1, 0, 5, "delta")])
def test_codec_refuses_a_form_of_weights_that_there_is_not(message: m.ChunkRequest) -> None:
    (head,) = codec.encode(message)
    form = message.form.encode()
    with pytest.raises(MalformedFrame, match="Invalid enum value"):
        codec.decode_from_actor([bytes(head).replace(form, form[:-1] + b"s")])


def test_codec_decodes_the_payload_of_an_update_without_a_copy() -> None:
    update = m.Update(MANIFEST, (DELTA,), b"abc")
    head, payload = codec.encode(update)
    assert payload is update.payload
    assert b"abc" not in bytes(head)
    view = memoryview(b"abc")
    assert codec.decode_from_learner([head, view]).payload is view
    for frames in ([head], [head, payload, payload]):
        with pytest.raises(MalformedFrame, match=f"Update has 1 buffers, found {len(frames) - 1}"):
            codec.decode_from_learner(frames)


def test_codec_reads_what_an_older_peer_left_out() -> None:
    """Fields with defaults may be missing: they were appended after that peer was written."""
    head = b"TNDM\x02" + msgspec.msgpack.encode({"t": "chunk?", "version": 3, "offset": 8, "length": 16})
    assert codec.decode_from_actor([head]) == m.ChunkRequest(3, 8, 16, "snapshot")
    assert codec.decode_from_actor([b"TNDM\x02" + msgspec.msgpack.encode({"t": "update?"})]) == m.UpdateRequest()
    welcome = m.Welcome("run", "model", "bfloat16", 128, "tcp://b", "tcp://n", 1.0, 15.0, 0, 8)
    older = msgspec.to_builtins(welcome)
    del older["engine_metrics_s"]
    assert codec.decode_from_learner([b"TNDM\x02" + msgspec.msgpack.encode(older)]) == welcome


@given(st.lists(st.binary(max_size=30), max_size=5))
def test_join_frames_round_trips(frames: list[bytes]) -> None:
    assert codec.split_frames(codec.join_frames(frames)) == frames


@given(st.lists(st.binary(max_size=30), min_size=1, max_size=3), st.integers(1, 20))
def test_split_frames_refuses_truncation(frames: list[bytes], cut: int) -> None:
    joined = codec.join_frames(frames)
    with pytest.raises(MalformedFrame):
        codec.split_frames(joined[: max(0, len(joined) - cut)])


MANIFEST = m.Manifest(2, 1, (m.TensorSpec("w", "bfloat16", (2, 3), 0, "d"),), 12, "e")
DELTA = m.Delta(2, 1, "f", "e", (m.DeltaPart(1, "delta", 3),), 3, "g")
GOLDEN: list[tuple[Any, str]] = [
    (m.Hello("actor-0", "ab12", 4, (m.TicketId(0, 1),), (), 3, 42, "node"), "229bb531fc4670a9"),
    (m.Heartbeat((m.TicketId(0, 1),), (m.TicketId(0, 2),), 2, 3, "serving", 1.5), "37eb7fb2340ad59c"),
    (a_group(), "fa2fc21c6a854f3b"),
    (m.Failed(m.TicketId(0, 1), 2, "why"), "02fcf3da40527725"),
    (m.Goodbye("drained"), "825e2f3b94b460ff"),
    (m.Probed(3, (2, 1), "c", b"\1\0\0\0" * 3, b"\0\0\0\xbf" * 3), "c10c9b4bba1e73d0"),
    (m.UpdateRequest(2, "d"), "b6fd383e0c790309"),
    (m.ChunkRequest(3, 8, 16), "44390cbf15a2c1ad"),
    (m.EngineMetrics(b"abc"), "5a8eb696f9f8f776"),
    (m.Welcome("run", "model", "bfloat16", 128, "tcp://b", "tcp://n", 1.0, 15.0, 0, 8, window=2), "a2aa451752870cc5"),
    (m.Rehello(), "5e7728b1eed865ec"),
    (m.Refused("no"), "6b4ccb666694e2ac"),
    (m.Ticket(m.TicketId(0, 1), "train", 1, (1, 2), "7", "integer", 8, m.Sampling(16), 5, 2), "c3379f6254129c72"),
    (m.Ack((m.TicketId(-1, 2),)), "0846a7ffd8f57d77"),
    (m.Beat(4), "faa3fb1f25539703"),
    (m.Cancel((m.TicketId(0, 1),)), "f14452a9cd8e1651"),
    (m.Drain("over"), "d4cb77ce8de4bfb4"),
    (m.Probe(3, ((1, 2), (3,)), 16, 5), "6f59ffb10504e6f1"),
    (m.Update(MANIFEST, (DELTA,), b"abc"), "a37ff3aa2a0a39e4"),
    (m.Chunk(3, 8, "delta", b"abc"), "f4f7ea67fe33fe47"),
    (m.Gone(1, 2), "d5f21ffa6cee5520"),
]  # fmt: skip
"""Message -> first 16 hex digits of the SHA-256 of its frames. They change only with PROTOCOL_VERSION, or when a field
with a default is appended; `docs/protocol.md` says how to add one."""


@pytest.mark.parametrize(("message", "golden"), GOLDEN, ids=[type(message).__name__ for message, _ in GOLDEN])
def test_codec_golden_bytes(message: Any, golden: str) -> None:
    frames = codec.encode(message)
    assert hashlib.sha256(codec.join_frames(frames)).hexdigest()[:16] == golden


def test_codec_golden_bytes_spelled_out() -> None:
    """One message byte by byte, for people who write a second client."""
    assert codec.encode(m.Ack((m.TicketId(0, 7),))) == [b"TNDM\x02\x82\xa1t\xa3ack\xa3ids\x91\x92\x00\x07"]
