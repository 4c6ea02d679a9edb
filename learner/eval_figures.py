"""Figures of an evaluation: pure functions of scores and counts. No ticket, file or tensor is known here.

`evaluate.py` makes a result of them, `deploy/evaluation.py` compares two results with them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Literal

Z95 = 1.959963984540054
"""97.5 % quantile of the normal distribution: 95 % lie between -Z95 and Z95."""
REWARD_ROUNDING = 1e-6
"""Rewards are float64: a weighted sum that should be 1 may be less by its rounding."""
SOLVED_REWARD = 1.0 - REWARD_ROUNDING
"""A completion of at least this reward solves its problem (pass@k)."""
RIGHT_SCORE = 0.5
"""A score of at least this counts as yes, where a yes or no is asked for."""

ResponseClass = Literal["right", "wrong_answer", "wrong_format", "ungraded"]
CLASSES: tuple[ResponseClass, ...] = ("right", "wrong_answer", "wrong_format", "ungraded")


def answer_score(scores: Mapping[str, float]) -> float:
    """How right the answer is, 0 to 1: the grader's `answer_reward`, else 1 where the reward is at least one half."""
    if "answer_reward" in scores:
        return min(1.0, max(0.0, scores["answer_reward"]))
    return float(scores["reward"] >= RIGHT_SCORE)


def classify(scores: Mapping[str, float], grader_error: str = "") -> ResponseClass:
    """Which of the classes a response belongs to. A grader without `format_reward` accepts every form."""
    if grader_error:
        return "ungraded"
    if scores.get("format_reward", 1.0) < RIGHT_SCORE:
        return "wrong_format"
    return "right" if answer_score(scores) >= RIGHT_SCORE else "wrong_answer"


# --- pass@k ---


def pass_at_k(samples: int, solved: int, k: int) -> float:
    """Chance that one of k completions, drawn from the `samples` of a problem without putting back, solves it.

        pass@k = 1 - C(n - c, k) / C(n, k)     n = samples, c = solved

    The unbiased estimator of Chen et al., 2021 (arXiv 2107.03374).
    """
    if not 1 <= k <= samples:
        raise ValueError(f"k: found {k}, allowed: 1 to {samples}, the completions of a problem")
    return 1.0 - math.comb(samples - solved, k) / math.comb(samples, k)


def ks_of(samples: int) -> list[int]:
    """The k of pass@k that are reported: powers of two up to `samples`, and `samples`."""
    return sorted({samples, *(2**power for power in range(samples.bit_length()))} - {0})


# --- intervals ---


def wilson(share: float, count: float) -> tuple[float, float]:
    """Wilson's 95 % interval of a share out of `count` draws: sensible also at shares of 0 and 1."""
    if count <= 0:
        return 0.0, 1.0
    square = Z95 * Z95 / count
    middle = (share + square / 2) / (1 + square)
    half = Z95 / (1 + square) * math.sqrt(share * (1 - share) / count + square / (4 * count))
    return max(0.0, middle - half), min(1.0, middle + half)


def clustered_wilson(means: Sequence[float], samples: int) -> tuple[float, float]:
    """95 % interval of the mean of a 0-to-1 figure over problems, `samples` completions of each. [N] means.

    Completions of one problem resemble each other, so that N x samples of them tell less than as many independent
    ones: Wilson's interval with the effective number N x samples / design effect (Korn and Graubard, 1998). The design
    effect is the variance of the mean over problems by that of independent draws, held between 1 (independent) and
    `samples` (a problem's completions are all alike, which is also assumed where the figure is 0 or 1 throughout).
    One sample a problem: plain Wilson.
    """
    count = len(means)
    if not count:
        return 0.0, 1.0
    share = min(1.0, max(0.0, math.fsum(means) / count))
    independent = share * (1 - share) / (count * samples)
    effect = float(samples)
    if independent > 0 and count > 1:
        effect = min(effect, max(1.0, sample_variance(means) / count / independent))
    return wilson(share, count * samples / effect)


def sample_variance(values: Sequence[float]) -> float:
    """Unbiased; 0 for fewer than two values."""
    if len(values) < 2:
        return 0.0
    mean = math.fsum(values) / len(values)
    return math.fsum((value - mean) ** 2 for value in values) / (len(values) - 1)


def paired_interval(differences: Sequence[float]) -> tuple[float, float] | None:
    """95 % interval of a mean difference over pairs (Student's t). [N] differences of the same problem.

    None where all are equal (also: fewer than two): the data do not say how much they would vary.
    """
    if max(differences, default=0.0) - min(differences, default=0.0) < 1e-12:
        return None
    count = len(differences)
    mean = math.fsum(differences) / count
    half = t_quantile(count - 1) * math.sqrt(sample_variance(differences) / count)
    return mean - half, mean + half


def t_quantile(degrees: int, inside: float = 0.95) -> float:
    """The t between whose negative and itself a share `inside` of Student's distribution lies."""
    low, high = 0.0, 1e6
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if _t_inside(middle, degrees) < inside else (low, middle)
    return high


def _t_inside(t: float, degrees: int) -> float:
    """P(|T| < t), by the finite sums of Abramowitz and Stegun, 26.7.3 and 26.7.4."""
    angle = math.atan(t / math.sqrt(degrees))
    sine, cosine = math.sin(angle), math.cos(angle)
    odd = degrees % 2
    term, total = (cosine if odd else 1.0), 0.0
    for place in range(1, degrees // 2 + 1):
        total += term
        term *= cosine * cosine * (2 * place / (2 * place + 1) if odd else (2 * place - 1) / (2 * place))
    return 2 / math.pi * (angle + sine * total) if odd else sine * total
