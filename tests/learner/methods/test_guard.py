"""The guard on simulated runs: which series trip, when, with which words, and which do not."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import pytest

from learner.methods.guard import Guard, Verdict
from learner.methods.guard_figures import standard_error
from protocol.sections import GuardConfig

GROUPS, SIZE = 16, 8
DECIDED = 0.05
"""Spread of the prompts (see `draw`) after which nearly all groups have equal rewards."""

Step = Mapping[str, float]


def draw(rng: np.random.Generator, reward: float, alike: float = 2.0, groups: int = GROUPS, **figures: float) -> Step:
    """A step's figures: each prompt has a chance of its own (beta, mean `reward`; `alike` near 0: all or none)."""
    chances = np.full(groups, reward)
    if 0 < reward < 1:
        chances = rng.beta(reward * alike, (1 - reward) * alike, groups)
    rewards = (rng.random((groups, SIZE)) < chances[:, None]).astype(float)
    return {
        "reward_mean": float(rewards.mean()),
        "reward_error": standard_error(rewards.tolist()),
        "zero_variance_share": float(np.mean(rewards.min(1) == rewards.max(1))),
        "groups": float(groups),
        "completions": float(rewards.size),
        "sampled_entropy": 0.6,
        "completion_tokens_mean": 10.0,
        "truncated_completions_share": 0.02,
        "duplicate_share": 0.1,
        "grad_norm": float(2.5 * np.exp(0.4 * rng.standard_normal())),
        "kl_k3": 0.01,
        "updates": 1.0,
        "loss": 0.0,
    } | figures


def watch(steps: Iterable[Step], guard: Guard | None = None) -> list[Verdict]:
    """Verdicts of steps 1, 2, …"""
    guard = guard or Guard(GuardConfig())
    return [guard.see(number + 1, figures) for number, figures in enumerate(steps)]


def trips(verdicts: list[Verdict]) -> list[str]:
    return [verdict.tripped for verdict in verdicts if verdict.tripped]


def ramp(start: float, end: float, steps: int) -> list[float]:
    return [float(value) for value in np.linspace(start, end, steps)]


def fixed(reward: float = 0.5, **figures: float) -> Step:
    """A step without noise."""
    equal = {"reward_mean": reward, "reward_error": 0.05, "zero_variance_share": 0.25, "groups": 16.0}
    more = {"completions": 128.0, "sampled_entropy": 0.6, "completion_tokens_mean": 40.0, "duplicate_share": 0.1}
    return equal | more | {"grad_norm": 2.0, "kl_k3": 0.01, "updates": 1.0} | figures


# --- collapses ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(20))
def test_collapse_into_decided_groups_trips_soon(seed: int) -> None:
    """As measured at lr 5e-5: within 10 steps nearly all groups have zero variance, the reward stays near 0.2."""
    rng = np.random.default_rng(seed)
    healthy = [draw(rng, reward) for reward in ramp(0.13, 0.3, 8)]
    collapsed = [draw(rng, 0.2, DECIDED, sampled_entropy=0.01) for _ in range(12)]
    verdicts = watch([*healthy, *collapsed])
    assert not trips(verdicts[:8])
    first = next(number for number, verdict in enumerate(verdicts) if verdict.tripped)
    assert 10 <= first <= 14  # the eleventh step is the third such; two groups that differ begin the count anew
    said = verdicts[first].tripped
    assert "zero-variance groups" in said or "entropy fell to 0.010 nats" in said
    assert not verdicts[first].hopeless


@pytest.mark.parametrize("seed", range(20))
def test_collapse_of_the_reward_trips_after_the_window(seed: int) -> None:
    rng = np.random.default_rng(seed)
    verdicts = watch([draw(rng, reward) for reward in [*ramp(0.1, 0.65, 9), *[0.1] * 8]])
    assert not trips(verdicts[:11])
    assert next(i for i, verdict in enumerate(verdicts) if verdict.tripped) in (11, 12, 13)


