"""What SFT and DPO learn from: pairs of token ids in the order of the data set, made when they are asked for."""

import json

import pytest

from learner.intake.arithmetic import SumStyle, make_sum
from learner.intake.data import load_task
from protocol.config import parse_recipe
from protocol.errors import RecipeError
from tests.tiny_model import make_tiny_tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    return make_tiny_tokenizer()


def task_of(tokenizer, method, records=None, path=None, prompts=0, **sections):
    task = sections.pop("task", {})
    if records is not None:
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
        task = {"name": "jsonl", "train": str(path), "grader": "exact"} | task
    recipe = parse_recipe({"method": method, "task": task, "eval": {"prompts": prompts}, **sections}, "")
    return load_task(recipe, tokenizer)


def preferences(count):
    return [{"prompt": f"p{i}", "chosen": f"good {i}", "rejected": f"bad {i}"} for i in range(count)]


def test_sft_pairs_are_the_files_lines_in_their_order(tokenizer, tmp_path):
    records = [{"prompt": f"p{i}", "response": f"r{i}"} for i in range(5)]
    task = task_of(tokenizer, "sft", records, tmp_path / "t.jsonl")
    pairs = task.sft_pairs()
    assert len(pairs) == 5
    assert [task.text(response) for _, response in pairs] == [f"r{i}<|im_end|>" for i in range(5)]
    assert task.text(pairs[3][0]) == "<|im_start|>user\np3<|im_end|>\n<|im_start|>assistant\n"
    assert pairs[-1] == pairs[4] == list(pairs)[4]
    assert pairs[1:3] == [pairs[1], pairs[2]]
    with pytest.raises(IndexError, match=r"item: found 5, allowed: 0\.\.4"):
        pairs[5]


def test_sft_heldout_problems_have_answers_and_are_no_pairs(tokenizer, tmp_path):
    records = [{"prompt": f"p{i}", "response": "r", **({"answer": "a"} if i % 2 else {})} for i in range(10)]
    task = task_of(tokenizer, "sft", records, tmp_path / "t.jsonl", prompts=3)
    assert {example.prompt for example in task.heldout} <= {"p1", "p3", "p5", "p7", "p9"}
    prompts = {task.text(prompt) for prompt, _ in task.sft_pairs()}
    assert len(task.sft_pairs()) == 7 == len(prompts)
    assert not prompts & {task.text(example.prompt_ids) for example in task.heldout}
    with pytest.raises(
        RecipeError, match=r"eval.prompts: found 6, allowed: at most the 5 .*task.train that have an ans"
    ):
        task_of(tokenizer, "sft", records, tmp_path / "t.jsonl", prompts=6)


def test_sft_of_grpos_problems_leaves_out_those_without_a_solution(tokenizer, tmp_path):
    records = [{"prompt": f"p{i}", "answer": "1", **({"solution": f"s{i}"} if i in (1, 4) else {})} for i in range(6)]
    task = task_of(tokenizer, "grpo", records, tmp_path / "t.jsonl")
    assert [task.text(response) for _, response in task.sft_pairs()] == ["s1<|im_end|>", "s4<|im_end|>"]
    assert len(task.preference_pairs()) == 0


def test_arithmetic_pairs_are_all_training_sums_and_need_no_memory(tokenizer):
    task = task_of(tokenizer, "sft", task={"max_operand": 10**9})
    assert len(task.sft_pairs()) == task.train_size == (10**9 + 1) * (10**9 + 2)
    assert task.sft_pairs()[10**17] == task.sft_pairs()[10**17]
    small = task_of(tokenizer, "sft", task={"max_operand": 2})
    texts = [task.text(prompt + response) for prompt, response in small.sft_pairs()]
    assert len(texts) == 12
    assert "<|im_start|>user\nWhat is 2 + 1?<|im_end|>\n<|im_start|>assistant\n2 + 1 = 3<|im_end|>" in texts


def test_arithmetic_preferences_have_a_right_and_a_wrong_sum(tokenizer):
    task = task_of(tokenizer, "dpo", task={"max_operand": 9}, prompts=4)
    seen = set()
    for prompt, chosen, rejected in task.preference_pairs():
        a, b = (int(word) for word in task.text(prompt).split("What is ")[1].split("?")[0].split(" + "))
        assert task.text(chosen) == f"{a} + {b} = {a + b}<|im_end|>"
        left, _, wrong = task.text(rejected).removesuffix("<|im_end|>").partition(" = ")
        assert left == f"{a} + {b}"
        assert 0 <= int(wrong) != a + b
        assert abs(int(wrong) - a - b) <= 10
        seen.add(int(wrong) - a - b)
    assert len(seen) > 10
    again = task_of(tokenizer, "dpo", task={"max_operand": 9}, prompts=4)
    assert list(again.preference_pairs()) == list(task.preference_pairs())
    other = task_of(tokenizer, "dpo", task={"max_operand": 9}, prompts=4, seed=1)
    assert sorted(other.preference_pairs()) != sorted(task.preference_pairs())


