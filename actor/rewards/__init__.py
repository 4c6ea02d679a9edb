"""Graders: pure functions of (response, reference answer) to named scores. docs/graders.md is the page for people.

A grader knows no ticket, no model and no clock. It runs in a worker process of `actor/grading.py`, which bounds its
time; still, what searches a response takes time linear in it. A ticket names its grader, and the name is looked up in
the built-in graders and in the user functions that this very process was started with: nothing is ever imported because
of what came over the wire. Nothing heavy is imported before a grader that needs it is used.
"""

from __future__ import annotations

from actor.rewards.base import SCORE_NAMES, Grader, Scores
from actor.rewards.boxed import grade_math, grade_question_only
from actor.rewards.exact import grade_exact
from actor.rewards.gsm8k import grade_gsm8k
from actor.rewards.integer import grade_integer
from actor.rewards.r1_zero import grade_r1_zero
from actor.rewards.registry import GRADERS, check_grader, find_grader, prepare_grader
from actor.rewards.spec import Spec, Term, parse_spec, user_functions_of
from actor.rewards.user import load_user_functions

__all__ = [
    "GRADERS", "SCORE_NAMES", "Grader", "Scores", "Spec", "Term", "check_grader", "find_grader", "grade_exact",
    "grade_gsm8k", "grade_integer", "grade_math", "grade_question_only", "grade_r1_zero", "load_user_functions",
    "parse_spec", "prepare_grader", "user_functions_of",
]  # fmt: skip