def test_collapse_says_what_happened_in_one_line() -> None:
    steps = [fixed(0.62)] * 9 + [fixed(0.11, zero_variance_share=0.94, reward_error=0.03)] * 3
    verdicts = watch(steps)
    assert verdicts[9].suspect[0] == "reward 0.11, best 0.62"
    assert trips(verdicts) == [
        "step 12: reward fell to 0.11 from 0.62 at best, 3 steps in a row; zero-variance groups 0.94"
    ]


def test_collapse_to_zero_of_a_poor_run_is_noticed_when_no_group_differs_any_more() -> None:
    """0.06 -> 0 is less than `LEAST_DROP`, and equal groups are to be expected at 0: it takes three windows more."""
    steps = [fixed(0.06, zero_variance_share=0.6)] * 10 + [fixed(0.0, zero_variance_share=1.0, reward_error=0.0)] * 15
    verdicts = watch(steps)
    assert verdicts[17] == Verdict()
    assert trips(verdicts) == ["step 22: zero-variance groups 1.00 at reward 0.00, 4 steps in a row"]


def test_one_template_for_every_prompt_trips() -> None:
    steps = [fixed(0.05, zero_variance_share=0.7)] * 4
    steps += [fixed(0.0, zero_variance_share=1.0, duplicate_share=1.0, reward_error=0.0)] * 3
    assert trips(watch(steps)) == [
        "step 7: the same completion for 1.00 of the prompts, 0.10 at the start, 3 steps in a row"
    ]


def test_exploding_entropy_trips_even_while_the_reward_holds() -> None:
    steps = [fixed()] * 4 + [fixed(sampled_entropy=3.2)] * 3
    assert trips(watch(steps)) == ["step 7: entropy rose to 3.200 nats from 0.600 at the start, 3 steps in a row"]


def test_vanishing_entropy_trips_when_the_reward_is_gone() -> None:
    steps = [fixed(0.5)] * 4 + [fixed(0.3, sampled_entropy=0.02)] * 6  # 0.3: above half of the best, below four fifths
    assert "entropy fell to 0.020 nats" in trips(watch(steps))[0]


DEAD_END = {
    "reward_mean": [0.16, 0.15, 0.13, 0.36, 0.07, 0.18, 0.25, 0.14, 0.22, 0.16, 0.17, 0.16, 0.18, 0.16, 0.02, 0.25],
    "zero_variance_share": [
        0.69, 0.75, 0.69, 0.94, 0.94, 0.94, 1.0, 0.94, 0.88, 0.94, 0.88, 0.81, 0.81, 0.81, 0.94, 1.0
    ],
    "sampled_entropy": [
        0.549, 0.739, 0.629, 0.078, 0.053, 0.051, 0.025, 0.044, 0.053, 0.055, 0.075, 0.234, 0.047, 0.046, 0.012, 0.012
    ],
}  # fmt: skip
"""Measured: sums, lr 5e-5, at most 8 new tokens, 16 groups of 8. The reward is as good as it ever was; it is over."""


def test_lost_entropy_is_a_dead_end_where_groups_agree_though_the_reward_never_fell() -> None:
    steps = [fixed(**dict(zip(DEAD_END, values, strict=True))) for values in zip(*DEAD_END.values(), strict=True)]
    verdicts = watch(steps)
    assert trips(verdicts)[0].startswith("step 6: entropy fell to 0.051 nats from 0.639 at the start, 3 steps in a row")
    assert verdicts[3].suspect, "a checkpoint of step 4 is none to go back to"
    assert not any(verdict.suspect for verdict in verdicts[:3])


def test_lost_entropy_alone_is_suspect_but_no_dead_end() -> None:
    sure = fixed(0.3, zero_variance_share=0.5, sampled_entropy=0.03)
    verdicts = watch([fixed(0.3)] * 4 + [sure] * 8)
    assert trips(verdicts) == [] and all(verdict.suspect for verdict in verdicts[4:])