def test_wrong_sums_are_in_the_style_of_the_right_ones():
    style = SumStyle(solution_format="r1_zero", seed=3)
    problem = make_sum(3, 4, style)
    assert problem.chosen == problem.solution == "<think> 3 + 4 = 7 </think> <answer> 7 </answer>"
    wrong = style.wrong_sum(3, 4)
    assert wrong == style.wrong_sum(4, 3) != 7
    assert problem.rejected == f"<think> 3 + 4 = {wrong} </think> <answer> {wrong} </answer>"
    assert make_sum(3, 4, SumStyle(response_is_answer=True)).chosen == "7"


def test_preference_pairs_of_a_file(tokenizer, tmp_path, caplog):
    tie = {"prompt": "p", "chosen": "same", "rejected": "same "}
    task = task_of(tokenizer, "dpo", [*preferences(3), tie], tmp_path / "t.jsonl")
    pairs = task.preference_pairs()
    assert [(task.text(c), task.text(r)) for _, c, r in pairs] == [
        (f"good {i}<|im_end|>", f"bad {i}<|im_end|>") for i in range(3)
    ]
    assert task.text(pairs[2][0]).startswith("<|im_start|>user\np2<|im_end|>")
    assert "1 pairs left out, their chosen and rejected responses are the same" in caplog.text
    with pytest.raises(RecipeError, match=r"task.train: found .*t.jsonl, whose chosen and rejected are the same in ev"):
        task_of(tokenizer, "dpo", [tie], tmp_path / "t.jsonl")


def test_errors_of_a_file_of_preferences_name_file_line_and_field(tokenizer, tmp_path):
    path = tmp_path / "t.jsonl"
    with pytest.raises(RecipeError) as caught:
        task_of(tokenizer, "dpo", [*preferences(1), {"prompt": "p", "chosen": "c", "rejectd": "r"}], path)
    assert str(caught.value).startswith(f"{path}:2: rejected: found nothing, allowed: a text, or messages")


def test_pairs_that_do_not_fit_are_counted(tokenizer, tmp_path):
    long = {"prompt": "p", "chosen": "c", "rejected": "r " * 150}
    with pytest.raises(RecipeError, match=r"model.max_model_len: found 256, .*; 1 of 4 pairs of prompt and response"):
        task_of(tokenizer, "dpo", [*preferences(3), long], tmp_path / "t.jsonl")
    records = [{"prompt": "p " * 110, "response": "r " * n} for n in (1, 100, 110)]
    with pytest.raises(RecipeError, match=r"; 2 of 3 pairs of prompt and response have more"):
        task_of(tokenizer, "sft", records, tmp_path / "t.jsonl")
    fits = task_of(tokenizer, "sft", records[:1], tmp_path / "t.jsonl", rollout={"max_tokens": 100})
    assert len(fits.sft_pairs()) == 1, "nothing is drawn: no room for a completion is needed"


def test_pairs_that_do_not_fit_are_left_out_on_request(tokenizer, tmp_path, caplog):
    long = {"prompt": "p", "chosen": "c", "rejected": "r " * 300}
    leave_out = {"over_long": "leave_out"}
    task = task_of(tokenizer, "dpo", [long, *preferences(3)], tmp_path / "t.jsonl", task=leave_out)
    assert [task.text(chosen) for _, chosen, _ in task.preference_pairs()] == [f"good {i}<|im_end|>" for i in range(3)]
    assert task.train_size == 3
    assert "1 of 4 training problems left out, they have more than 256 tokens" in caplog.text
    with pytest.raises(RecipeError, match=r"model.max_model_len: found 256, allowed: more, no training problem fits"):
        task_of(tokenizer, "dpo", [long], tmp_path / "t.jsonl", task=leave_out)


