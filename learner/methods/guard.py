"""Watches a run for collapse. `Guard.see` takes a step's figures and says what is suspect and what has lasted too long.

A pure state machine: knows no clock, no file and no model. What is done about a verdict is the loop's part.
What it is told of the groups: `guard_figures.py`. docs/algorithms.md has the rules and why.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from statistics import fmean, median
from typing import Any

from protocol.sections import GuardConfig

NOISE_ERRORS = 4.0
"""Standard errors by which a mean must lie below the best one: the best of many noisy means is itself too high."""
LIKELY_ERRORS = 2.0
"""Standard errors within which a mean may well be the one that would excuse it."""
LEAST_DROP = 0.1
"""A fall of the reward by less than this is no loss worth a step back."""
DIFFERING_DROP = 0.5
"""Groups that differ below this share of their best: where few ever did, few are no change."""
NEAR_BEST = 0.8
"""From this share of the best reward on, short answers, sure answers and distance from the reference are success."""
HIGH_REWARD = 0.5
"""From this share of the solved reward on, and near the best one, equal groups are convergence, not collapse."""
STUCK_SHARE = 0.85
"""Share of equal groups, over a window, beside which a lost entropy is a dead end, however good the reward ever was."""
EXPLODED_NATS = 1.0
"""Below this entropy no multiple of the first steps' is an explosion: a model that was sure may become less so."""
CUT_SHARE = 0.5
"""Long answers of which so many are cut off are suspect whatever they earn."""
NORMS_KEPT = 64
NORMS_NEEDED = 5
"""Gradient norms that make a median."""
DEAD_WINDOWS = 3
"""Windows in which no group at all has differing rewards, before it counts although the reward is low."""
BEGAN_WINDOWS = 3
"""Windows for which a low reward may have announced a collapse."""


@dataclass(frozen=True)
class Verdict:
    """What the guard makes of one step."""

    suspect: tuple[str, ...] = ()
    """Signals over their bounds in this step, a phrase each."""
    tripped: str = ""
    """One line on what has lasted `window` steps; said once, again only when it went away and came back."""
    hopeless: bool = False
    """`tripped` says that there was nothing to learn from since the start: warn, there is nothing to go back to."""


@dataclass
class Record:
    """A figure's mean over the last steps, the best such mean so far, and the mean since it looks bad."""

    recent: list[tuple[float, float]] = field(default_factory=list)
    """(value, variance of its error) of the last `window` steps."""
    best: tuple[float, float] | None = None
    bad: tuple[int, float, float] = (0, 0.0, 0.0)
    """Steps of the present streak, the sums of their values and of their variances."""

    def push(self, value: float, variance: float, window: int) -> None:
        self.recent = [*self.recent, (value, variance)][-window:]

    def mean(self) -> tuple[float, float]:
        """Mean of the last steps and the variance of its error."""
        count = len(self.recent)
        return fmean(value for value, _ in self.recent), sum(variance for _, variance in self.recent) / count**2

    def settle(self, window: int, bad: bool) -> None:
        """End a step: does the figure look bad?"""
        mean = self.mean()
        if len(self.recent) == window and (self.best is None or mean[0] > self.best[0]):
            self.best = mean
        value, variance = self.recent[-1]
        count, values, variances = self.bad
        self.bad = (count + 1, values + value, variances + variance) if bad else (0, 0.0, 0.0)

    def fell(self, errors: float) -> bool:
        """Whether the mean of the streak lies below the best one by more than so many standard errors.

        The larger variance of the two counts for both: a few groups that all fail look more certain than they are.
        """
        count, values, variances = self.bad
        if self.best is None or not count:
            return False
        steps = len(self.recent)
        variance = max(self.best[1] * steps, variances / count)
        return self.best[0] - values / count > errors * math.sqrt(variance / steps + variance / count)


