"""Held-out problems through the same actors and graders: tickets out, figures and a table of responses back.

Before and after a run it measures exactly one version, with training idle; an evaluation in the background may see
several. The result says which version drew how many tokens. The mathematics is in `eval_figures.py`.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from learner.eval_figures import (
    CLASSES,
    SOLVED_REWARD,
    Z95,
    answer_score,
    classify,
    clustered_wilson,
    ks_of,
    pass_at_k,
    sample_variance,
)
from protocol.config import Recipe
from protocol.messages import Completion, Group, Sampling, Ticket, TicketId
from protocol.rundir import replace_file

if TYPE_CHECKING:
    from learner.intake.data import Example

EVAL_SEED_OFFSET = 1 << 20
"""Keeps the seeds of evaluation tickets apart from those of train tickets."""


@dataclass(frozen=True)
class EvalResult:
    """One evaluation. Figures are means over all completions; intervals (95 %) are over problems. Fields are only ever
    added."""

    name: str
    """One of before, after_warm_start, after, eval; or step-00010 for one in the background."""
    reward: float
    reward_ci95: float
    """Half the width of the normal interval of `reward`; 0 where all problems have the same reward."""
    accuracy: float
    """Mean `answer_reward` where the grader gives one, else share of completions with a reward of one half or more."""
    accuracy_low: float
    accuracy_high: float
    """Wilson's interval, also sensible where all is right or all is wrong (`eval_figures.clustered_wilson`)."""
    pass_at_k: dict[str, float]
    """k -> chance that one of k completions has a reward of 1 (`SOLVED_REWARD`), for powers of 2 and for `samples`."""
    format_rate: float | None
    """Mean `format_reward`; None where the grader gives none."""
    classes: dict[str, int]
    """Completions by class: right (form and answer), wrong_answer (form right), wrong_format, and ungraded (see
    `grader_errors`)."""
    problems: int
    samples: int
    tokens: int
    tokens_per_s: float
    seconds: float
    length_mean: float
    """Tokens of a completion."""
    length_median: float
    length_max: int
    truncated_share: float
    """Share of completions that were cut off at `max_tokens`."""
    failed: int
    """Problems left out since no actor could complete them."""
    grader_errors: int
    """Responses that the grader gave no score in time: they count with reward 0."""
    version_tokens: dict[str, int]
    """Completion tokens by the version that drew them."""
    version_shares: dict[str, float]
    """The same as shares of all tokens."""
    version_first: int
    version_last: int
    """Oldest and newest version that drew a token; 0 where there is no token."""


def eval_tickets(recipe: Recipe, heldout: list[Example], version: int) -> list[Ticket]:
    """The same prompts, sampling and seeds each time; only the version differs.

    Their epoch is -version, so that no late group of another evaluation answers them, also not after a crash.
    """
    sampling = Sampling(
        max_tokens=recipe.eval_sampling_tokens, temperature=recipe.eval.temperature, stop=recipe.rollout.stop
    )
    return [
        Ticket(
            id=TicketId(-version, index),
            kind="eval",
            attempt=1,
            prompt_ids=example.prompt_ids,
            answer=example.answer,
            grader=recipe.task.grader,
            group_size=recipe.eval.samples,
            sampling=sampling,
            seed=recipe.seed * 1_000_003 + EVAL_SEED_OFFSET + index,
            min_version=version,
        )
        for index, example in enumerate(heldout)
    ]