def test_prompts_without_room_for_a_completion_are_left_out_on_request(tokenizer, tmp_path, caplog):
    records = [{"prompt": "p " * n, "answer": "1", "solution": "1"} for n in (1, 50, 90)]
    given = {"task": {"over_long": "leave_out"}, "rollout": {"max_tokens": 90}}
    warm = {"warm_start": {"examples": 3, "batch_size": 1}}
    task = task_of(tokenizer, "grpo", records, tmp_path / "t.jsonl", **given, **warm)
    assert [task.train_size, len(task.demonstrations)] == [2, 3], "a demonstration draws nothing"
    assert "1 of 3 training problems left out, they have more than 166 tokens" in caplog.text
    records[0] |= {"solution": "s " * 280}
    assert task_of(tokenizer, "grpo", records, tmp_path / "t.jsonl", **given).train_size == 2, "nothing demonstrates it"
    with pytest.raises(RecipeError, match=r"warm_start.examples: found 3, allowed: at most the 2 problems .* fit into"):
        task_of(tokenizer, "grpo", records, tmp_path / "t.jsonl", **given, **warm)
    apart = tmp_path / "apart.jsonl"
    apart.write_text(json.dumps({"prompt": "q " * 90, "answer": "1"}) + "\n")
    given["task"] |= {"heldout": str(apart)}
    with pytest.raises(RecipeError, match=r"1 of 1 held-out prompts have more"):
        task_of(tokenizer, "grpo", records, tmp_path / "t.jsonl", prompts=1, **given)


def test_leaving_out_is_advised_only_where_it_helps(tokenizer, tmp_path):
    records = [{"prompt": "p " * 90, "answer": "1"}] * 2
    room = {"rollout": {"max_tokens": 90}}
    with pytest.raises(RecipeError, match=r"or shorter training prompts, or task.over_long = \"leave_out\"$"):
        task_of(tokenizer, "grpo", records, tmp_path / "t.jsonl", **room)
    with pytest.raises(RecipeError, match=r"no training problem fits into that beside a completion of rollout.max_to"):
        task_of(tokenizer, "grpo", records, tmp_path / "t.jsonl", task={"over_long": "leave_out"}, **room)
    with pytest.raises(RecipeError, match=r"or shorter training prompts$"):
        task_of(tokenizer, "grpo", model={"max_model_len": 50}, rollout={"max_tokens": 40})


def test_method_with_nothing_to_learn_from_is_refused(tokenizer):
    gym = {"name": "reasoning_gym", "dataset": "chain_sum", "size": 5}
    with pytest.raises(
        RecipeError, match=r"task.train: found none of 5 records .*\"dpo\".* chosen and rejected \(task.f"
    ):
        task_of(tokenizer, "dpo", task=gym)


def test_nothing_is_held_out_without_evaluation(tokenizer, tmp_path):
    assert task_of(tokenizer, "sft", task={"max_operand": 3}).heldout == []
    task = task_of(tokenizer, "dpo", preferences(4), tmp_path / "t.jsonl")
    assert (task.heldout, task.train_size) == ([], 4)


def test_all_problems_of_a_file_of_their_own_are_held_out(tokenizer, tmp_path):
    records = [{"prompt": f"p{i}", "answer": "1"} for i in range(4)]
    apart = tmp_path / "apart.jsonl"
    apart.write_text("".join(json.dumps({"prompt": f"q{i}", "answer": "1"}) + "\n" for i in range(7)))
    heldout = {"heldout": str(apart)}
    task = task_of(tokenizer, "grpo", records, tmp_path / "t.jsonl", prompts="all", task=heldout)
    assert (len(task.heldout), task.train_size) == (7, 4)
    assert len(task_of(tokenizer, "eval", records, tmp_path / "t.jsonl", prompts="all").heldout) == 4
    for method in ("grpo", "sft"):
        with pytest.raises(
            RecipeError, match=r"eval.prompts: found \"all\", allowed here: a number, or .*task.heldout"
        ):
            task_of(tokenizer, method, [r | {"response": "1"} for r in records], tmp_path / "t.jsonl", prompts="all")
    with pytest.raises(RecipeError, match=r"eval.prompts: found \"all\", allowed with .*arithmetic.*: a number"):
        task_of(tokenizer, "grpo", task={"max_operand": 3}, prompts="all")
    assert len(task_of(tokenizer, "eval", task={"max_operand": 3}, prompts="all").heldout) == 10


def test_evaluation_may_hold_everything_out(tokenizer, tmp_path):
    records = [{"prompt": f"p{i}", "answer": "1"} for i in range(4)]
    task = task_of(tokenizer, "eval", records, tmp_path / "t.jsonl", prompts=4)
    assert {example.prompt for example in task.heldout} == {"p0", "p1", "p2", "p3"}
    assert task.train_size == 0
    assert task.fingerprint() != task_of(tokenizer, "eval", records, tmp_path / "t.jsonl", prompts=3).fingerprint()
    assert len(task_of(tokenizer, "eval", task={"max_operand": 2}, prompts=6).heldout) == 6
