"""The faults that a caller can act on.

What a user wrote wrongly is a `ValueError` (or its subclass `RecipeError`); what the wire did is a `WireError`.
"""


class WireError(Exception):
    """Something arrived that is not a message of this protocol. The frame is dropped and counted; nobody dies of it."""


class MalformedFrame(WireError):
    """A frame that cannot be decoded: wrong magic, truncated header, unknown message, buffers that do not fit."""


class OversizedFrame(WireError):
    """More frames or more bytes than the limits allow."""


class UnknownVersion(WireError):
    """The peer speaks another protocol version."""

    def __init__(self, found: int, spoken: int) -> None:
        super().__init__(f"peer speaks protocol version {found}, this side speaks {spoken}")
        self.found = found


class WeightsError(Exception):
    """A version of the weights could not be staged: missing bytes, a wrong digest, a version that is gone.

    Raised before the swap begins, so the engine still serves its old version."""


class EngineFailed(Exception):
    """The engine cannot go on and must be restarted. Carries the engine's own message, not a summary of it."""


class DeadlineExceeded(TimeoutError):
    """A named wait passed its deadline: says who waited for what, and for how long."""

    def __init__(self, what: str, waited_s: float) -> None:
        super().__init__(f"waited {waited_s:.0f} s for {what}")
        self.what = what


class KeysError(ValueError):
    """Keys that cannot be used: names the file, what was found and what is allowed. Never holds a secret."""


class RecipeError(ValueError):
    """A recipe that cannot run: names the key, what was found and what is allowed."""
