"""Every message that crosses the wire: one frozen structure each, a unit and a shape on every field.

A message is a MessagePack map (the header) and, for some, raw tensor buffers in frames of their own; `codec.py` turns
messages into frames, `docs/protocol.md` says which message travels on which socket. Fields are only ever appended, with
defaults, so that an older peer can still read a newer header; a change of meaning raises `PROTOCOL_VERSION`.

Versions: a weight version is a positive integer that only grows and never names other bytes; 0 means "none yet".
"""

from __future__ import annotations

from typing import Literal

from msgspec import Struct, field

PROTOCOL_VERSION = 2

Kind = Literal["train", "eval"]
Form = Literal["snapshot", "delta"]


class Message(Struct, frozen=True, tag_field="t", omit_defaults=False, forbid_unknown_fields=False, gc=False):
    """Base of everything that is sent. Messages hold no cycles (`gc=False`), and a learner holds ten thousands of them:
    looking through those took the collector as long as decoding them."""


class TensorSpec(Struct, frozen=True, array_like=True):
    """Describes the raw little-endian buffer of one tensor."""

    name: str
    dtype: str
    """One of `protocol.tensors.DTYPES`, e.g. "bfloat16", "float32", "int32"."""
    shape: tuple[int, ...]
    offset: int = 0
    """First byte within the snapshot (weights only)."""
    digest: str = ""
    """xxh3-128 of the tensor's bytes, hexadecimal (weights only)."""


# --- work: ROUTER (learner) / DEALER (actor) ------------------------------------------------------------------------


class TicketId(Struct, frozen=True, array_like=True, order=True, gc=False):
    """Names one ticket for the whole run, across restarts: `index` counts up without gaps within `epoch`."""

    epoch: int
    index: int

    def __str__(self) -> str:
        return f"{self.epoch}/{self.index}"


class Sampling(Struct, frozen=True, gc=False):
    """How completions are drawn. Train tickets keep `top_p`, `top_k` and `min_p` off: they would bias the gradient."""

    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    """0: off."""
    min_p: float = 0.0
    stop: tuple[str, ...] = ()


class Ticket(Message, frozen=True, tag="ticket"):
    """Learner -> actor. A lease on one prompt: the actor owes one group for it, or a `Failed`."""

    id: TicketId
    kind: Kind
    attempt: int
    """1 for the first issue; grows when a lease was lost and the ticket is issued again."""
    prompt_ids: tuple[int, ...]
    """Token ids of the whole prompt, special tokens included. The actor adds nothing."""
    answer: str
    """Reference answer, for the grader only."""
    grader: str
    """Name in the actor's registry of graders. Looked up, never imported."""
    group_size: int
    sampling: Sampling
    seed: int
    """Completion i is drawn with a seed derived from (seed, i)."""
    min_version: int
    """The actor starts this ticket only when it serves at least this version."""


class Completion(Struct, frozen=True, gc=False):
    """One completion of a group. Its tokens lie in the group's buffers, `num_tokens` long, in order of completions."""

    num_tokens: int
    spans: tuple[tuple[int, int], ...]
    """(version, first token index) in growing order of index; says which weights drew which token. From the engine."""
    finish_reason: str
    """"stop" (end of sequence or a stop string), "length" or "abort"."""
    scores: dict[str, float]
    """Named scores of the grader; always has "reward"."""
    text: str = ""
    """Detokenized response, for people who read samples. Never tokenized again."""
    grader_error: str = ""
    """Why the grader gave no score (time limit, exception); the reward is then 0 and the sample is counted."""


class Group(Message, frozen=True, tag="group"):
    """Actor -> learner. What one ticket became.

    Buffers, in this order: `token_ids` int32 [T], `logprobs` float32 [T], `mask` uint8 [T], where T is the sum of
    `num_tokens`. Logprobs are the engine's, of the sampled tokens, after temperature (`processed_logprobs`). The mask
    is 1 where a token may be trained on.
    """

    id: TicketId
    kind: Kind
    attempt: int
    actor: str
    prompt_ids: tuple[int, ...]
    temperature: float
    completions: tuple[Completion, ...]
    generate_s: float = 0.0
    """Seconds from the start of the ticket to its last completion."""
    grade_s: float = 0.0
    token_ids: bytes = b""
    logprobs: bytes = b""
    mask: bytes = b""

    @property
    def rewards(self) -> tuple[float, ...]:
        return tuple(c.scores["reward"] for c in self.completions)

    @property
    def num_tokens(self) -> int:
        return sum(c.num_tokens for c in self.completions)


