"""The arithmetic task: golden examples, splits that share nothing, an order that depends on the seed alone."""

import random
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from learner.intake.arithmetic import count_pairs, unordered_pair
from learner.intake.data import Example, load_task
from protocol.config import parse_recipe
from protocol.errors import RecipeError
from tests.tiny_model import make_tiny_tokenizer

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture(scope="module")
def tokenizer():
    return make_tiny_tokenizer()


def make_recipe(**sections):
    sections = {"warm_start": {"examples": 64}, **sections}
    return parse_recipe(sections, "recipe")


def operands(example: Example) -> frozenset[int]:
    a, b = (int(word) for word in example.prompt.removeprefix("What is ").removesuffix("?").split(" + "))
    assert example.answer == str(a + b)
    assert example.solution == f"{a} + {b} = {a + b}"
    return frozenset((a, b))


def test_arithmetic_never_changes(tokenizer):
    task = load_task(make_recipe(), tokenizer)
    assert [e.prompt for e in task.heldout[:3]] == ["What is 5 + 10?", "What is 18 + 5?", "What is 14 + 15?"]
    assert [e.prompt for e in task.demonstrations[:3]] == ["What is 13 + 16?", "What is 3 + 2?", "What is 3 + 8?"]
    assert [task.train(i).prompt for i in (0, 1, 334)] == ["What is 20 + 15?", "What is 16 + 6?", "What is 0 + 14?"]
    assert task.train(0) == Example("What is 20 + 15?", task.train(0).prompt_ids, "35", "20 + 15 = 35")
    text = tokenizer.decode(list(task.train(0).prompt_ids), skip_special_tokens=False)
    assert text == "<|im_start|>user\nWhat is 20 + 15?<|im_end|>\n<|im_start|>assistant\n"
    assert task.fingerprint() == "3b8c3ae4b005f0e2b62b350c464cff66"


@pytest.mark.parametrize("seed", range(5))
def test_arithmetic_heldout_pairs_are_never_trained_on_nor_shown(tokenizer, seed):
    task = load_task(make_recipe(seed=seed), tokenizer)
    heldout = {operands(example) for example in task.heldout}
    shown = {operands(example) for example in task.demonstrations}
    trained = {operands(task.train(index)) for index in range(2 * task.train_size)}
    assert (len(heldout), len(shown)) == (64, 64), "all different, in either order"
    assert not heldout & trained
    assert not heldout & shown
    assert len(heldout | trained) == 231 == count_pairs(20)


def test_arithmetic_pass_deals_every_training_sum_once_in_both_orders(tokenizer):
    task = load_task(make_recipe(), tokenizer)
    assert task.train_size == 2 * (231 - 64)
    passes = [[task.train(n * task.train_size + i).prompt for i in range(task.train_size)] for n in range(3)]
    prompts = Counter(passes[0])
    for prompt, count in prompts.items():
        a, _, b = prompt.removeprefix("What is ").removesuffix("?").partition(" + ")
        assert count == (2 if a == b else 1)
        assert f"What is {b} + {a}?" in prompts
    assert Counter(passes[1]) == Counter(passes[2]) == prompts
    assert passes[0] != passes[1] != passes[2]


def test_train_order_does_not_depend_on_who_asks(tokenizer):
    straight, shuffled = load_task(make_recipe(), tokenizer), load_task(make_recipe(), tokenizer)
    indices = list(range(800))
    random.Random(1).shuffle(indices)
    out_of_order = {index: shuffled.train(index) for index in indices}
    assert [straight.train(index) for index in range(800)] == [out_of_order[index] for index in range(800)]


def test_train_order_is_the_same_in_another_process(tokenizer):
    code = (
        "from tests.tiny_model import make_tiny_tokenizer; from learner.intake.data import load_task;"
        "from protocol.config import parse_recipe; import sys;"
        "task = load_task(parse_recipe({'seed': 3}, ''), make_tiny_tokenizer());"
        "print(task.fingerprint(), *(task.train(i).answer for i in range(50))); assert 'torch' not in sys.modules"
    )
    environment = {"PYTHONHASHSEED": "123", "PYTHONPATH": str(ROOT), "PATH": "", "USE_TORCH": "0"}
    output = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    task = load_task(parse_recipe({"seed": 3}, ""), tokenizer)
    assert output.stdout.split() == [task.fingerprint(), *(task.train(i).answer for i in range(50))]