@pytest.mark.parametrize(("cut", "reward", "tripped"), [(0.0, 0.5, 0), (0.9, 0.5, 1), (0.0, 0.3, 1)])
def test_long_answers_are_length_hacking_when_cut_off_or_worse(cut: float, reward: float, tripped: int) -> None:
    longer = fixed(reward, completion_tokens_mean=200.0, truncated_completions_share=cut)
    found = trips(watch([*[fixed()] * 4, *[longer] * 6]))
    assert len(found) == tripped
    assert all("mean length rose to 200.0 tokens from 40.0 at the start" in line for line in found)


@pytest.mark.parametrize(("reward", "tripped"), [(0.9, 0), (0.3, 1)])
def test_short_answers_are_fine_while_they_are_right(reward: float, tripped: int) -> None:
    assert len(trips(watch([*[fixed()] * 4, *[fixed(reward, completion_tokens_mean=5.0)] * 6]))) == tripped


def test_gradient_norms_are_compared_with_the_median_of_steps_with_an_update() -> None:
    idle = fixed(grad_norm=0.0, updates=0.0)
    steps = [fixed(), idle] * 6 + [fixed(grad_norm=90.0), idle, fixed(grad_norm=80.0), idle, fixed(grad_norm=85.0)]
    verdicts = watch(steps)
    assert verdicts[12].suspect == ("gradient norm 90, median 2",)
    assert verdicts[13].suspect == ()
    assert trips(verdicts) == ["step 17: gradient norm 85, median 2, 3 steps in a row"]


@pytest.mark.parametrize(("name", "reward", "tripped"), [
    ("kl_k3", 0.5, 1), ("kl_reference", 0.5, 0), ("kl_reference", 0.3, 1),
])  # fmt: skip
def test_kl_to_the_reference_is_the_price_of_a_good_reward(name: str, reward: float, tripped: int) -> None:
    found = trips(watch([*[fixed()] * 4, *[fixed(reward, **{name: 1.5})] * 6]))
    assert len(found) == tripped
    assert all("1.50 nats a token" in line for line in found)


# --- what is no collapse --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("groups", [8, 16])
@pytest.mark.parametrize("seed", range(10))
def test_healthy_run_whose_entropy_falls_does_not_trip(seed: int, groups: int) -> None:
    """Reward 0.1 -> 0.9 in 15 steps while the entropy falls to a twelfth, then 25 steps at 0.9 with groups decided."""
    rng = np.random.default_rng(seed)
    rewards, entropies = [*ramp(0.1, 0.9, 15), *[0.9] * 25], [*np.geomspace(0.6, 0.05, 15), *[0.05] * 25]
    pairs = zip(rewards, entropies, strict=True)
    steps = [draw(rng, reward, 2 * (1.05 - reward), groups, sampled_entropy=float(e)) for reward, e in pairs]
    assert trips(watch(steps)) == []


@pytest.mark.parametrize("reward", [0.02, 0.06, 0.25, 0.5])
def test_plateau_does_not_trip(reward: float) -> None:
    for seed in range(5):
        rng = np.random.default_rng(seed)
        found = [verdict for verdict in watch(draw(rng, reward, 6.0) for _ in range(60)) if not verdict.hopeless]
        assert trips(found) == [], seed


def test_noisy_poor_run_does_not_trip() -> None:
    for seed in range(10):
        rng = np.random.default_rng(seed)
        rewards = rng.uniform(0.02, 0.1, 60)
        assert trips(watch(draw(rng, float(reward), groups=8) for reward in rewards)) == [], seed


# fmt: off
DEMO = (
    (.44, .25, .94, 2.6), (.48, .00, .48, 3.6), (.59, .38, .88, 2.3), (.55, .38, .78, 2.4), (.53, .00, .73, 3.2),
    (.69, .00, .60, 3.1), (.70, .25, .59, 3.2), (.62, .00, .39, 3.2), (.61, .00, .38, 3.6), (.70, .12, .25, 2.6),
    (.80, .38, .21, 2.7), (.83, .38, .15, 2.5), (.78, .50, .12, 3.2), (.66, .62, .09, 2.1), (.72, .62, .12, 2.0),
    (.86, .38, .07, 3.8), (.77, .50, .10, 2.9), (.88, .50, .08, 2.5), (.70, .50, .23, 2.7), (.84, .88, .06, 0.9),
    (.86, .50, .11, 2.5), (.97, .75, .02, 0.9), (.88, .50, .06, 3.5), (.98, .88, .08, 1.7),
)
"""24 steps of 8 x 8 of the demo as measured: reward, zero-variance share, entropy, gradient norm."""
# fmt: on


