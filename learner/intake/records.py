"""From one record of a data set to a problem: which field is what, and the layouts of GSM8K, MATH and preference sets.

Knows no files: `jsonl.py` calls it for every line and says where the line stands. Every fault is a ValueError
"FIELD: found …, allowed: …".
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from typing import Any

from learner.intake.problems import Message, Problem, demonstration
from learner.intake.templates import CHAT
from protocol.config import Recipe
from protocol.sections import FieldsConfig

ROLES = ("system", "user", "assistant")
PROMPT_NAMES = ("prompt", "question", "problem", "query", "instruction")
INPUT_OF = {"instruction": "input"}
"""Prompt's name -> name of a text that belongs behind it (Alpaca)."""
ANSWER_NAMES = ("answer", "final_answer", "ground_truth")
SOLUTION_NAMES = ("solution",)
RESPONSE_NAMES = ("solution", "response", "completion", "output")
"""Of method = "sft", which learns from nothing else."""
CONVERSATION = "messages"

_GSM8K_MARK = "####"
_INTEGER = re.compile(r"[-−]?([0-9]{1,3}(,[0-9]{3})+|[0-9]+)")
_BOXED = re.compile(r"\\(?:boxed|fbox)\s*(?:(\{)|([^\s${}\\]+))")

Record = dict[str, Any]
Prompt = str | tuple[Message, ...]


@dataclass(frozen=True)
class Reading:
    """How records are to be read, and what they must have."""

    fields: FieldsConfig = field(default_factory=FieldsConfig)
    grader: str = ""
    """Where answers are needed: "integer" wants integers."""
    one_question: bool = False
    """The prompt goes into a template's {question}: there is no room for a conversation."""
    solution_format: str = "plain"
    needs_answer: bool = True
    needs_solution: bool = False
    needs_pair: bool = False

    @classmethod
    def of(cls, recipe: Recipe, heldout: bool = False) -> Reading:
        """What a recipe's method wants of training records, or of the held-out ones in a file of their own."""
        task, method = recipe.task, recipe.method
        graded = method in ("grpo", "expert_iteration", "eval")
        return cls(
            fields=task.fields,
            grader=task.grader if graded or recipe.eval.wanted else "",
            one_question=task.template != CHAT,
            solution_format=task.solution_format,
            needs_answer=graded or (heldout and recipe.eval.wanted),
            needs_solution=method == "sft" and not heldout,
            needs_pair=method == "dpo" and not heldout,
        )


def read_problem(record: Record, reading: Reading) -> Problem:
    """The problem of one record. Raises ValueError with the field, what was found and what is allowed."""
    fields = reading.fields
    chosen, rejected, before = _pair(record, reading) if reading.needs_pair else ("", "", ())
    prompt_name, asked = _find(record, fields.prompt, PROMPT_NAMES)
    response: str | None = None
    if asked is None and before and not fields.prompt:
        prompt_name, asked = fields.chosen or "chosen", list(before)
    elif _is_conversation(record, reading):
        prompt_name, (asked, response) = CONVERSATION, _conversation(CONVERSATION, record[CONVERSATION])
    prompt = _with_input(record, reading, prompt_name, _prompt(prompt_name, asked, reading.one_question))
    answer, solution = _answer_and_solution(record, reading, prompt_name, response)
    if reading.grader == "integer" and answer and not _INTEGER.fullmatch(answer):
        raise ValueError(f'answer: found {answer[:40]!r}, allowed with task.grader = "integer": an integer')
    return Problem(prompt, answer, solution, chosen=chosen, rejected=rejected)


def last_boxed(text: str) -> str | None:
    r"""What stands in the last \boxed{…} of a text, braces balanced; None where there is none.

    \boxed 5 (the next word) is read, too, as a few of MATH's solutions have it.
    """
    for match in reversed(list(_BOXED.finditer(text))):
        if match[2]:
            return match[2].rstrip(".,")
        depth, place = 1, match.end()
        while place < len(text) and depth:
            if text[place] == "\\":
                place += 1  # \{ and \} are no groups
            else:
                depth += {"{": 1, "}": -1}.get(text[place], 0)
            place += 1
        if not depth and text[match.end() : place - 1].strip():
            return text[match.end() : place - 1].strip()
    return None


