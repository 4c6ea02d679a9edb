"""Data sets on their way to the learner: from files, directories as the hub has them, and from a hub out of reach."""

import json
import os
import subprocess
from pathlib import Path

import pytest

from deploy.data_cli import fetch, print_examples, show
from deploy.datasets import fetch_gsm8k, gsm8k_files, hub_file, read_records, resolve_task
from learner.intake.data import load_task
from protocol.config import parse_recipe
from protocol.errors import RecipeError
from tests.run_harness import TANDEM
from tests.tiny_model import make_tiny_model, make_tiny_tokenizer


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TANDEM_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def silent(_line):
    pass


def sums(first, count):
    return [{"question": f"{i} + 1?", "answer": f"It is {i + 1}.\n#### {i + 1}"} for i in range(first, first + count)]


def write(path, records):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def write_parquet(path, records):
    import pyarrow as pa
    import pyarrow.parquet as pq

    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(records), path)
    return path


def recipe_of(**sections):
    return parse_recipe({"eval": {"prompts": 2}, "model": {"max_model_len": 256}, **sections}, "")


# --- GSM8K ---


def test_gsm8k_is_copied_from_a_directory_and_found_by_recipes(tmp_path):
    write(tmp_path / "src" / "train.jsonl", sums(0, 9))
    write(tmp_path / "src" / "test.jsonl", sums(100, 4))
    fetched = fetch_gsm8k(tmp_path / "src", silent)
    assert fetched == gsm8k_files()
    assert [len(list(read_records(path))) for path in fetched.values()] == [9, 4]
    recipe = resolve_task(recipe_of(task={"name": "gsm8k"}), silent)
    assert (recipe.task.train, recipe.task.heldout) == (str(fetched["train"]), str(fetched["test"]))
    task = load_task(recipe, make_tiny_tokenizer())
    assert (task.train_size, len(task.heldout)) == (9, 2)
    assert {example.answer for example in task.heldout} <= {"101", "102", "103", "104"}


def test_gsm8k_of_the_recipe_comes_before_the_cache(tmp_path):
    write(tmp_path / "src" / "train.jsonl", sums(0, 9))
    write(tmp_path / "src" / "test.jsonl", sums(100, 4))
    fetch_gsm8k(tmp_path / "src", silent)
    mine = recipe_of(task={"name": "gsm8k", "train": "mine.jsonl"})
    assert resolve_task(mine, silent) == mine
    apart = resolve_task(recipe_of(task={"name": "gsm8k", "heldout": "mine.jsonl"}), silent)
    assert (apart.task.train, apart.task.heldout) == (str(gsm8k_files()["train"]), "mine.jsonl")


def test_gsm8k_that_was_never_fetched_names_the_command():
    with pytest.raises(RecipeError, match=r"task.train: found \"\", and no GSM8K at .*\n  tandem data fetch gsm8k"):
        resolve_task(recipe_of(task={"name": "gsm8k"}), silent)


def test_gsm8k_single_file_replaces_both_splits(tmp_path):
    write(tmp_path / "src" / "train.jsonl", sums(0, 9))
    write(tmp_path / "src" / "test.jsonl", sums(100, 4))
    fetch_gsm8k(tmp_path / "src", silent)
    fetched = fetch_gsm8k(write(tmp_path / "one.jsonl", sums(5, 6)), silent)
    assert list(fetched) == ["train"]
    assert not gsm8k_files()["test"].exists()
    assert resolve_task(recipe_of(task={"name": "gsm8k"}), silent).task.heldout == ""


def test_gsm8k_is_converted_from_parquet_as_the_hub_has_it(tmp_path):
    write_parquet(tmp_path / "hub" / "main" / "train-00000-of-00001.parquet", sums(0, 3))
    write_parquet(tmp_path / "hub" / "main" / "test-00000-of-00001.parquet", sums(7, 2))
    fetched = fetch_gsm8k(tmp_path / "hub", silent)
    assert list(read_records(fetched["train"])) == sums(0, 3)
    assert list(read_records(fetched["test"])) == sums(7, 2)
    assert list(fetch_gsm8k(tmp_path / "hub" / "main" / "test-00000-of-00001.parquet", silent)) == ["train"]
    assert list(read_records(gsm8k_files()["train"])) == sums(7, 2)


