"""Prompt templates that are files: the two that come along, a user's, and what the model then sees."""

import pytest

from learner.intake.data import load_task
from learner.intake.prompts import Prompter
from learner.intake.templates import PromptTemplate, builtin_templates, load_template
from protocol.config import parse_recipe
from protocol.errors import RecipeError
from tests.tiny_model import make_tiny_tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    return make_tiny_tokenizer()


def task_with(tokenizer, **task):
    data = {"task": task, "model": {"max_model_len": 1024}, "warm_start": {"examples": 16}}
    return load_task(parse_recipe(data, ""), tokenizer)


def test_builtin_templates_are_found_beside_the_packages():
    assert sorted(builtin_templates()) == ["question_only", "r1_zero"]
    assert load_template("chat") is None
    assert load_template("question_only") == PromptTemplate("{question}")
    text = load_template("r1_zero").text
    assert text.endswith("\nUser: {question}\nAssistant: <think>")
    assert all(tag in text for tag in ("<think> ", " </think> <answer> ", " </answer>"))


def test_model_sees_the_template_as_plain_text(tokenizer):
    task = task_with(tokenizer, template="r1_zero", solution_format="r1_zero")
    example = task.demonstrations[1]
    assert task.text(example.prompt_ids).endswith("\nUser: What is 3 + 2?\nAssistant: <think>")
    assert "<|im_start|>" not in task.text(example.prompt_ids)
    assert example.solution == "<think> 3 + 2 = 5 </think> <answer> 5 </answer>"
    response = task.text(task.demonstration_tokens(example)[1])
    assert response == " 3 + 2 = 5 </think> <answer> 5 </answer><|im_end|>", "<think> stands in the prompt"


def test_question_only_is_followed_by_a_blank_and_ends_with_eos(tokenizer):
    task = task_with(tokenizer, template="question_only")
    example = task.demonstrations[1]
    assert task.text(example.prompt_ids) == "What is 3 + 2?"
    assert task.text(task.demonstration_tokens(example)[1]) == " 3 + 2 = 5<|im_end|>"


def test_template_keeps_what_the_tokenizer_puts_before_a_text():
    class WithBos:
        chat_template, eos_token_id = "unused", 9

        def __call__(self, text, add_special_tokens=True):
            return {"input_ids": [1] * add_special_tokens + [len(text)]}

    prompter = Prompter(WithBos(), template=PromptTemplate("Q: {question}\nA: "))
    assert prompter.prompt_ids("hm") == (1, 9)
    assert prompter.response_ids("yes") == (3, 9), "no blank after a blank, and EOS, not the end of a chat turn"


def test_users_template_is_read_from_a_file_and_braces_stay(tokenizer, tmp_path):
    path = tmp_path / "mine.txt"
    path.write_text("{x} {question} {}\n")
    task = task_with(tokenizer, template=str(path))
    assert task.text(task.demonstrations[1].prompt_ids) == "{x} What is 3 + 2? {}"
    assert PromptTemplate("a {question}").fill("{question}?") == "a {question}?"


@pytest.mark.parametrize(("text", "count"), [("no place", 0), ("{question} {question}", 2), ("{ question }", 0)])
def test_template_without_exactly_one_question_is_refused(tokenizer, tmp_path, text, count):
    path = tmp_path / "bad.prompt"
    path.write_text(text)
    message = rf"task.template: found {path} with {count} times {{question}}, allowed: exactly once"
    with pytest.raises(RecipeError, match=message):
        task_with(tokenizer, template=str(path))


def test_template_that_does_not_exist_names_those_that_do(tokenizer):
    with pytest.raises(
        RecipeError, match=r"found 'r1_zro' \(No such file.*\"chat\", \"question_only\", \"r1_zero\", or"
    ):
        task_with(tokenizer, template="r1_zro")


def test_fingerprint_sees_the_templates_text(tokenizer, tmp_path):
    path = tmp_path / "mine.prompt"
    prints = set()
    for text in ("{question}", "{question}\n\n", "Q {question}"):
        path.write_text(text)
        prints.add(task_with(tokenizer, template=str(path)).fingerprint())
    prints.add(task_with(tokenizer).fingerprint())
    assert len(prints) == 4


def test_conversation_in_a_template_is_refused():
    prompter = Prompter(make_tiny_tokenizer(), template=PromptTemplate("{question}"))
    user = {"role": "user", "content": "Hi"}
    assert prompter.prompt_ids((user,)) == prompter.prompt_ids("Hi")
    with pytest.raises(RecipeError, match=r"task.template: found a file, and a prompt of 2 messages"):
        prompter.prompt_ids(({"role": "system", "content": "Hm"}, user))
