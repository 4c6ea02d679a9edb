"""Held-out reward through the same actors and graders: tickets out, a table of responses back.

Before and after a run it measures exactly one version, with training idle; the result says which version drew how many
tokens.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from protocol.config import Recipe
from protocol.messages import Group, Sampling, Ticket, TicketId
from protocol.rundir import replace_file

if TYPE_CHECKING:
    from learner.intake.data import Example

EVAL_SEED_OFFSET = 1 << 20
"""Keeps the seeds of evaluation tickets apart from those of train tickets."""


@dataclass(frozen=True)
class EvalResult:
    """One evaluation. Rewards are means over all completions; the interval is over problems (95 %, normal)."""

    name: str
    reward: float
    reward_ci95: float
    format_rate: float
    problems: int
    samples: int
    tokens: int
    tokens_per_s: float
    seconds: float
    length_mean: float
    failed: int
    """Problems left out since no actor could complete them."""
    grader_errors: int
    """Responses that the grader gave no score in time: they count with reward 0."""
    version_tokens: dict[str, int]
    """Completion tokens by the version that drew them."""


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
    """Figures of an evaluation."""
    means = [sum(group.rewards) / len(group.rewards) for group in groups]
    completions = [completion for group in groups for completion in group.completions]
    mean = sum(means) / max(1, len(means))
    variance = sum((value - mean) ** 2 for value in means) / max(1, len(means) - 1)
    tokens = sum(group.num_tokens for group in groups)
    return EvalResult(
        name=name,
        reward=mean,
        reward_ci95=1.96 * math.sqrt(variance / max(1, len(means))),
        format_rate=sum(c.scores.get("format", 0.0) for c in completions) / max(1, len(completions)),
        problems=len(groups),
        samples=len(completions) // max(1, len(groups)),
        tokens=tokens,
        tokens_per_s=tokens / max(seconds, 1e-9),
        seconds=seconds,
        length_mean=tokens / max(1, len(completions)),
        failed=failed,
        grader_errors=sum(bool(completion.grader_error) for completion in completions),
        version_tokens={str(version): count for version, count in sorted(_version_tokens(groups).items())},
    )


def _version_tokens(groups: list[Group]) -> Counter[int]:
    counts: Counter[int] = Counter()
    for group in groups:
        for completion in group.completions:
            ends = [start for _, start in completion.spans[1:]] + [completion.num_tokens]
            for (version, start), end in zip(completion.spans, ends, strict=True):
                counts[version] += end - start
    return counts


def write_responses(path: Path, groups: list[Group], heldout: list[Example]) -> None:
    """Every response as JSONL: problem, prompt, answer, response, scores."""
    lines = []
    for group in groups:
        example = heldout[group.id.index]
        for completion in group.completions:
            row = {
                "problem": group.id.index,
                "prompt": example.prompt,
                "answer": example.answer,
                "response": completion.text,
                "finish_reason": completion.finish_reason,
                **completion.scores,
            }
            lines.append(json.dumps(row))
    replace_file(path, "\n".join(lines) + "\n")


def write_result(path: Path, result: EvalResult) -> None:
    replace_file(path, json.dumps(asdict(result), indent=1) + "\n")