def test_measured_run_of_the_demo_does_not_trip() -> None:
    steps = [
        fixed(reward, zero_variance_share=equal, sampled_entropy=entropy, grad_norm=norm, groups=8.0, completions=64.0)
        for reward, equal, entropy, norm in DEMO
    ]
    assert trips(watch(steps)) == []


@pytest.mark.parametrize(("reward", "tripped"), [(0.55, 0), (0.3, 1)])
def test_groups_may_agree_at_a_good_reward_that_is_still_the_best(reward: float, tripped: int) -> None:
    """Converged, be it short of `solved_reward`: there is nothing better to go back to. At a low one it is too soon."""
    rng = np.random.default_rng(1)
    steps = [draw(rng, value) for value in ramp(0.2, reward, 10)]
    steps += [fixed(reward, zero_variance_share=1.0, reward_error=0.1)] * 30
    assert len(trips(watch(steps))) == tripped


def test_solved_task_may_have_equal_groups_and_equal_answers() -> None:
    solved = fixed(1.0, zero_variance_share=1.0, duplicate_share=0.7, sampled_entropy=0.001, reward_error=0.0)
    verdicts = watch([*[fixed()] * 4, *[solved] * 40])
    assert verdicts[-1] == Verdict()
    assert trips(verdicts) == []


def test_task_with_few_answers_may_give_the_same_to_many_prompts() -> None:
    """Yes or no: most groups of eight have both."""
    steps = [fixed(0.5, duplicate_share=0.95, zero_variance_share=0.1)] * 10
    assert trips(watch([*steps, *[fixed(0.6, duplicate_share=1.0, zero_variance_share=0.95)] * 2])) == []


def test_two_bad_steps_are_no_collapse() -> None:
    steps = [fixed(0.6)] * 5 + [fixed(0.1)] * 2 + [fixed(0.6)] + [fixed(0.1)] * 2 + [fixed(0.6)]
    verdicts = watch(steps)
    assert trips(verdicts) == []
    assert [bool(verdict.suspect) for verdict in verdicts[5:]] == [True, True, False, True, True, False]


def test_first_steps_say_nothing() -> None:
    wild = fixed(0.0, sampled_entropy=9.0, completion_tokens_mean=900.0, zero_variance_share=0.95, grad_norm=500.0)
    assert trips(watch([wild] * 3)) == []


def test_missing_figures_are_skipped() -> None:
    """sft and dpo have a loss and a gradient, and nothing else."""
    verdicts = watch([{"loss": 1.0, "grad_norm": 2.0, "updates": 1.0}] * 8 + [{}] * 8)
    assert verdicts == [Verdict()] * 16


@pytest.mark.parametrize("seed", range(100))
def test_growing_rewards_do_not_trip(seed: int) -> None:
    """From a reward of 0.1 on: below it most groups agree, and then a lost entropy is a dead end."""
    rng = np.random.default_rng(seed)
    start, gain, steps = rng.uniform(0.1, 0.5), rng.uniform(0.0, 0.5), int(rng.integers(5, 41))
    alike, fall, groups = rng.uniform(1.0, 20.0), rng.uniform(1.0, 20.0), int(rng.choice([8, 16, 32]))
    pairs = zip(ramp(start, start + gain, steps), np.geomspace(0.6, 0.6 / fall, steps), strict=True)
    verdicts = watch(draw(rng, reward, alike, groups, sampled_entropy=float(e)) for reward, e in pairs)
    assert trips([verdict for verdict in verdicts if not verdict.hopeless]) == []


# --- nothing to learn from ------------------------------------------------------------------------------------------


