"""Chat templates, plain prompts and the token that ends a turn."""

import pytest

from learner.intake.prompts import Prompter
from protocol.errors import RecipeError
from tests.tiny_model import make_tiny_tokenizer

# As SmolLM2's template does.
DEFAULT_SYSTEM = "{% if messages[0]['role'] != 'system' %}<|im_start|>system\nBe nice<|im_end|>\n{% endif %}"


def decode(tokenizer, ids) -> str:
    return tokenizer.decode(list(ids), skip_special_tokens=False)


def test_prompt_follows_the_chat_template():
    tokenizer = make_tiny_tokenizer()
    ids = Prompter(tokenizer).prompt_ids("Hi")
    assert decode(tokenizer, ids) == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    assert (ids[0], ids.count(2)) == (1, 1), "special tokens are single tokens"


def test_prompt_carries_the_system_prompt_unless_it_has_its_own():
    tokenizer = make_tiny_tokenizer()
    prompter = Prompter(tokenizer, "Be brief.")
    user = {"role": "user", "content": "Hi"}
    assert decode(tokenizer, prompter.prompt_ids("Hi")).startswith("<|im_start|>system\nBe brief.<|im_end|>\n")
    own = decode(tokenizer, prompter.prompt_ids(({"role": "system", "content": "Be long."}, user)))
    assert own.startswith("<|im_start|>system\nBe long.<|im_end|>\n<|im_start|>user")
    assert "brief" not in own


def test_prompt_with_a_blank_system_prompt_keeps_the_templates_own_away():
    tokenizer = make_tiny_tokenizer()
    tokenizer.chat_template = DEFAULT_SYSTEM + tokenizer.chat_template
    assert "Be nice" in decode(tokenizer, Prompter(tokenizer).prompt_ids("Hi"))
    blank = decode(tokenizer, Prompter(tokenizer, " ").prompt_ids("Hi"))
    assert blank.startswith("<|im_start|>system\n<|im_end|>\n<|im_start|>user")


def test_prompt_without_a_template_is_plain_text():
    tokenizer = make_tiny_tokenizer()
    tokenizer.chat_template = None
    prompter = Prompter(tokenizer, "Be brief.")
    assert decode(tokenizer, prompter.prompt_ids("Hi")) == "Be brief.\nQuestion: Hi\nAnswer:"
    assert decode(tokenizer, Prompter(tokenizer).prompt_ids("Hi")) == "Question: Hi\nAnswer:"
    assert decode(tokenizer, prompter.response_ids("7")) == " 7<|im_end|>"


def test_response_ends_with_the_token_that_ends_the_turn():
    tokenizer = make_tiny_tokenizer()
    assert decode(tokenizer, Prompter(tokenizer).response_ids("3 + 4 = 7")) == "3 + 4 = 7<|im_end|>"
    tokenizer.eos_token = "<|endoftext|>"  # as Gemma: EOS ends documents, the template ends turns
    assert Prompter(tokenizer).response_ids("7")[-1] == 2
    tokenizer.chat_template = "{% for message in messages %}{{ message['content'] + '\n' }}{% endfor %}"
    assert Prompter(tokenizer).response_ids("7")[-1] == 0


def test_response_completes_the_prompt_as_the_template_writes_the_turn():
    tokenizer = make_tiny_tokenizer()
    prompter = Prompter(tokenizer)
    turn = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]
    whole = tokenizer.apply_chat_template(turn, tokenize=False)
    assert decode(tokenizer, prompter.prompt_ids("Hi") + prompter.response_ids("Ho")) + "\n" == whole


def test_tokenizer_without_an_end_is_refused():
    tokenizer = make_tiny_tokenizer()
    tokenizer.chat_template, tokenizer.eos_token = None, None
    with pytest.raises(RecipeError, match=r"model\.path: found a tokenizer without an end-of-sequence token"):
        Prompter(tokenizer)


def test_template_that_refuses_a_role_is_a_clear_error():
    tokenizer = make_tiny_tokenizer()
    refuse = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    tokenizer.chat_template = refuse + tokenizer.chat_template
    with pytest.raises(RecipeError, match=r"model.path: its chat template refuses .*System role not supported"):
        Prompter(tokenizer, "Be brief.").prompt_ids("Hi")
