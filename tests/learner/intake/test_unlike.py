"""What the intake refuses of a group before it is journaled."""

from __future__ import annotations

from typing import Any

import msgspec
import numpy as np
import pytest

from learner.intake.server import unlike
from protocol.messages import (
    Sampling,
    TicketId,
)
from tests.intake_harness import group_of, make_ticket


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({}, ""),
        ({"prompt_ids": (9,)}, "another prompt"),
        ({"temperature": 0.7}, "temperature 0.7, expected 1.0"),
        ({"completions": ()}, "0 completions, expected 2"),
        ({"kind": "eval"}, "kind eval, expected train"),
        ({"token_ids": np.array([1, -5], "<i4").tobytes()}, "token ids -5..1, expected 0..9"),
        ({"token_ids": np.array([1, 10], "<i4").tobytes()}, "token ids 1..10, expected 0..9"),
        ({"logprobs": np.array([np.nan, -1], "<f4").tobytes()}, "logprobs nan..nan, expected finite ones of at most 0"),
        ({"logprobs": np.array([0.5, -1], "<f4").tobytes()}, "logprobs -1.0..0.5, expected finite ones of at most 0"),
    ],
)
def test_unlike_names_what_in_a_group_does_not_answer_its_ticket(changes: dict[str, Any], fault: str) -> None:
    ticket = make_ticket(3)
    assert unlike(msgspec.structs.replace(group_of(ticket), **changes), ticket, 10, {1: 0}.get, 0) == fault


@pytest.mark.parametrize(("version", "sound"), [(3, False), (4, True), (5, True), (6, True), (7, False), (999, False)])
def test_unlike_refuses_tokens_of_versions_that_are_too_old_or_were_never_announced(version: int, sound: bool) -> None:
    """Tokens may be of step 2 or later; versions 4 and 5 are of that step, version 7 was lost in a crash."""
    ticket = msgspec.structs.replace(make_ticket(3), min_version=5)
    fault = unlike(group_of(ticket, version=version), ticket, 10, {3: 1, 4: 2, 5: 2, 6: 3}.get, 2)
    assert fault == ("" if sound else f"tokens of version {version}, expected announced ones of step 2 or later")
    evaluated = msgspec.structs.replace(ticket, kind="eval", id=TicketId(-5, 0))
    assert (unlike(group_of(evaluated, version=version), evaluated, 10, {4: 2, 5: 2, 6: 3}.get, 0) == "") == (
        version == 5
    )


def test_unlike_refuses_completions_longer_than_the_ticket_allows() -> None:
    ticket = make_ticket(3)
    shorter = msgspec.structs.replace(ticket, sampling=Sampling(max_tokens=0))
    assert "expected at most 0" in unlike(group_of(ticket), shorter, 10, {1: 0}.get, 0)