def test_equal_groups_since_the_start_are_hopeless_and_said_once() -> None:
    never = fixed(0.0, zero_variance_share=1.0, reward_error=0.0, grad_norm=0.0, updates=0.0)
    verdicts = watch([never] * 30)
    phrase = "no group has differing rewards since the start: nothing to learn from"
    assert trips(verdicts) == [f"step 9: {phrase}; reward 0.00"]
    assert verdicts[8].hopeless
    assert verdicts[8].suspect == verdicts[29].suspect == (phrase,)


def test_late_first_success_ends_the_warning() -> None:
    never = fixed(0.0, zero_variance_share=1.0, reward_error=0.0)
    verdicts = watch([*[never] * 12, fixed(0.01, zero_variance_share=0.94), *[never] * 4])
    assert verdicts[11].suspect
    assert verdicts[13:] == [Verdict()] * 4


def test_task_solved_from_the_start_is_not_hopeless() -> None:
    assert trips(watch([fixed(1.0, zero_variance_share=1.0, reward_error=0.0)] * 30)) == []


# --- broken steps, keys, state --------------------------------------------------------------------------------------


def test_broken_trips_at_once() -> None:
    error = FloatingPointError("step 11, update 1: found loss nan and gradient norm inf, expected finite numbers")
    verdict = Guard(GuardConfig()).broken(12, str(error))
    assert verdict.tripped == "step 12: update 1: found loss nan and gradient norm inf, expected finite numbers"
    assert not verdict.hopeless


def test_loss_that_is_not_finite_trips_at_once() -> None:
    assert Guard(GuardConfig()).see(3, fixed(loss=math.nan)).tripped == "step 3: loss is nan"


def test_trip_is_said_once_until_the_signal_has_gone_away() -> None:
    good, bad = fixed(0.62), fixed(0.1)
    verdicts = watch([*[good] * 5, *[bad] * 6, *[good] * 2, *[bad] * 3])
    assert [number + 1 for number, verdict in enumerate(verdicts) if verdict.tripped] == [8, 16]
    assert verdicts[10].suspect == ("reward 0.10, best 0.62",)


@pytest.mark.parametrize(("key", "figures"), [
    ("reward_drop", {"reward_mean": 0.1}),
    ("entropy_high", {"sampled_entropy": 5.0}),
    ("entropy_low", {"sampled_entropy": 0.001, "reward_mean": 0.3}),
    ("zero_variance_share", {"zero_variance_share": 1.0, "reward_mean": 0.3}),
    ("length_factor", {"completion_tokens_mean": 900.0, "truncated_completions_share": 1.0}),
    ("duplicate_share", {"duplicate_share": 1.0, "zero_variance_share": 1.0}),
    ("grad_norm_factor", {"grad_norm": 900.0}),
    ("kl_max", {"kl_k3": 9.0}),
])  # fmt: skip
def test_zero_switches_a_signal_off(key: str, figures: dict[str, float]) -> None:
    steps = [*[fixed()] * 6, *[fixed(**figures)] * 8]
    others = {"zero_variance_share": 0.0} if key == "duplicate_share" else {}
    assert trips(watch(steps, Guard(GuardConfig(**others))))  # type: ignore[arg-type]
    assert not trips(watch(steps, Guard(GuardConfig(**(others | {key: 0.0})))))  # type: ignore[arg-type]


def test_window_of_one_trips_at_once() -> None:
    verdicts = watch([*[fixed(0.62)] * 3, fixed(0.05)], Guard(GuardConfig(window=1)))
    assert trips(verdicts) == ["step 4: reward fell to 0.05 from 0.62 at best"]


def test_negative_rewards_are_counted_from_the_lowest() -> None:
    """-1 for a wrong answer, 1 for a right one: -0.2 of -0.9 … 0.6 is below half, 0.1 is not."""
    start = [*[fixed(-0.9)] * 3, *[fixed(0.6)] * 3]
    assert trips(watch([*start, *[fixed(0.1)] * 4])) == []
    assert len(trips(watch([*start, *[fixed(-0.2)] * 4]))) == 1


def series(seed: int) -> list[Step]:
    rng = np.random.default_rng(seed)
    rewards = [*ramp(0.1, 0.6, 6), *[0.15] * 3, *ramp(0.5, 0.7, 3), *[0.0] * 12]
    return [draw(rng, reward, sampled_entropy=float(rng.choice([0.01, 0.6, 4.0])), groups=8) for reward in rewards]