def test_seeds_give_other_splits_and_orders(tokenizer):
    zero, one = (load_task(make_recipe(seed=seed), tokenizer) for seed in (0, 1))
    assert {operands(e) for e in zero.heldout} != {operands(e) for e in one.heldout}
    assert [zero.train(i).prompt for i in range(20)] != [one.train(i).prompt for i in range(20)]


def test_demonstration_tokens_are_the_prompt_and_the_sum_with_its_end(tokenizer):
    task = load_task(make_recipe(), tokenizer)
    example = task.demonstrations[1]
    prompt_ids, response_ids = task.demonstration_tokens(example)
    assert prompt_ids == example.prompt_ids
    assert tokenizer.decode(list(response_ids), skip_special_tokens=False) == "3 + 2 = 5<|im_end|>"


def test_demonstrations_earn_the_reward_of_their_grader(tokenizer):
    from actor.rewards import find_grader

    for grader in ("integer", "exact"):
        task = load_task(make_recipe(task={"grader": grader}), tokenizer)
        for example in task.demonstrations:
            assert find_grader(grader)(example.solution, example.answer)["reward"] == 1.0


def test_fingerprint_tells_what_changed(tokenizer):
    def of(**sections):
        return load_task(make_recipe(**sections), tokenizer).fingerprint()

    same = of()
    assert of(optim={"lr": 1e-6}, steps=3) == same
    changed = [of(seed=1), of(task={"max_operand": 21}), of(eval={"prompts": 63}), of(task={"system_prompt": "Hm"})]
    assert len({same, *changed}) == 5


def test_operands_too_small_for_the_splits_are_refused(tokenizer):
    load_task(make_recipe(task={"max_operand": 15}), tokenizer)  # 136 pairs
    with pytest.raises(RecipeError, match=r"task.max_operand: found 14, which makes 120 pairs .*64 \+ warm_start.ex"):
        load_task(make_recipe(task={"max_operand": 14}), tokenizer)
    with pytest.raises(RecipeError, match="and one to train on"):
        load_task(parse_recipe({"task": {"max_operand": 1}, "eval": {"prompts": 3}}, ""), tokenizer)


def test_huge_operands_need_no_memory(tokenizer):
    task = load_task(make_recipe(task={"max_operand": 10**9}), tokenizer)
    assert task.train_size == (10**9 + 1) * (10**9 + 2) - 128
    assert task.train(10**17) == task.train(10**17)
    assert len({operands(task.train(index)) for index in range(100)}) == 100


def test_prompts_that_leave_no_room_are_refused_not_cut(tokenizer):
    longest = len(load_task(make_recipe(), tokenizer).heldout[2].prompt_ids)  # two digits each
    fits = {"model": {"max_model_len": longest + 8}, "rollout": {"max_tokens": 8}, "warm_start": {"examples": 0}}
    load_task(parse_recipe(fits, ""), tokenizer)
    fits["model"] = {"max_model_len": longest + 7}
    with pytest.raises(RecipeError, match=rf"found {longest + 7}, .*\d+ of 335 training prompts.*least {longest + 8}"):
        load_task(parse_recipe(fits, ""), tokenizer)
    fits |= {"model": {"max_model_len": longest + 8}, "eval": {"max_tokens": 9}}
    with pytest.raises(RecipeError, match=r"\d+ of 64 held-out prompts"):
        load_task(parse_recipe(fits, ""), tokenizer)
    fits |= {"eval": {"max_tokens": 8}, "warm_start": {"examples": 64}}
    with pytest.raises(RecipeError, match=r"\d+ of 64 demonstrations"):
        load_task(parse_recipe(fits, ""), tokenizer)


def test_unordered_pairs_are_ranked_without_gaps():
    pairs = [(a, b) for b in range(30) for a in range(b + 1)]
    assert [unordered_pair(rank) for rank in range(count_pairs(29))] == pairs
    assert unordered_pair(count_pairs(10**9) - 1) == (10**9, 10**9)


def test_negative_positions_are_refused(tokenizer):
    with pytest.raises(IndexError, match="index: found -1"):
        load_task(make_recipe(), tokenizer).train(-1)
