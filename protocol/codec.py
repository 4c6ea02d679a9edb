"""Message <-> frames. The only user of MessagePack; knows no socket.

On every socket a message is one head frame, then one frame for each of its raw buffers:

    head     = b"TNDM", one byte of protocol version, a MessagePack map (the header; key "t" names the message)
    buffer   = little-endian tensor bytes, as the message's docstring declares

Headers are decoded against the declared types of `messages.py`; nothing received is evaluated, imported or unpickled.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Union

import msgspec

from protocol import messages as m
from protocol.errors import MalformedFrame, OversizedFrame, UnknownVersion

MAGIC = b"TNDM"
PREAMBLE_BYTES = len(MAGIC) + 1

FROM_ACTOR = (m.Hello, m.Heartbeat, m.Group, m.Failed, m.Goodbye, m.Probed, m.UpdateRequest, m.ChunkRequest)
FROM_LEARNER = (
    m.Welcome, m.Rehello, m.Refused, m.Ticket, m.Ack, m.Beat, m.Probe, m.Cancel, m.Drain, m.Update, m.Chunk, m.Gone,
)  # fmt: skip

BUFFER_FIELDS: dict[type, tuple[str, ...]] = {
    m.Group: ("token_ids", "logprobs", "mask"),
    m.Chunk: ("data",),
    m.Update: ("payload",),
    m.Probed: ("token_ids", "logprobs"),
}
GROUP_ITEM_BYTES = (4, 4, 1)
"""Bytes of one token in each of a group's buffers: int32, float32, uint8."""

JOINED_ID_BYTES = 64
"""From its first bytes `joined_group_id` tells a joined group's id."""
_FOUR_FRAMES = 4 + 4 * 4
_GROUP_BEGINS = b"\xa1t\xa5group\xa2id\x92"
"""MessagePack: "t" -> "group", "id" -> an array of two. Fields are encoded in their order, which never changes."""
_INTEGERS = {0xCC: ">B", 0xCD: ">H", 0xCE: ">I", 0xCF: ">Q", 0xD0: ">b", 0xD1: ">h", 0xD2: ">i", 0xD3: ">q"}

Frame = bytes | memoryview


@dataclass(frozen=True)
class Limits:
    """What a receiver accepts before it looks inside. ZeroMQ limits a frame; the number of frames is limited here."""

    max_frame_bytes: int = 64 << 20
    max_frames: int = 8

    def check(self, frames: Sequence[Any]) -> None:
        """Raise OversizedFrame if a multipart message has too many frames, or one that is too large."""
        if len(frames) > self.max_frames:
            raise OversizedFrame(f"{len(frames)} frames, allowed: {self.max_frames}")
        largest = max((len(frame) for frame in frames), default=0)
        if largest > self.max_frame_bytes:
            raise OversizedFrame(f"a frame of {largest} bytes, allowed: {self.max_frame_bytes}")


DEFAULT_LIMITS = Limits()

_encoder = msgspec.msgpack.Encoder()
_from_actor = msgspec.msgpack.Decoder(Union[FROM_ACTOR])  # noqa: UP007 - built from a tuple
_from_learner = msgspec.msgpack.Decoder(Union[FROM_LEARNER])  # noqa: UP007


def encode(message: m.Message) -> list[Frame]:
    """Frames of a message: the head and its buffers, the latter without a copy."""
    names = BUFFER_FIELDS.get(type(message), ())
    buffers = [getattr(message, name) for name in names]
    if names:
        message = msgspec.structs.replace(message, **dict.fromkeys(names, b""))
    head = bytearray(MAGIC + bytes([m.PROTOCOL_VERSION]))
    _encoder.encode_into(message, head, PREAMBLE_BYTES)
    return [bytes(head), *buffers]


def decode_from_actor(frames: Sequence[Frame], limits: Limits = DEFAULT_LIMITS) -> Any:
    """Message of an actor. Raises MalformedFrame, OversizedFrame or UnknownVersion, never anything else."""
    return _decode(_from_actor, frames, limits)


def decode_from_learner(frames: Sequence[Frame], limits: Limits = DEFAULT_LIMITS) -> Any:
    """Message of the learner. Raises MalformedFrame, OversizedFrame or UnknownVersion, never anything else."""
    return _decode(_from_learner, frames, limits)