@pytest.mark.parametrize("moment", range(0, 24, 3))
def test_restored_guard_goes_on_exactly_as_from_that_moment(moment: int) -> None:
    steps, guard = series(4), Guard(GuardConfig())
    kept: dict[str, Any] = {}
    verdicts = []
    for number, figures in enumerate(steps):
        if number == moment:
            kept = json.loads(json.dumps(guard.state()))
        verdicts.append(guard.see(number + 1, figures))
    guard.restore(kept)
    assert json.loads(json.dumps(guard.state())) == kept
    assert [guard.see(i + 1, steps[i]) for i in range(moment, 24)] == verdicts[moment:]


def test_state_does_not_change_with_the_guard() -> None:
    guard = Guard(GuardConfig())
    watch(series(1)[:8], guard)
    kept = guard.state()
    before = json.dumps(kept)
    guard.restore(kept)
    watch(series(2), guard)
    assert json.dumps(kept) == before


def test_state_stays_small_and_empty_state_is_the_start() -> None:
    guard = Guard(GuardConfig())
    watch([fixed()] * 500, guard)
    assert len(json.dumps(guard.state())) < 2000
    guard.restore({})
    assert guard.state() == Guard(GuardConfig()).state()


def test_suspicious_while_a_signal_is_over_its_bound() -> None:
    guard = Guard(GuardConfig())
    watch([*[fixed(0.6)] * 4, fixed(0.1)], guard)
    assert guard.suspicious
    guard.see(6, fixed(0.6))
    assert not guard.suspicious


def test_collapse_began_when_the_reward_was_last_near_its_best() -> None:
    guard = Guard(GuardConfig())
    lengths = []
    for step, reward in enumerate([0.7, 0.7, 0.7, 0.6, 0.5, 0.5, 0.6, 0.5, 0.4, 0.1, 0.0, 0.0, 0.0], start=1):
        tripped = guard.see(step, fixed(reward)).tripped
        lengths.append(guard.began_ago)
        if tripped:
            break
    assert "reward fell" in tripped
    assert lengths == [0, 0, 0, 0, 1, 2, 0, *range(1, len(lengths) - 6)], "0.6 is near 0.7, 0.5 is not"
    assert step - guard.began_ago == 7, "half of the best reward was lost later"
    assert guard.suspicious


def test_at_the_last_step_what_is_likely_counts() -> None:
    figures = [fixed(reward) | {"reward_error": 0.15} for reward in [0.6] * 4 + [0.2] * 3]
    waiting, deciding = Guard(GuardConfig()), Guard(GuardConfig())
    for step, row in enumerate(figures, start=1):
        undecided = waiting.see(step, row)
        verdict = deciding.see(step, row, last=step == len(figures))
    assert (undecided.tripped, bool(undecided.suspect)) == ("", True), "0.4 are 3.3 standard errors"
    assert verdict.tripped.startswith("step 7: reward fell to 0.20 from 0.60 at best")


def test_a_reward_that_settles_below_its_best_is_no_endless_collapse() -> None:
    guard = Guard(GuardConfig())
    watch([*[fixed(0.8)] * 5, *[fixed(0.6)] * 50], guard)
    assert guard.began_ago == 9, "3 windows at most"
    assert not guard.suspicious


def test_what_was_only_warned_of_may_be_acted_upon_by_another_policy() -> None:
    warned = Guard(GuardConfig(policy="warn"))
    for step in range(1, 5):
        warned.see(step, fixed())
    assert any(warned.see(step, fixed(kl_k3=9.0)).tripped for step in range(5, 9))
    same, other = Guard(GuardConfig(policy="warn")), Guard(GuardConfig(policy="rollback"))
    for guard in (same, other):
        guard.restore(json.loads(json.dumps(warned.state())))
    assert not same.see(9, fixed(kl_k3=9.0)).tripped, "said once"
    assert other.see(9, fixed(kl_k3=9.0)).tripped