class Failed(Message, frozen=True, tag="failed"):
    """Actor -> learner. The ticket could not be turned into a group; the lease goes back."""

    id: TicketId
    attempt: int
    error: str


class Hello(Message, frozen=True, tag="hello"):
    """Actor -> learner, first on a connection and again after `Rehello`. Absolute state, never increments."""

    actor: str
    """Stable name of the actor, e.g. "actor-0"."""
    incarnation: str
    """Random, new with every start of the process: tells a restarted actor from a reconnected one."""
    slots: int
    """Tickets that the actor works on at once."""
    held: tuple[TicketId, ...] = ()
    unacked: tuple[TicketId, ...] = ()
    version: int = 0
    """Version that the engine serves; 0: none yet, so no work."""
    pid: int = 0
    host: str = ""


class Welcome(Message, frozen=True, tag="welcome"):
    """Learner -> actor. All that an actor needs to start its engine."""

    run: str
    model: str
    """Directory or hub id with config and tokenizer. Weights come over the wire."""
    dtype: str
    max_model_len: int
    """Tokens, prompt and completion together."""
    bulk: str
    """Endpoint of the bulk socket."""
    news: str
    """Endpoint of the news socket."""
    heartbeat_s: float
    dead_after_s: float
    seed: int
    group_size: int
    kv: Literal["keep", "recompute"] = "keep"
    chunk_bytes: int = 8 << 20
    window: int = 4
    """Chunk requests in flight."""
    grader_timeout_s: float = 5.0
    engine: dict[str, str | int | float | bool] = field(default_factory=dict)
    """The recipe's `[actor]` settings that the engine reads; unknown keys are ignored by older actors."""
    prefix_cache: Literal["version", "shared"] = "version"
    """shared: a new request may begin with keys and values of an older version."""
    engine_metrics_s: float = 0.0
    """The actor sends `EngineMetrics` so often; 0: never."""


class Rehello(Message, frozen=True, tag="rehello"):
    """Learner -> actor. The hub does not know this peer (the learner was restarted): say hello again."""


class Refused(Message, frozen=True, tag="refused"):
    """Learner -> actor. The peer cannot take part; it logs the reason and exits non-zero."""

    reason: str


class Heartbeat(Message, frozen=True, tag="heartbeat"):
    """Actor -> learner, every `heartbeat_s`. Absolute state: a lease that two in a row do not list is issued again."""

    held: tuple[TicketId, ...]
    """Tickets being worked on."""
    unacked: tuple[TicketId, ...]
    """Groups sent and not acknowledged."""
    free_slots: int
    version: int
    phase: str
    """What the actor is doing: "starting engine", "loading weights", "serving", "draining"."""
    phase_s: float
    """Seconds since the phase began."""
    generated_tokens: int = 0
    """Completion tokens since the actor started."""
    busy_s: float = 0.0
    """Seconds with at least one request in the engine, since the actor started."""
    swaps: int = 0
    fetch_s: float = 0.0
    """Seconds of the last fetch, check and staging."""
    pause_s: float = 0.0
    """Seconds that generation was paused for the last swap."""
    grader_errors: int = 0
    rss_bytes: int = 0
    running: int = 0
    """Requests inside the engine now."""
    running_s: float = 0.0
    """The same summed over time: completion-seconds since the actor started."""
    paused_s: float = 0.0
    """Seconds that generation was paused for swaps, since the actor started."""
    serving_s: float = 0.0
    """Seconds since the engine served its first version."""


class Probe(Message, frozen=True, tag="probe"):
    """Learner -> actor. Draw one completion of each prompt with exactly this version, at temperature 1, at once."""

    version: int
    prompts: tuple[tuple[int, ...], ...]
    """Random token ids that no cache can hold."""
    max_tokens: int
    seed: int


class Probed(Message, frozen=True, tag="probed"):
    """Actor -> learner. What the engine drew for a `Probe`; not sent if another version was swapped in meanwhile.

    Buffers, in this order: `token_ids` int32 [T], `logprobs` float32 [T], T being the sum of `num_tokens`.
    """

    version: int
    num_tokens: tuple[int, ...]
    """Of each prompt's completion, in order."""
    checksum: str = ""
    """Of the engine's own checksums of its weights; "" where they mean nothing (vLLM's CPU build hashes nothing)."""
    token_ids: bytes = b""
    logprobs: bytes = b""


