"""Probes: each actor at its first version, then every so many; one version at a time; only what was asked counts."""

from __future__ import annotations

import numpy as np
import pytest

from learner.intake.probes import MAX_TOKENS, PROMPT_TOKENS, PROMPTS, Probes
from protocol.messages import Probe, Probed
from tests.hub_harness import snapshot

VOCABULARY = 50


def answer(probe: Probe, version: int | None = None, tokens: int = 3, token: int = 7) -> Probed:
    count = tokens * len(probe.prompts)
    return Probed(
        probe.version if version is None else version, (tokens,) * len(probe.prompts),
        token_ids=np.full(count, token, "<i4").tobytes(), logprobs=np.zeros(count, "<f4").tobytes(),
    )  # fmt: skip


def make(every: int = 3, max_model_len: int = 64) -> Probes:
    return Probes(every, 1, VOCABULARY, max_model_len)


def asked(probes: Probes, version: int, incarnation: str = "a") -> Probe | None:
    """The learner keeps that version and the one before."""
    return probes.confirmed(incarnation, version, [snapshot(version), snapshot(version - 1)])


def test_actor_is_probed_at_its_first_version_and_then_at_every_third() -> None:
    probes = make()
    versions = []
    for version in [0, 0, 4, 4, 5, 5, 6, 8, 9, 10, 12, 12, 13]:
        if (probe := asked(probes, version)) is not None:
            versions.append(probe.version)
            assert probes.answered("actor-0", "a", answer(probe))
    assert versions == [4, 8, 12]
    assert [result.probe.version for result in probes.results] == versions
    assert probes.results[0].snapshot.manifest.version == 4
    assert probes.answers == 3


def test_prompts_are_fresh_and_of_the_vocabulary() -> None:
    probes = make()
    first, second = asked(probes, 1, "a"), asked(probes, 1, "b")
    assert first is not None and second is not None
    assert len(first.prompts) == PROMPTS
    assert {len(prompt) for prompt in first.prompts} == {PROMPT_TOKENS}
    assert len({*first.prompts, *second.prompts}) == 2 * PROMPTS, "no cache holds them"
    assert all(0 <= token < VOCABULARY for prompt in first.prompts for token in prompt)
    assert first.max_tokens == MAX_TOKENS


def test_probe_fits_a_short_context() -> None:
    probe = asked(make(max_model_len=9), 1)
    assert probe is not None
    assert {len(prompt) for prompt in probe.prompts} == {4}
    assert probe.max_tokens == 5


def test_pending_probe_is_not_asked_twice_and_given_up_when_the_actor_goes_on() -> None:
    probes = make()
    first = asked(probes, 1)
    assert first is not None
    assert asked(probes, 1) is None
    second = asked(probes, 2)
    assert second is not None and second.version == 2, "never answered: it is still due"
    assert not probes.answered("actor-0", "a", answer(first)), "of the version before"
    assert probes.answered("actor-0", "a", answer(second))


def test_one_version_is_held_at_a_time() -> None:
    probes = make()
    assert asked(probes, 5, "a") is not None
    assert asked(probes, 6, "b") is None, "would hold a second snapshot"
    assert asked(probes, 5, "c") is not None
    probes.gone("a")
    probes.gone("c")
    assert asked(probes, 6, "b") is not None


def test_version_that_the_learner_no_longer_has_is_not_probed() -> None:
    probes = make()
    assert probes.confirmed("a", 3, [snapshot(5), snapshot(4)]) is None
    assert asked(probes, 5) is not None


def test_no_probes_where_none_are_wanted() -> None:
    assert asked(make(every=0), 1) is None


@pytest.mark.parametrize(
    "change", [{"version": 9}, {"tokens": 0}, {"tokens": MAX_TOKENS + 1}, {"token": VOCABULARY}, {"token": -1}]
)
def test_answer_to_something_else_is_refused(change: dict[str, int]) -> None:
    probes = make()
    probe = asked(probes, 1)
    assert probe is not None
    assert not probes.answered("actor-0", "a", answer(probe, **change))
    assert not probes.answered("actor-0", "b", answer(probe)), "nobody asked b"
    assert probes.answered("actor-0", "a", answer(probe))
    assert not probes.answered("actor-0", "a", answer(probe)), "twice"
