"""Groups for the simulated actors of `scale_actors.py`: made once, sent over and over under other ids.

Lengths are log-normal, 256 tokens on average; prompts have 200 tokens, responses 4 characters of text for each token.
Only the ticket's id, the actor's name and the version are put into a prepared header, so that the senders are not what
is measured.
"""

from __future__ import annotations

import msgspec
import numpy as np

from protocol import codec
from protocol.messages import Completion, Group, TicketId

GROUP_SIZE, MEAN_TOKENS, MAX_TOKENS = 8, 256, 1_024
PROMPT = tuple(range(1_000, 1_200))
VOCABULARY = 50_000
SKEW = 0.8
"""Standard deviation of the logarithm of a completion's length: the longest tenth is beyond twice the mean."""
CHARACTERS_PER_TOKEN = 4
POOL = 64
"""Different groups that are prepared."""
_ID, _NAME = TicketId(0x7FFF_FFF1, 0x7FFF_FFF3), "name-of-the-actor"


def make_groups(seed: int = 0) -> list[Group]:
    """Groups of 8 completions with log-normal lengths, 256 tokens on average, random tokens and text."""
    draw = np.random.default_rng(seed)
    lengths = np.exp(draw.normal(0, SKEW, (POOL, GROUP_SIZE)))
    for _ in range(10):  # cutting the longest moves the mean
        lengths = np.clip(lengths * MEAN_TOKENS / lengths.mean(), 1, MAX_TOKENS)
    return [_group(draw, [round(length) for length in row]) for row in lengths]


def _group(draw: np.random.Generator, lengths: list[int]) -> Group:
    count = sum(lengths)
    letters = np.frombuffer(b"abcdefghijklmnopqrstuvwxyz      ", np.uint8)
    texts = [letters[draw.integers(0, 32, CHARACTERS_PER_TOKEN * n)].tobytes().decode() for n in lengths]
    return Group(
        id=_ID, kind="train", attempt=1, actor=_NAME, prompt_ids=PROMPT, temperature=1.0,
        completions=tuple(
            Completion(n, ((1, 0),), "length" if n == MAX_TOKENS else "stop", {"reward": float(draw.integers(2))}, text)
            for n, text in zip(lengths, texts, strict=True)
        ),
        generate_s=float(draw.random()), grade_s=float(draw.random()),
        token_ids=draw.integers(0, VOCABULARY, count).astype("<i4").tobytes(),
        logprobs=(-draw.exponential(0.5, count)).astype("<f4").tobytes(),
        mask=bytes([1]) * count,
    )  # fmt: skip


class Prepared:
    """A group's frames for one version, ready but for the ticket's id and the actor's name."""

    def __init__(self, group: Group, version: int) -> None:
        completions = tuple(msgspec.structs.replace(c, spans=((version, 0),)) for c in group.completions)
        head, *self.buffers = codec.encode(msgspec.structs.replace(group, completions=completions))
        before, rest = bytes(head).split(msgspec.msgpack.encode(_ID))
        between, after = rest.split(msgspec.msgpack.encode(_NAME))
        self._pieces = before, between, after
        self.num_tokens = group.num_tokens

    def frames(self, ticket_id: TicketId, name: bytes) -> list[codec.Frame]:
        """`name`: the actor's, in MessagePack."""
        before, between, after = self._pieces
        return [b"".join((before, msgspec.msgpack.encode(ticket_id), between, name, after)), *self.buffers]
