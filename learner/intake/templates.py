"""Prompt templates that are files: a text with {question} in it, instead of the model's chat template.

Two come with Tandem (`recipes/prompts/*.prompt`), others are a user's. Text only; `prompts.py` makes tokens of it.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from protocol.errors import RecipeError

CHAT = "chat"
QUESTION = "{question}"
THINK = "<think>"
"""A template that ends with this has begun the response already."""

_FOLDER = Path(__file__).resolve().parents[2] / "recipes" / "prompts"
"""In the repository, and beside the packages where they are installed."""
_SUFFIX = ".prompt"


@dataclass(frozen=True)
class PromptTemplate:
    """A text with one {question}."""

    text: str

    def fill(self, question: str) -> str:
        """The whole prompt. Braces mean nothing but in {question}, neither in the template nor in the question."""
        return self.text.replace(QUESTION, question)

    def continuation(self, response: str) -> str:
        """What comes after the prompt: without the <think> that stands there, and with a blank in between."""
        if self.text.endswith(THINK):
            response = response.removeprefix(THINK)
        apart = self.text[-1:].isspace() or response[:1].isspace()
        return response if apart else f" {response}"


def builtin_templates() -> dict[str, Path]:
    """Name -> file of the templates that come with Tandem."""
    return {file.name.removesuffix(_SUFFIX): file for file in sorted(_FOLDER.glob(f"*{_SUFFIX}"))}


def load_template(name: str) -> PromptTemplate | None:
    """What `task.template` names; None for the chat template. One line break at the file's end is not part of it.

    Raises RecipeError for a file that is missing, or has not exactly one {question}.
    """
    if name == CHAT:
        return None
    known = builtin_templates()
    path = known.get(name, Path(name).expanduser())
    try:
        text = path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        cause = getattr(error, "strerror", None) or str(error)
        names = ", ".join(f'"{known_name}"' for known_name in (CHAT, *known))
        raise RecipeError(
            f"task.template: found {name!r} ({cause}), allowed: {names}, or a text file in UTF-8 with {QUESTION} in it"
        ) from None
    if (count := text.count(QUESTION)) != 1:
        raise RecipeError(f"task.template: found {path} with {count} times {QUESTION}, allowed: exactly once")
    return PromptTemplate(text.removesuffix("\n"))