def test_gsm8k_faults_name_file_line_and_field_and_leave_the_cache_alone(tmp_path, cache):
    good = write(tmp_path / "good.jsonl", sums(0, 2))
    fetch_gsm8k(good, silent)
    bad = write(tmp_path / "bad.jsonl", [*sums(0, 1), {"question": "q", "answer": "7"}, {"qestion": "q"}])
    with pytest.raises(RecipeError) as caught:
        fetch_gsm8k(bad, silent)
    first, second = str(caught.value).split("\n")
    assert first.startswith(f'{bad}:2: answer: found no "####", allowed')
    assert second == f"{bad}:3: question: found nothing, allowed: a text (the record has qestion)"
    bad.write_text('{"question"\n')
    with pytest.raises(RecipeError, match=rf"{bad}:1: found no JSON"):
        fetch_gsm8k(bad, silent)
    assert gsm8k_files()["train"].read_text() == good.read_text()
    assert [entry.name for entry in (cache / "data" / "gsm8k").iterdir()] == ["train.jsonl"], "no half-written file"
    with pytest.raises(RecipeError, match=r"--from: found .*none, which does not exist"):
        fetch_gsm8k(tmp_path / "none", silent)


# --- data sets of the hub ---


def test_hub_directory_of_parquet_is_trained_on_through_its_fields(tmp_path):
    rows = [{"ask": f"{i} + 1?", "gold": i + 1, "blob": b"\x00"} for i in range(6)]
    write_parquet(tmp_path / "set" / "train-00000-of-00001.parquet", rows)
    write_parquet(tmp_path / "set" / "validation-00000-of-00001.parquet", [rows[0], rows[0] | {"ask": "9 + 1?"}])
    task = {"name": "hub", "dataset": str(tmp_path / "set"), "heldout_split": "validation",
            "fields": {"prompt": "ask", "answer": "gold"}}  # fmt: skip
    recipe = resolve_task(recipe_of(task=task), silent)
    assert list(read_records(Path(recipe.task.train)))[5] == {"ask": "5 + 1?", "gold": 6}, "bytes are left out"
    loaded = load_task(recipe, make_tiny_tokenizer())
    assert {example.prompt for example in loaded.heldout} == {"0 + 1?", "9 + 1?"}
    assert {loaded.train(i).prompt for i in range(loaded.train_size)} == {f"{i} + 1?" for i in range(1, 6)}
    assert loaded.train(0).answer == str(int(loaded.train(0).prompt[0]) + 1)


def test_hub_directory_of_preferences_as_conversations(tmp_path):
    user = {"role": "user", "content": "Hi?"}
    reply = [{"role": "assistant", "content": text} for text in ("Good day.", "What?")]
    rows = [{"chosen": [user, reply[0]], "rejected": [user, reply[1]], "score": 1.5}]
    write_parquet(tmp_path / "set" / "data" / "train-00000-of-00001.parquet", rows)
    task = {"name": "hub", "dataset": str(tmp_path / "set")}
    recipe = resolve_task(recipe_of(method="dpo", task=task, eval={"prompts": 0}), silent)
    loaded = load_task(recipe, make_tiny_tokenizer())
    ((prompt, chosen, rejected),) = loaded.preference_pairs()
    assert loaded.text(prompt) == "<|im_start|>user\nHi?<|im_end|>\n<|im_start|>assistant\n"
    assert (loaded.text(chosen), loaded.text(rejected)) == ("Good day.<|im_end|>", "What?<|im_end|>")


def test_hub_directory_is_read_anew_each_time(tmp_path):
    file = write(tmp_path / "set" / "train.jsonl", [{"prompt": "a"}])
    copy = hub_file(str(tmp_path / "set"), "", "train", silent)
    write(file, [{"prompt": "a"}, {"prompt": "b"}])
    assert hub_file(str(tmp_path / "set"), "", "train", silent) == copy
    assert list(read_records(copy)) == [{"prompt": "a"}, {"prompt": "b"}]


def test_hub_wrong_splits_and_subsets_name_their_keys(tmp_path):
    write(tmp_path / "set" / "train.jsonl", [{"prompt": "a"}])
    here = {"name": "hub", "dataset": str(tmp_path / "set")}
    with pytest.raises(RecipeError, match=r"task.train_split: found 'tran' of .*, allowed: \['train'\]"):
        resolve_task(recipe_of(task={**here, "train_split": "tran"}), silent)
    with pytest.raises(RecipeError, match=r"task.heldout_split: found 'test' of .*, allowed: \['train'\]"):
        resolve_task(recipe_of(task={**here, "heldout_split": "test"}), silent)
    with pytest.raises(RecipeError, match=r"task.subset: found 'main' of .*Available: \['default'\]"):
        resolve_task(recipe_of(task={**here, "subset": "main"}), silent)


def test_hub_copy_in_the_cache_needs_no_hub(tmp_path, cache):
    write(cache / "data" / "hub" / "someone%2Fset" / "main" / "train.jsonl", [{"prompt": "a", "answer": "1"}])
    recipe = recipe_of(task={"name": "hub", "dataset": "someone/set", "subset": "main"})
    found = resolve_task(recipe, lambda line: pytest.fail(line)).task.train
    assert list(read_records(Path(found))) == [{"prompt": "a", "answer": "1"}]


