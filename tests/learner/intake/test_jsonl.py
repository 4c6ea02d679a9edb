"""Tasks from files: both layouts, splits, and errors that name file, line and field."""

import json

import pytest

from learner.intake.data import load_task
from learner.intake.jsonl import parse_problem
from learner.intake.problems import Problem
from learner.intake.records import Reading
from protocol.config import parse_recipe
from protocol.errors import RecipeError
from tests.tiny_model import make_tiny_tokenizer

INTEGER = Reading(grader="integer")


@pytest.fixture(scope="module")
def tokenizer():
    return make_tiny_tokenizer()


def write(path, records) -> str:
    path.write_text("\n".join(json.dumps(record) for record in records) + "\n\n", "utf-8")
    return str(path)


def make_recipe(train, *, heldout="", prompts=2, examples=0, seed=0, grader="integer"):
    return parse_recipe(
        {"task": {"name": "jsonl", "train": str(train), "heldout": str(heldout), "grader": grader}, "seed": seed,
         "eval": {"prompts": prompts}, "warm_start": {"examples": examples, "batch_size": 1}},
        "recipe",
    )  # fmt: skip


def numbered(count, start=0):
    return [{"prompt": f"p{i}", "answer": i, "solution": f"it is {i}"} for i in range(start, start + count)]


def test_problem_lines_are_read_in_both_layouts():
    assert parse_problem('{"prompt": "1 + 1?", "answer": 2}', INTEGER) == Problem("1 + 1?", "2")
    assert parse_problem('{"prompt": "Capital?", "answer": " Paris "}', Reading()) == Problem("Capital?", "Paris")
    chat = [{"role": "system", "content": "Hm"}, {"role": "user", "content": "Hi"}]
    assert parse_problem(json.dumps({"prompt": chat, "answer": "1"}), INTEGER).prompt == tuple(chat)
    worked = {"question": "Sell 1200?", "answer": "Half is 1200/2 = <<1200/2=600>>600.\nAll is 1,800.\n#### 1,800"}
    assert parse_problem(json.dumps(worked), INTEGER) == Problem(
        "Sell 1200?", "1800", "Half is 1200/2 = 600.\nAll is 1,800.\n#### 1800"
    )


@pytest.mark.parametrize(
    ("line", "error"),
    [('{"prompt": "p"', "found no JSON"),
     ("[1, 2]", r"found \[1, 2\], allowed: a JSON object"),
     ('{"answer": "2"}', "prompt: found nothing, allowed: a text, or a list"),
     ('{"prompt": " ", "answer": "2"}', "prompt: found ' '"),
     ('{"prompt": [], "answer": "2"}', r"prompt: found \[\]"),
     ('{"prompt": [{"role": "tool", "content": "x"}], "answer": "2"}', "system or user or assistant"),
     ('{"prompt": [{"role": "assistant", "content": "x"}], "answer": "2"}', 'last message of role "assistant"'),
     ('{"prompt": "p"}', "answer: found nothing, allowed: a text or a number"),
     ('{"prompt": "p", "answer": 3.5}', r"answer: found '3.5', allowed with task.grader = \"integer\": an integer"),
     ('{"prompt": "p", "answer": NaN}', "answer: found nan, allowed: a text or a number"),
     ('{"prompt": "p", "answer": true}', "answer: found True"),
     ('{"prompt": "p", "answer": "two"}', r"answer: found 'two', allowed with task.grader = \"integer\": an integer"),
     ('{"prompt": "p", "answer": "2", "solution": 2}', "solution: found 2, allowed: a text"),
     ('{"question": "q", "answer": "42"}', 'answer: found no "####"'),
     ('{"question": " ", "answer": "#### 42"}', "question: found ' ', allowed: a text")],
)  # fmt: skip
def test_problem_line_errors_say_what_was_found_and_allowed(line, error):
    with pytest.raises(ValueError, match=error):
        parse_problem(line, INTEGER)


def test_file_errors_name_file_and_line(tokenizer, tmp_path):
    path = tmp_path / "train.jsonl"
    path.write_text('{"prompt": "p", "answer": "1"}\n\n{"prompt": "p"}\n' + "oops\n" * 6)
    with pytest.raises(RecipeError) as caught:
        load_task(make_recipe(path), tokenizer)
    lines = str(caught.value).split("\n")
    assert lines[0] == f"{path}:3: answer: found nothing, allowed: a text or a number"
    assert lines[1].startswith(f"{path}:4: found no JSON")
    assert lines[5:] == ["and 2 more lines"]