def _decode(decoder: msgspec.msgpack.Decoder[Any], frames: Sequence[Frame], limits: Limits) -> Any:
    limits.check(frames)
    if not frames:
        raise MalformedFrame("a message without frames")
    head = bytes(frames[0])
    if len(head) < PREAMBLE_BYTES or head[: len(MAGIC)] != MAGIC:
        raise MalformedFrame(f"no {MAGIC!r} at the start of a head of {len(head)} bytes")
    if head[len(MAGIC)] != m.PROTOCOL_VERSION:
        raise UnknownVersion(found=head[len(MAGIC)], spoken=m.PROTOCOL_VERSION)
    try:
        message = decoder.decode(head[PREAMBLE_BYTES:])
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise MalformedFrame(f"header: {error}") from None
    names = BUFFER_FIELDS.get(type(message), ())
    if len(frames) - 1 != len(names):
        raise MalformedFrame(f"{type(message).__name__} has {len(names)} buffers, found {len(frames) - 1}")
    if names:
        message = msgspec.structs.replace(message, **dict(zip(names, frames[1:], strict=True)))
    if isinstance(message, m.Group):
        _check_group(message)
    if isinstance(message, m.Probed):
        found, count = (len(message.token_ids), len(message.logprobs)), sum(message.num_tokens)
        if min(message.num_tokens, default=0) < 0 or found != (4 * count, 4 * count):
            raise MalformedFrame(f"probe of {count} tokens with buffers of {found} bytes")
    return message


def _check_group(group: m.Group) -> None:
    """Raise MalformedFrame unless lengths, spans and scores fit together, so that nobody downstream need doubt them."""
    if any(completion.num_tokens < 0 for completion in group.completions):
        raise MalformedFrame(f"group {group.id}: negative num_tokens")
    for name, item in zip(BUFFER_FIELDS[m.Group], GROUP_ITEM_BYTES, strict=True):
        found = len(getattr(group, name))
        if found != group.num_tokens * item:
            raise MalformedFrame(f"group {group.id}: {name} has {found} bytes, expected {group.num_tokens * item}")
    for completion in group.completions:
        starts = [start for _, start in completion.spans]
        if completion.num_tokens and (not starts or starts[0] != 0):
            raise MalformedFrame(f"group {group.id}: version spans do not start at token 0: {completion.spans}")
        if starts != sorted(set(starts)) or (starts and starts[-1] >= max(completion.num_tokens, 1)):
            raise MalformedFrame(f"group {group.id}: version spans out of order or range: {completion.spans}")
        if not math.isfinite(completion.scores.get("reward", math.nan)):
            raise MalformedFrame(f'group {group.id}: no finite "reward" in {completion.scores}')


def join_frames(frames: Sequence[Frame]) -> bytes:
    """One byte string that `split_frames` takes apart: for the journal. Count and lengths are little-endian uint32."""
    lengths = [len(frame) for frame in frames]
    return b"".join([struct.pack(f"<I{len(lengths)}I", len(lengths), *lengths), *frames])


def split_frames(data: bytes) -> list[Frame]:
    """Inverse of `join_frames`. Raises MalformedFrame if the lengths do not add up."""
    try:
        (count,) = struct.unpack_from("<I", data)
        lengths = struct.unpack_from(f"<{count}I", data, 4)
    except struct.error as error:
        raise MalformedFrame(f"joined frames: {error}") from None
    offset = 4 + 4 * count
    frames: list[Frame] = []
    for length in lengths:
        frames.append(data[offset : offset + length])
        offset += length
    if offset != len(data):
        raise MalformedFrame(f"joined frames: lengths add up to {offset}, found {len(data)} bytes")
    return frames


def joined_group_id(data: bytes) -> m.TicketId | None:
    """Ticket of a group that `encode` and `join_frames` made, from the first JOINED_ID_BYTES of it.

    None if they look otherwise; `decode_from_actor` then knows. Nothing is checked that lies behind the id.
    """
    begin = data.find(_GROUP_BEGINS, _FOUR_FRAMES + PREAMBLE_BYTES)
    if begin < 0 or data[_FOUR_FRAMES : _FOUR_FRAMES + len(MAGIC)] != MAGIC:
        return None
    at, numbers = begin + len(_GROUP_BEGINS), []
    try:
        for _ in range(2):
            number, at = _integer(data, at)
            numbers.append(number)
    except (KeyError, IndexError, struct.error):
        return None
    return m.TicketId(*numbers)


def _integer(data: bytes, at: int) -> tuple[int, int]:
    """A MessagePack integer at `at`, and where it ends."""
    first = data[at]
    if first < 0x80 or first >= 0xE0:
        return first - (256 if first >= 0xE0 else 0), at + 1
    form = _INTEGERS[first]
    (number,) = struct.unpack_from(form, data, at + 1)
    return number, at + 1 + struct.calcsize(form)