def test_hub_out_of_reach_is_one_line(cache):
    environment = {**os.environ, "HF_ENDPOINT": "http://127.0.0.1:9", "TANDEM_CACHE": str(cache)}
    environment |= {"HF_HUB_OFFLINE": "0", "HF_DATASETS_OFFLINE": "0"}
    for name in ("someone/set", "gsm8k"):
        result = subprocess.run(
            [*TANDEM, "data", "fetch", name], env=environment, capture_output=True, text=True, timeout=120, check=False
        )
        assert result.returncode == 2
        (line,) = result.stderr.strip().splitlines()
        assert line.startswith(f"error: NAME: found '{name.replace('gsm8k', 'openai/gsm8k')}', which cannot be")
        assert "refused" in line
        assert ("--from FILE-OR-DIR" if name == "gsm8k" else "a local directory of JSONL or Parquet") in line
        assert not list(cache.rglob("*.jsonl*"))


def test_data_fetch_names_its_own_options(tmp_path):
    write(tmp_path / "set" / "train.jsonl", [{"prompt": "a"}])
    with pytest.raises(RecipeError, match=r"--split: found 'tran' of .*, allowed: \['train'\]"):
        hub_file(str(tmp_path / "set"), "", "tran", silent)
    with pytest.raises(RecipeError, match=r"--subset: found 'main' of "):
        hub_file(str(tmp_path / "set"), "main", "train", silent)


def test_no_data_set_runs_code(tmp_path):
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "set.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    with pytest.raises(RecipeError, match=r"NAME: found "):
        hub_file(str(tmp_path / "set"), "", "train", silent)
    assert not (tmp_path / "ran").exists()


def test_run_without_its_data_set_is_refused_and_leaves_no_directory(tmp_path):
    recipe = tmp_path / "recipe.toml"
    recipe.write_text('[task]\nname = "gsm8k"\n')
    command = [*TANDEM, "train", str(recipe), "--runs", str(tmp_path / "runs")]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert result.returncode == 2
    assert 'task.train: found "", and no GSM8K at' in result.stderr
    assert result.stderr.endswith("  tandem data fetch gsm8k\n")
    assert not (tmp_path / "runs").exists()


# --- what `tandem data` prints ---


def test_fetch_says_where_it_lies_and_what_is_in_it(tmp_path, capsys):
    write(tmp_path / "set" / "train.jsonl", [{"ask": "a", "n": 1, "words": ["é"]}, {"ask": "b", "n": 2, "words": []}])
    fetch(str(tmp_path / "set"), None, "", "train")
    lines = capsys.readouterr().out.splitlines()
    assert lines[1] == f"{hub_file(str(tmp_path / 'set'), '', 'train', silent)}: 2 records"
    assert lines[2:4] == ["fields: ask (str), n (int), words (list)", "the first record:"]
    assert json.loads("".join(lines[4:])) == {"ask": "a", "n": 1, "words": ["é"]}
    with pytest.raises(RecipeError, match=r"--from: found .*, allowed: with gsm8k"):
        fetch("someone/set", tmp_path, "", "train")


def test_show_takes_the_recipes_own_model(tmp_path, capsys):
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(f'[model]\npath = "{make_tiny_model(tmp_path / "tiny")}"\n')
    show(recipe, ["task.template=question_only", "eval.prompts=4"], 2)
    text = capsys.readouterr().out
    assert text.count("--- prompt, ") == 2
    assert text.startswith("454 problems to train on, 4 held out")


def shown(capsys, **sections):
    recipe = recipe_of(**sections)
    print_examples(recipe, load_task(recipe, make_tiny_tokenizer()), 1)
    return capsys.readouterr().out


def test_examples_are_shown_as_the_model_sees_them(capsys):
    text = shown(capsys, task={"max_operand": 3})
    assert "16 problems to train on, 2 held out, 16 with a solution, 16 with a preference" in text
    prompt = "<|im_start|>user\nWhat is 3 + 2?<|im_end|>\n<|im_start|>assistant\n"
    assert f" tokens\n{prompt}\n--- reference\n5\n--- solution\n3 + 2 = 5\n" in text


def test_examples_of_offline_methods_are_their_pairs(capsys):
    text = shown(capsys, method="dpo", task={"max_operand": 3, "template": "question_only"})
    assert "--- prompt, 14 tokens\nWhat is " in text
    assert text.count("<|im_end|>") == 2
    assert "--- chosen, " in text and "--- rejected, " in text
    assert "--- response, " in shown(capsys, method="sft", task={"max_operand": 3})


def test_examples_of_a_gym_show_the_answer_for_people(capsys):
    task = {"name": "reasoning_gym", "dataset": "chain_sum", "grader": "reasoning_gym:chain_sum", "size": 3}
    text = shown(capsys, method="eval", task=task)
    assert '--- what the grader gets\n{"question": ' in text
    reference = text.split("--- reference\n")[1].split("\n")[0]
    assert f'"answer": "{reference}"' in text