def summarize(name: str, groups: list[Group], failed: int, seconds: float) -> EvalResult:
    """Figures of an evaluation. Groups may be of several versions, and of mixed ones."""
    completions = [completion for group in groups for completion in group.completions]
    samples = len(completions) // max(1, len(groups))
    rewards = [_mean(group.rewards) for group in groups]
    answers = [_mean([_answer(completion) for completion in group.completions]) for group in groups]
    accuracy_low, accuracy_high = clustered_wilson(answers, max(1, samples))
    lengths = [completion.num_tokens for completion in completions]
    versions = _version_tokens(groups)
    tokens = sum(lengths)
    return EvalResult(
        name=name,
        reward=_mean(rewards),
        reward_ci95=Z95 * math.sqrt(sample_variance(rewards) / max(1, len(rewards))),
        accuracy=_mean(answers),
        accuracy_low=accuracy_low,
        accuracy_high=accuracy_high,
        pass_at_k=_pass_at_ks(groups),
        format_rate=_format_rate(completions),
        classes=_classes(completions),
        problems=len(groups),
        samples=samples,
        tokens=tokens,
        tokens_per_s=tokens / max(seconds, 1e-9),
        seconds=seconds,
        length_mean=_mean(lengths),
        length_median=float(median(lengths or [0])),
        length_max=max(lengths, default=0),
        truncated_share=_mean([completion.finish_reason == "length" for completion in completions]),
        failed=failed,
        grader_errors=sum(bool(completion.grader_error) for completion in completions),
        version_tokens={str(version): count for version, count in versions.items()},
        version_shares={str(version): count / max(1, tokens) for version, count in versions.items()},
        version_first=min(versions, default=0),
        version_last=max(versions, default=0),
    )


def eval_row(result: EvalResult) -> dict[str, float]:
    """The figures that belong into metrics and status: few, flat, all of them numbers."""
    row = {
        "eval_reward": result.reward,
        "eval_reward_ci95": result.reward_ci95,
        "eval_accuracy": result.accuracy,
        "eval_accuracy_low": result.accuracy_low,
        "eval_accuracy_high": result.accuracy_high,
        "eval_length_mean": result.length_mean,
        "eval_truncated_share": result.truncated_share,
        "eval_tokens_per_s": result.tokens_per_s,
        "eval_version_first": result.version_first,
        "eval_version_last": result.version_last,
    }
    if result.format_rate is not None:
        row["eval_format_rate"] = result.format_rate
    return row | {f"eval_pass_at_{k}": value for k, value in result.pass_at_k.items()}


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / max(1, len(values))


def _answer(completion: Completion) -> float:
    return 0.0 if completion.grader_error else answer_score(completion.scores)


def _pass_at_ks(groups: list[Group]) -> dict[str, float]:
    """Means over problems."""
    counts = [(len(group.completions), sum(reward >= SOLVED_REWARD for reward in group.rewards)) for group in groups]
    fewest = min((samples for samples, _ in counts), default=0)
    return {str(k): _mean([pass_at_k(samples, solved, k) for samples, solved in counts]) for k in ks_of(fewest)}


def _format_rate(completions: list[Completion]) -> float | None:
    if not any("format_reward" in completion.scores for completion in completions):
        return None
    return _mean([completion.scores.get("format_reward", 0.0) for completion in completions])


def _classes(completions: list[Completion]) -> dict[str, int]:
    counts = Counter(classify(completion.scores, completion.grader_error) for completion in completions)
    return {name: counts[name] for name in CLASSES}


def _version_tokens(groups: list[Group]) -> dict[int, int]:
    counts: Counter[int] = Counter()
    for group in groups:
        for completion in group.completions:
            ends = [start for _, start in completion.spans[1:]] + [completion.num_tokens]
            for (version, start), end in zip(completion.spans, ends, strict=True):
                counts[version] += end - start
    return dict(sorted(counts.items()))


# --- files ---


def write_responses(path: Path, groups: list[Group], heldout: list[Example]) -> None:
    """Every response as one line of JSON."""
    rows = [
        response_row(group, sample, heldout[group.id.index])
        for group in groups
        for sample in range(len(group.completions))
    ]
    replace_file(path, "".join(json.dumps(row) + "\n" for row in rows))


def response_row(group: Group, sample: int, example: Example) -> dict[str, Any]:
    """One response with its problem, what the grader said and who drew it."""
    completion = group.completions[sample]
    return {
        "problem": group.id.index,
        "sample": sample,
        "prompt": example.prompt,
        "answer": example.shown_answer,
        "response": completion.text,
        "finish_reason": completion.finish_reason,
        "tokens": completion.num_tokens,
        "class": classify(completion.scores, completion.grader_error),
        "reward": completion.scores["reward"],
        "scores": completion.scores,
        "grader_error": completion.grader_error,
        "versions": [list(span) for span in completion.spans],
    }


def write_result(path: Path, result: EvalResult) -> None:
    replace_file(path, json.dumps(asdict(result), indent=1) + "\n")