def shown(value: Any) -> str:
    """A value as errors show it."""
    return "nothing" if value is None else repr(value)[:60]


def _find(record: Record, mapped: str, usual: tuple[str, ...]) -> tuple[str, Any]:
    """(name, value) of a field: the one that the recipe names, else the first of the usual ones that is there.

    A name with dots is a path into objects, unless the record has a field of exactly that name.
    """
    if mapped:
        if mapped in record:
            return mapped, record[mapped]
        value: Any = record
        for part in mapped.split("."):
            if not isinstance(value, dict) or part not in value:
                allowed = ", ".join(value) if isinstance(value, dict) else shown(value)
                raise ValueError(f"{mapped}: found nothing, allowed: a field of the record ({allowed})")
            value = value[part]
        return mapped, value
    return next(((name, record[name]) for name in usual if record.get(name) is not None), (usual[0], None))


def _is_conversation(record: Record, reading: Reading) -> bool:
    """Whether prompt and response are to be taken from the record's "messages": there is no response elsewhere."""
    mapped = reading.fields.prompt or reading.fields.solution
    response = _find(record, "", RESPONSE_NAMES)[1]
    return reading.needs_solution and not mapped and response is None and record.get(CONVERSATION) is not None


def _answer_and_solution(record: Record, reading: Reading, prompt_name: str, response: str | None) -> tuple[str, str]:
    fields = reading.fields
    answer_name, answer = _find(record, fields.answer, ANSWER_NAMES)
    usual = RESPONSE_NAMES if reading.needs_solution else SOLUTION_NAMES
    solution_name, solution = (CONVERSATION, response) if response else _find(record, fields.solution, usual)
    if not isinstance(solution, str) and solution is not None:
        raise ValueError(f"{solution_name}: found {shown(solution)}, allowed: a text")
    worked = (solution or "").strip()
    if not worked and prompt_name == "question" and answer_name == "answer":
        if isinstance(answer, str) and _GSM8K_MARK in answer:
            return _gsm8k(answer, reading)
        if not (fields.prompt or fields.answer) and isinstance(answer, str):
            raise ValueError(
                f'answer: found no "{_GSM8K_MARK}", allowed beside "question": "worked solution {_GSM8K_MARK} 42";'
                ' other answers with task.fields.prompt = "question"'
            )
    if answer is None and worked and (boxed := last_boxed(worked)):
        text = boxed
    else:
        text = _answer(answer_name, answer, bool(worked), reading.needs_answer or bool(fields.answer))
    if reading.needs_solution and not worked:
        raise ValueError(
            f"{solution_name}: found {shown(solution)}, allowed: a text, or one named {' or '.join(usual)}"
        )
    if worked and not text and reading.solution_format != "plain":
        raise ValueError('answer: found nothing, allowed with task.solution_format = "r1_zero": a text or a number')
    return text, demonstration(worked, text, worked, reading.solution_format) if worked else ""


def _gsm8k(answer: str, reading: Reading) -> tuple[str, str]:
    """Cobbe et al., 2021 (arXiv 2110.14168): worked solution, "####", answer. Calculator marks <<…>> are removed."""
    worked, _, final = answer.rpartition(_GSM8K_MARK)
    worked, final = re.sub(r"<<[^<>]*>>", "", worked).strip(), final.strip().replace(",", "")
    if not final:
        raise ValueError(f'answer: found nothing behind "{_GSM8K_MARK}", allowed: the answer')
    if reading.needs_solution and not worked:
        raise ValueError(f'answer: found no worked solution before "{_GSM8K_MARK}", allowed with method = "sft": one')
    plain = f"{worked}\n{_GSM8K_MARK} {final}"
    return final, demonstration(worked, final, plain, reading.solution_format) if worked else ""


