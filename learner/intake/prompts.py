"""Text to token ids, once and only here: prompts as the model's chat template or a file's writes them, and responses
to learn from.

Called by `data.py`. Actors get token ids and add nothing, so no template and no BOS can differ between the two sides.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from learner.intake.templates import PromptTemplate
from protocol.errors import RecipeError

_CONTENT = "tandem"


class Prompter:
    """One tokenizer (of transformers), and one system prompt or one template that takes the chat template's place.

    `system_prompt` goes before the prompt unless the prompt's own messages begin with one. Empty: none of ours, but
    some templates then write their own (SmolLM2's has 16 tokens); a single blank is a system message without text.
    """

    def __init__(self, tokenizer: Any, system_prompt: str = "", template: PromptTemplate | None = None) -> None:
        self._tokenizer = tokenizer
        self._system_prompt = system_prompt
        self._template = template
        self._has_template = template is None and bool(getattr(tokenizer, "chat_template", None))
        self._end_of_turn = self._find_end_of_turn()

    def prompt_ids(self, prompt: str | tuple[Mapping[str, str], ...]) -> tuple[int, ...]:
        """Token ids of the whole prompt, up to where the model's turn begins.

        A template of a file is plain text to the tokenizer, with what that puts before a text (BOS). So is, where the
        model has no chat template, "Question: …\\nAnswer:".
        """
        if self._template:
            return tuple(self._tokenizer(self._template.fill(_question(prompt)))["input_ids"])
        messages = self._messages(prompt)
        if self._has_template:
            return self._ids(self._render(messages, add_generation_prompt=True))
        head = [message["content"].strip() for message in messages if message["role"] == "system"]
        names = {"user": "Question", "assistant": "Answer"}
        turns = [f"{names[m['role']]}: {m['content']}" for m in messages if m["role"] in names]
        return tuple(self._tokenizer("\n".join([*filter(None, head), *turns, "Answer:"]))["input_ids"])

    def response_ids(self, response: str) -> tuple[int, ...]:
        """Token ids of a demonstrated response, the end of the turn included."""
        if self._template:
            text = self._template.continuation(response)
        else:
            text = response if self._has_template else f" {response}"
        return (*self._ids(text), self._end_of_turn)

    def text(self, ids: tuple[int, ...]) -> str:
        """What the model sees, as text with its special tokens: for people."""
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=False))

    def _messages(self, prompt: str | tuple[Mapping[str, str], ...]) -> list[dict[str, str]]:
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else [dict(m) for m in prompt]
        if self._system_prompt and messages[0]["role"] != "system":
            messages.insert(0, {"role": "system", "content": self._system_prompt.strip()})
        return messages

    def _render(self, messages: list[dict[str, str]], add_generation_prompt: bool) -> str:
        try:
            return self._tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=add_generation_prompt
            )
        except Exception as error:  # a template's own raise_exception, say "system role not supported"
            raise RecipeError(f"model.path: its chat template refuses the prompt: {error}") from error

    def _ids(self, text: str) -> tuple[int, ...]:
        return tuple(self._tokenizer(text, add_special_tokens=False)["input_ids"])

    def _find_end_of_turn(self) -> int:
        """The first special token that the template writes after an assistant's text, else the tokenizer's EOS.

        Not simply EOS: Gemma's turns end with <end_of_turn>, while its EOS ends documents.
        """
        if self._has_template:
            turn = [{"role": "user", "content": _CONTENT}, {"role": "assistant", "content": _CONTENT}]
            _, _, after = self._render(turn, add_generation_prompt=False).rpartition(_CONTENT)
            special = {token for token, added in self._tokenizer.added_tokens_decoder.items() if added.special}
            for token in self._ids(after):
                if token in special:
                    return token
        if self._tokenizer.eos_token_id is None:
            raise RecipeError(
                "model.path: found a tokenizer without an end-of-sequence token, allowed: one with eos_token"
            )
        return int(self._tokenizer.eos_token_id)


def _question(prompt: str | tuple[Mapping[str, str], ...]) -> str:
    """The text for a template's {question}."""
    if isinstance(prompt, str):
        return prompt
    if len(prompt) > 1 or prompt[0]["role"] != "user":
        raise RecipeError(
            f'task.template: found a file, and a prompt of {len(prompt)} messages; allowed: "chat", or prompts that are'
            " texts or one message of the user"
        )
    return prompt[0]["content"]