def test_files_that_cannot_be_read_name_their_key(tokenizer, tmp_path):
    good = write(tmp_path / "good.jsonl", numbered(5))
    with pytest.raises(RecipeError, match=r"task.train: found .*none.jsonl \(No such file or directory\)"):
        load_task(make_recipe(tmp_path / "none.jsonl"), tokenizer)
    with pytest.raises(RecipeError, match=r"task\.heldout: found"):
        load_task(make_recipe(good, heldout=tmp_path), tokenizer)
    (tmp_path / "latin.jsonl").write_bytes(b'{"prompt": "\xe9"}\n')
    with pytest.raises(RecipeError, match=r"task.train: found .*utf-8.*in UTF-8"):
        load_task(make_recipe(tmp_path / "latin.jsonl"), tokenizer)
    (tmp_path / "empty.jsonl").write_text("\n\n")
    with pytest.raises(RecipeError, match="without a problem"):
        load_task(make_recipe(tmp_path / "empty.jsonl"), tokenizer)


@pytest.mark.parametrize("seed", range(3))
def test_split_by_seed_shares_no_prompt(tokenizer, tmp_path, seed):
    records = numbered(30) + numbered(5)  # five prompts appear twice
    task = load_task(make_recipe(write(tmp_path / "t.jsonl", records), prompts=10, examples=8, seed=seed), tokenizer)
    heldout = {example.prompt for example in task.heldout}
    shown = {example.prompt for example in task.demonstrations}
    trained = {task.train(index).prompt for index in range(task.train_size)}
    assert (len(task.heldout), len(task.demonstrations)) == (10, 8)
    assert heldout | trained == {f"p{i}" for i in range(30)}
    assert not heldout & trained
    assert shown <= trained
    other = load_task(make_recipe(tmp_path / "t.jsonl", prompts=10, seed=seed + 1), tokenizer)
    assert {example.prompt for example in other.heldout} != heldout


def test_heldout_file_is_used_and_kept_out_of_training(tokenizer, tmp_path, caplog):
    train, heldout = write(tmp_path / "a.jsonl", numbered(10)), write(tmp_path / "b.jsonl", numbered(10, start=8))
    task = load_task(make_recipe(train, heldout=heldout, prompts=4), tokenizer)
    assert task.train_size == 8, "p8 and p9 are in the held-out file, drawn or not"
    assert {task.train(i).prompt for i in range(8)} == {f"p{i}" for i in range(8)}
    assert {e.prompt for e in task.heldout} <= {f"p{i}" for i in range(8, 18)}
    assert len(task.heldout) == 4
    assert "2 problems left out of training" in caplog.text


def test_demonstrations_come_from_lines_with_a_solution(tokenizer, tmp_path):
    records = [*numbered(2), *({"prompt": f"bare {i}", "answer": i} for i in range(20))]
    path = write(tmp_path / "t.jsonl", records)
    task = load_task(make_recipe(path, prompts=0, examples=2), tokenizer)
    assert {example.solution for example in task.demonstrations} == {"it is 0", "it is 1"}
    response = task.demonstration_tokens(task.demonstrations[0])[1]
    assert tokenizer.decode(list(response)) == task.demonstrations[0].solution + "<|im_end|>"
    with pytest.raises(RecipeError, match=r"warm_start\.examples: found 3, allowed: at most the 2 problems"):
        load_task(make_recipe(path, prompts=0, examples=3), tokenizer)


def test_more_heldout_problems_than_there_are_is_refused(tokenizer, tmp_path):
    train, heldout = write(tmp_path / "a.jsonl", numbered(4)), write(tmp_path / "b.jsonl", numbered(3, start=10))
    with pytest.raises(RecipeError, match=r"eval.prompts: found 4, allowed: at most the 3 problems of task.heldout"):
        load_task(make_recipe(train, heldout=heldout, prompts=4), tokenizer)
    with pytest.raises(RecipeError, match=r"eval.prompts: found 5, allowed: at most the 4 problems of task.train"):
        load_task(make_recipe(train, prompts=5), tokenizer)
    with pytest.raises(RecipeError, match="all of whose 4 prompts are held out"):
        load_task(make_recipe(train, prompts=4), tokenizer)


def test_long_prompts_are_counted_not_cut(tokenizer, tmp_path):
    records = [*numbered(7), *({"prompt": "word " * 100, "answer": i} for i in range(3))]
    with pytest.raises(RecipeError, match=r"model.max_model_len: found 256, .*; 3 of 10 training prompts have more"):
        load_task(make_recipe(write(tmp_path / "t.jsonl", records), prompts=0), tokenizer)


def test_fingerprint_sees_a_changed_line(tokenizer, tmp_path):
    records = numbered(10)
    recipe = make_recipe(write(tmp_path / "t.jsonl", records))
    before = load_task(recipe, tokenizer).fingerprint()
    assert load_task(recipe, tokenizer).fingerprint() == before
    records[7]["solution"] = "it is not"
    write(tmp_path / "t.jsonl", records)
    assert load_task(recipe, tokenizer).fingerprint() != before