def _answer(name: str, answer: Any, solved: bool, needed: bool) -> str:
    if isinstance(answer, int | float) and not isinstance(answer, bool) and math.isfinite(answer):
        return str(answer)
    if isinstance(answer, str) and answer.strip():
        return answer.strip()
    if not needed:
        return ""
    boxed = r", or a solution with \boxed{…}" if answer is None and solved else ""
    raise ValueError(f"{name}: found {shown(answer)}, allowed: a text or a number{boxed}")


def _prompt(name: str, prompt: Any, one_question: bool) -> Prompt:
    if isinstance(prompt, str) and prompt.strip():
        return prompt
    if _are_messages(prompt):
        if prompt[-1]["role"] != "user":
            raise ValueError(f'{name}: found a last message of role "{prompt[-1]["role"]}", allowed: "user"')
        if one_question and len(prompt) > 1:
            raise ValueError(
                f'{name}: found {len(prompt)} messages, allowed with a task.template other than "chat": a text, or one'
                " message of the user"
            )
        return tuple({"role": message["role"], "content": message["content"]} for message in prompt)
    raise ValueError(
        f"{name}: found {shown(prompt)}, allowed: a text, or a list of messages"
        f' {{"role": {" or ".join(ROLES)}, "content": a text}}'
    )


def _with_input(record: Record, reading: Reading, prompt_name: str, prompt: Prompt) -> Prompt:
    """The prompt, and behind an empty line the text that belongs to it, where the record has one."""
    name, text = _find(record, reading.fields.input, (INPUT_OF.get(prompt_name, ""),))
    if text is None or text == "" or not (reading.fields.input or isinstance(text, str)):
        return prompt
    if not isinstance(text, str) or not isinstance(prompt, str):
        raise ValueError(f"{name}: found {shown(text)} beside {prompt_name}, allowed: a text behind a text")
    return f"{prompt}\n\n{text}" if text.strip() else prompt


def _pair(record: Record, reading: Reading) -> tuple[str, str, tuple[Message, ...]]:
    """(chosen, rejected, the messages before them); the latter empty where the two are texts."""
    chosen_name, chosen = _find(record, reading.fields.chosen, ("chosen",))
    rejected_name, rejected = _find(record, reading.fields.rejected, ("rejected",))
    better, before = _response(chosen_name, chosen)
    worse, before_worse = _response(rejected_name, rejected)
    if before != before_worse and isinstance(chosen, list) and isinstance(rejected, list):
        raise ValueError(
            f"{rejected_name}: found other messages before the response than {chosen_name} has, allowed: the same"
        )
    return better, worse, before


def _response(name: str, value: Any) -> tuple[str, tuple[Message, ...]]:
    if isinstance(value, str) and value.strip():
        return value.strip(), ()
    if isinstance(value, list) and value:
        before, response = _conversation(name, value)
        return response, tuple({"role": message["role"], "content": message["content"]} for message in before)
    raise ValueError(f"{name}: found {shown(value)}, allowed: a text, or messages that end with the assistant's")


def _conversation(name: str, messages: Any) -> tuple[list[Any], str]:
    """(messages before the response, the response) of a conversation that ends with the assistant's message."""
    if not _are_messages(messages):
        raise ValueError(f"{name}: found {shown(messages)}, allowed: a list of messages with role and content")
    last = messages[-1]
    if last["role"] != "assistant" or not last["content"].strip():
        raise ValueError(f'{name}: found a last message of role "{last["role"]}", allowed: "assistant", with a text')
    return messages[:-1], last["content"].strip()


def _are_messages(value: Any) -> bool:
    return (
        isinstance(value, list)
        and bool(value)
        and all(
            isinstance(one, dict) and one.get("role") in ROLES and isinstance(one.get("content"), str) for one in value
        )
    )