@dataclass
class _State:
    """All that the guard remembers, in JSON's types."""

    streaks: dict[str, int] = field(default_factory=dict)
    """Signal -> steps in a row that it has lasted."""
    told: list[str] = field(default_factory=list)
    """Signals that have tripped and have not gone away."""
    first: dict[str, list[float]] = field(default_factory=dict)
    """Figure -> its values in the first `window` healthy steps."""
    reward: Record = field(default_factory=Record)
    differing: Record = field(default_factory=Record)
    """Share of the groups whose rewards differ."""
    lowest_reward: float = 0.0
    """Zero of the reward's scale: the lowest healthy step's, where rewards may be negative."""
    grad_norms: list[float] = field(default_factory=list)
    policy: str = ""
    """What a collapse brought at that time."""
    ever_differed: bool = False
    """Whether there has been a group with differing rewards."""
    all_equal: int = 0
    """Steps in a row without such a group."""
    low_reward: int = 0
    """Steps in a row whose reward was not near the best: no signal, and often noise."""


Readings = dict[str, tuple[str, str] | None]
"""Signal -> (phrase, the same as an event) where over its bound, None where within; absent: the step does not say."""


class Guard:
    """`see` once a step, in order. `state` goes into the checkpoint, `restore` takes it out."""

    def __init__(self, config: GuardConfig) -> None:
        self.config = config
        self._now = _State()

    @property
    def suspicious(self) -> bool:
        """Whether a signal is over its bound now: a checkpoint of this moment is none to go back to."""
        return bool(self._now.streaks)

    @property
    def began_ago(self) -> int:
        """Steps for which what is wrong now, if anything is, has lasted: those of the longest signal, or those whose
        reward was not near the best. A collapse begins before it trips anything, but no more than 3 x `window` steps
        before: a reward may also settle at less than its best.
        """
        low = min(self._now.low_reward, BEGAN_WINDOWS * self.config.window)
        return max(low, *self._now.streaks.values(), 0)

    def see(self, step: int, figures: Mapping[str, float], last: bool = False) -> Verdict:
        """Judge a step by its metrics. Figures that are missing or not finite say nothing, but loss and gradient.

        `last`: no further step will tell more, so that what has lasted and is likely counts.
        """
        for name in ("loss", "grad_norm"):
            if not math.isfinite(figures.get(name, 0.0)):
                return self.broken(step, f"{name} is {figures[name]}")
        figures = {name: value for name, value in figures.items() if math.isfinite(value)}
        now, window = self._now, self.config.window
        if "reward_mean" in figures:
            now.reward.push(figures["reward_mean"], _reward_variance(figures), window)
        if "zero_variance_share" in figures:
            share = 1.0 - figures["zero_variance_share"]
            now.differing.push(share, _share_variance(share, figures.get("groups", 0.0)), window)
            now.ever_differed = now.ever_differed or share > 0
            now.all_equal = now.all_equal + 1 if share == 0 else 0
        readings = self._readings(figures)
        for name, reading in readings.items():
            if reading is None:
                now.streaks.pop(name, None)
                now.told = [told for told in now.told if told != name]
            else:
                now.streaks[name] = now.streaks.get(name, 0) + 1
        self._learn(figures, readings)
        over = {name: reading for name, reading in readings.items() if reading is not None}
        suspect = tuple(phrase for phrase, _ in over.values())
        ripe = [name for name in over if name not in now.told and self._ripe(name, last)]
        if ripe:
            now.told += ripe
            lasted = f"{now.streaks[ripe[0]]} steps in a row" if window > 1 else ""
            event = ", ".join(filter(None, [over[ripe[0]][1], lasted]))
            others = [phrase for name, (phrase, _) in over.items() if name != ripe[0]]
            return Verdict(suspect, f"step {step}: " + "; ".join([event, *others]))
        return self._hopeless(step, figures, suspect)

    def broken(self, step: int, message: str) -> Verdict:
        """A loss or gradient that is not finite trips at once; `message` is the FloatingPointError's."""
        what = re.sub(r"^step \d+, ", "", message.partition("\n")[0])
        return Verdict((what,), f"step {step}: {what}")

    def state(self) -> dict[str, Any]:
        """What the guard remembers, for JSON."""
        return asdict(self._now) | {"policy": self.config.policy}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Be as at the moment of `state`; an empty one is the start of a run."""
        now = _State(**state)
        if state:
            now.reward, now.differing = (_record(state[name]) for name in ("reward", "differing"))
        now.streaks, now.told, now.grad_norms = dict(now.streaks), list(now.told), list(now.grad_norms)
        if now.policy != self.config.policy:
            now.told = []  # what was only said before may be acted upon now
        now.first = {name: list(values) for name, values in now.first.items()}
        self._now = now

    # --- the signals ---

    def _readings(self, figures: Mapping[str, float]) -> Readings:
        return {
            **self._reward(figures),
            **self._equal_groups(figures),
            **self._duplicates(figures),
            **self._entropy(figures),
            **self._length(figures),
            **self._gradient(figures),
            **self._kl(figures),
        }

    def _reward(self, figures: Mapping[str, float]) -> Readings:
        best, share = self._now.reward.best, self.config.reward_drop
        if not share or best is None or "reward_mean" not in figures:
            return {}
        reward = figures["reward_mean"]
        if reward >= self._share_of_best(share) or best[0] - reward < LEAST_DROP:
            return {"reward": None}
        return {
            "reward": (
                f"reward {reward:.2f}, best {best[0]:.2f}",
                f"reward fell to {reward:.2f} from {best[0]:.2f} at best",
            )
        }

    def _equal_groups(self, figures: Mapping[str, float]) -> Readings:
        """Groups of equal rewards, where more differed and neither success nor chance explains it."""
        bound, equal, best = (
            self.config.zero_variance_share,
            figures.get("zero_variance_share"),
            self._now.differing.best,
        )
        if not bound or equal is None or best is None or not self._now.reward.recent:
            return {}
        as_ever = equal < bound or 1.0 - equal >= DIFFERING_DROP * best[0]
        if as_ever or self._solved() or self._converged() or (self._by_chance(figures) and not self._dead()):
            return {"zero_variance": None}
        phrase = f"zero-variance groups {equal:.2f}"
        return {"zero_variance": (phrase, f"{phrase} at reward {self._now.reward.recent[-1][0]:.2f}")}

    def _duplicates(self, figures: Mapping[str, float]) -> Readings:
        """One answer to many prompts, where answers once differed more and groups hold little else."""
        bound, share, first = (
            self.config.duplicate_share,
            figures.get("duplicate_share"),
            self._first("duplicate_share"),
        )
        if not bound or share is None or first is None:
            return {}
        equal = figures.get("zero_variance_share", 1.0) >= (self.config.zero_variance_share or 1.0)
        if share < max(bound, 2 * first) or not equal or self._solved():
            return {"duplicates": None}
        phrase = f"the same completion for {share:.2f} of the prompts"
        return {"duplicates": (phrase, f"{phrase}, {first:.2f} at the start")}

    def _entropy(self, figures: Mapping[str, float]) -> Readings:
        entropy, first = figures.get("sampled_entropy"), self._first("sampled_entropy")
        if entropy is None or first is None:
            return {}
        low, high, readings = self.config.entropy_low, self.config.entropy_high, Readings()
        phrase = f"entropy {entropy:.3f} nats, {first:.3f} at the start"
        if low:
            over = entropy < low * first and not self._converged() and not self._solved()
            event = f"entropy fell to {entropy:.3f} nats from {first:.3f} at the start"
            readings["entropy_low"] = (phrase, event) if over else None
        if high:
            over = entropy > max(high * first, EXPLODED_NATS)
            event = f"entropy rose to {entropy:.3f} nats from {first:.3f} at the start"
            readings["entropy_high"] = (phrase, event) if over else None
        return readings

    def _length(self, figures: Mapping[str, float]) -> Readings:
        length, first, factor = (
            figures.get("completion_tokens_mean"),
            self._first("completion_tokens_mean"),
            self.config.length_factor,
        )
        if not factor or length is None or first is None:
            return {}
        cut = figures.get("truncated_completions_share", 0.0) >= CUT_SHARE
        too_long = length > factor * first and (cut or not self._near_best())
        too_short = length < first / factor and not self._near_best()
        if not (too_long or too_short):
            return {"length": None}
        verb = "rose" if too_long else "fell"
        return {
            "length": (
                f"mean length {length:.1f} tokens, {first:.1f} at the start",
                f"mean length {verb} to {length:.1f} tokens from {first:.1f} at the start",
            )
        }

    def _gradient(self, figures: Mapping[str, float]) -> Readings:
        """A step without an update has no gradient to speak of."""
        factor, norms = self.config.grad_norm_factor, self._now.grad_norms
        if not factor or not _updated(figures) or len(norms) < NORMS_NEEDED:
            return {}
        norm, middle = figures["grad_norm"], median(norms)
        phrase = f"gradient norm {norm:.3g}, median {middle:.3g}"
        return {"grad_norm": (phrase, phrase) if norm > factor * middle else None}

    def _kl(self, figures: Mapping[str, float]) -> Readings:
        bound, readings = self.config.kl_max, Readings()
        if not bound:
            return {}
        if "kl_k3" in figures and _updated(figures):
            phrase = f"KL to the engine {figures['kl_k3']:.2f} nats a token"
            readings["kl_engine"] = (phrase, phrase) if figures["kl_k3"] > bound else None
        if "kl_reference" in figures:
            phrase = f"KL to the reference {figures['kl_reference']:.2f} nats a token"
            over = figures["kl_reference"] > bound and not self._near_best()
            readings["kl_reference"] = (phrase, phrase) if over else None
        return readings

    def _hopeless(self, step: int, figures: Mapping[str, float], suspect: tuple[str, ...]) -> Verdict:
        """Rewards that have been equal within every group since the start: no collapse, but nothing to learn from."""
        now = self._now
        if now.ever_differed or not self._dead() or self._solved():
            return Verdict(suspect)
        phrase = "no group has differing rewards since the start: nothing to learn from"
        if "hopeless" in now.told:
            return Verdict((*suspect, phrase))
        now.told = [*now.told, "hopeless"]
        return Verdict((*suspect, phrase), f"step {step}: {phrase}; reward {figures.get('reward_mean', 0.0):.2f}", True)

    # --- what they compare with ---

    def _ripe(self, name: str, last: bool) -> bool:
        """Whether a signal has lasted; what is counted in samples must also be beyond noise."""
        now, errors = self._now, LIKELY_ERRORS if last else NOISE_ERRORS
        if now.streaks[name] < self.config.window:
            return False
        if name == "reward":
            return now.reward.fell(errors)
        if name == "entropy_low":
            return not self._near_best() or self._stuck()
        return name != "zero_variance" or now.differing.fell(errors)

    def _learn(self, figures: Mapping[str, float], readings: Readings) -> None:
        """End the step: the best means from every step, all else from healthy ones."""
        now, window = self._now, self.config.window
        if "reward_mean" in figures:
            now.low_reward = now.low_reward + 1 if self._is_low(figures["reward_mean"]) else 0
            now.reward.settle(window, readings.get("reward") is not None)
        if "zero_variance_share" in figures:
            now.differing.settle(window, readings.get("zero_variance") is not None)
        if now.streaks:
            return
        now.lowest_reward = min(now.lowest_reward, figures.get("reward_mean", 0.0))
        for name in ("sampled_entropy", "completion_tokens_mean", "duplicate_share"):
            values = now.first.setdefault(name, [])
            if name in figures and len(values) < window:
                values.append(figures[name])
        if _updated(figures):
            now.grad_norms = [*now.grad_norms, figures["grad_norm"]][-NORMS_KEPT:]

    def _first(self, name: str) -> float | None:
        """Mean over the first healthy steps, once there are `window` of them."""
        values = self._now.first.get(name, [])
        return fmean(values) if len(values) == self.config.window else None

    def _share_of_best(self, share: float) -> float:
        """The reward that is this share of the best, counted from the scale's zero."""
        assert self._now.reward.best is not None
        zero = self._now.lowest_reward
        return zero + share * (self._now.reward.best[0] - zero)

    def _near_best(self) -> bool:
        """Whether the mean reward of the last steps may be as good as ever; also before there is a best one."""
        reward = self._now.reward
        if not reward.recent or reward.best is None:
            return bool(reward.recent)
        mean, variance = reward.mean()
        error = math.sqrt(2 * max(variance, reward.best[1]))
        return mean + LIKELY_ERRORS * error >= self._share_of_best(NEAR_BEST) or reward.best[0] - mean < LEAST_DROP

    def _is_low(self, reward: float) -> bool:
        """Whether a step's reward is not near the best mean."""
        best = self._now.reward.best
        return best is not None and reward < self._share_of_best(NEAR_BEST) and best[0] - reward >= LEAST_DROP

    def _solved(self) -> bool:
        """Whether the mean reward of the last steps may be the solved one."""
        if not self._now.reward.recent:
            return False
        mean, variance = self._now.reward.mean()
        return mean + LIKELY_ERRORS * math.sqrt(variance) >= self.config.solved_reward

    def _converged(self) -> bool:
        """Whether the mean reward of the last steps is high and as good as ever: the policy has made up its mind."""
        mean, _ = self._now.reward.mean()
        return mean >= HIGH_REWARD * self.config.solved_reward and self._near_best()

    def _stuck(self) -> bool:
        """Whether groups have had equal rewards for a whole window: with no entropy left there is no way out of it."""
        differing = self._now.differing
        return self._now.ever_differed and bool(differing.recent) and differing.mean()[0] <= 1.0 - STUCK_SHARE

    def _dead(self) -> bool:
        """Whether not one group has had differing rewards for long."""
        return self._now.all_equal >= DEAD_WINDOWS * self.config.window

    def _by_chance(self, figures: Mapping[str, float]) -> bool:
        """Whether right answers are so rare, or so frequent, that equal groups are what chance makes of them."""
        reward, groups = self._now.reward.mean()[0], figures.get("groups", 0.0)
        if not groups or "completions" not in figures or not 0 <= reward <= 1:
            return False
        size = figures["completions"] / groups
        expected = reward**size + (1 - reward) ** size
        error = math.sqrt(expected * (1 - expected) / groups)
        return expected + LIKELY_ERRORS * error >= self.config.zero_variance_share


def _reward_variance(figures: Mapping[str, float]) -> float:
    """Variance of the mean reward's error: as measured, but never less than that of as many coin throws."""
    reward, count = figures["reward_mean"], figures.get("completions", 0.0)
    coins = _share_variance(reward, count) if 0 <= reward <= 1 else 0.0
    return max(coins, figures.get("reward_error", 0.0) ** 2)


def _share_variance(share: float, count: float) -> float:
    """Variance of a share of `count` draws, two added of each kind: shares of 0 and 1 are not exact either."""
    if not count:
        return 0.0
    likely = (share * count + 2) / (count + 4)
    return likely * (1 - likely) / count


def _updated(figures: Mapping[str, float]) -> bool:
    return figures.get("updates", 1.0) > 0 and figures.get("grad_norm", 0.0) > 0


def _record(state: Mapping[str, Any]) -> Record:
    """A record as JSON gives it back, with lists for tuples."""
    recent = [(value, variance) for value, variance in state["recent"]]
    best = None if state["best"] is None else (state["best"][0], state["best"][1])
    count, values, variances = state["bad"]
    return Record(recent, best, (count, values, variances))