class EngineMetrics(Message, frozen=True, tag="metrics"):
    """Actor -> learner, every `Welcome.engine_metrics_s`. What the engine says of itself, for people; none is owed."""

    text: bytes = b""
    """Buffer: Prometheus' text format in UTF-8, compressed with zstandard; limits in `protocol.engine_text`."""


class Beat(Message, frozen=True, tag="beat"):
    """Learner -> actor, answer to a heartbeat."""

    version: int
    """Newest version that can be pulled: an actor that missed the news sees it here."""


class Ack(Message, frozen=True, tag="ack"):
    """Learner -> actor. The group is in the journal (or was a duplicate): the actor forgets it."""

    ids: tuple[TicketId, ...]


class Cancel(Message, frozen=True, tag="cancel"):
    """Learner -> actor. Stop work on these tickets; send nothing for them."""

    ids: tuple[TicketId, ...]


class Drain(Message, frozen=True, tag="drain"):
    """Learner -> actor. Take no new work, send what is finished, say goodbye and exit."""

    reason: str
    finish: bool = False
    """True: complete the tickets in hand first. False: drop them."""


class Goodbye(Message, frozen=True, tag="goodbye"):
    """Actor -> learner. The actor leaves; whatever it still holds goes back. `error` set: it failed, with its cause."""

    reason: str
    error: str = ""


# --- news: XPUB (learner) / SUB (actors) ----------------------------------------------------------------------------


class Manifest(Struct, frozen=True):
    """Describes version `version` completely, however its bytes travel."""

    version: int
    step: int
    """Training steps that these weights have seen."""
    tensors: tuple[TensorSpec, ...]
    """Names as `save_pretrained` writes them, tied tensors once; offsets without gaps, in this order."""
    total_bytes: int
    digest: str
    """xxh3-128 over all other fields."""
    branch: int = 0


class DeltaPart(Struct, frozen=True, array_like=True):
    """How the next tensors of the manifest's order are encoded in a delta's payload."""

    tensors: int
    """How many they are, all of one dtype."""
    encoding: str
    """"delta", "moves", "zstd" or "dense", see `protocol.deltas`."""
    nbytes: int


class Delta(Struct, frozen=True):
    """The difference of a version from the one published before it. Its payload travels apart."""

    version: int
    base: int
    """Version that it applies to."""
    base_digest: str
    """Of the base's manifest: it is never applied to anything else."""
    digest: str
    """Of the manifest of `version`."""
    parts: tuple[DeltaPart, ...]
    nbytes: int
    """Of the payload: its parts one after the other."""
    payload_digest: str
    """xxh3-128, hexadecimal."""


class Update(Message, frozen=True, tag="update"):
    """The newest version, and how to get there. Published when it is made, and the answer to `UpdateRequest`.

    Published, `chain` is the newest delta alone. As an answer it leads from the version that was asked for to the
    newest one. It is empty where a snapshot has to be pulled: there is no such chain, or it is larger.
    """

    manifest: Manifest
    chain: tuple[Delta, ...] = ()
    payload: bytes = b""
    """Of all deltas of the chain, one after the other, if they are small; else empty, and to be pulled."""


# --- bulk: ROUTER (learner) / DEALER (actor) ------------------------------------------------------------------------


class UpdateRequest(Message, frozen=True, tag="update?"):
    """Actor -> learner. Asks for the newest version."""

    base: int = 0
    """Version that the actor has staged, from which deltas may lead on; 0: none."""
    base_digest: str = ""
    """Of its manifest."""


class ChunkRequest(Message, frozen=True, tag="chunk?"):
    """Actor -> learner. Asks for bytes [offset, offset + length) of a version's snapshot, or of its delta's payload."""

    version: int
    offset: int
    length: int
    form: Form = "snapshot"


class Chunk(Message, frozen=True, tag="chunk"):
    """Learner -> actor. The bytes lie in one buffer frame."""

    version: int
    offset: int
    form: Form = "snapshot"
    data: bytes = b""
    """Any bytes-like object when sent; what the socket gave when received."""


class Gone(Message, frozen=True, tag="gone"):
    """Learner -> actor. That version in that form, or that range of it, cannot be had; `newest` can."""

    version: int
    newest: int
    form: Form = "snapshot"
