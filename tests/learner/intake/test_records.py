"""One record to one problem: the layouts of GSM8K, MATH and preference sets, named fields, what each method needs."""

import pytest

from learner.intake.problems import Problem
from learner.intake.records import Reading, last_boxed, read_problem
from protocol.config import parse_recipe
from protocol.sections import FieldsConfig

USER, SYSTEM = {"role": "user", "content": "Hi?"}, {"role": "system", "content": "Be brief."}


def reply(text):
    return {"role": "assistant", "content": text}


def reading(method="grpo", heldout=False, prompts=2, **task):
    data = {"task": {"name": "jsonl", "train": "t", "grader": "exact", **task}, "method": method,
            "eval": {"prompts": prompts}}  # fmt: skip
    return Reading.of(parse_recipe(data, ""), heldout)


@pytest.mark.parametrize(
    ("text", "boxed"),
    [(r"so $\boxed{42}$.", "42"),
     (r"\boxed{1} then \boxed{\frac{1}{2}}", r"\frac{1}{2}"),
     (r"\boxed{\left\{ 1 \right\}}", r"\left\{ 1 \right\}"),
     (r"\boxed{3}, not closed: \boxed{4", "3"),
     (r"$\boxed 5$.", "5"),
     (r"\fbox{7}", "7"),
     (r"\boxed{ }", None),
     ("no box {7}", None)],
)  # fmt: skip
def test_last_box_is_read_with_balanced_braces(text, boxed):
    assert last_boxed(text) == boxed


def test_math_record_takes_its_answer_from_the_box_or_the_field():
    solution = r"Half of it: $\boxed{\frac{1}{2}}$."
    assert read_problem({"problem": "p", "solution": solution}, reading()) == Problem("p", r"\frac{1}{2}", solution)
    assert read_problem({"problem": "p", "solution": solution, "answer": "0.5"}, reading()).answer == "0.5"
    with pytest.raises(ValueError, match=r"answer: found nothing, allowed: .* or a solution with \\boxed"):
        read_problem({"problem": "p", "solution": "no box"}, reading())


def test_gsm8k_record_is_taken_apart_and_other_questions_need_a_mapping():
    record = {"question": "q", "answer": "Is <<1+1=2>>2.\n#### 1,002"}
    assert read_problem(record, reading()) == Problem("q", "1002", "Is 2.\n#### 1002")
    assert read_problem(record, reading(fields={"prompt": "question"})).answer == "1002"
    with pytest.raises(ValueError, match=r'answer: found no "####".*task.fields.prompt = "question"'):
        read_problem({"question": "q", "answer": "Paris"}, reading())
    assert read_problem({"question": "q", "answer": "Paris"}, reading(fields={"prompt": "question"})).answer == "Paris"
    with pytest.raises(ValueError, match='answer: found nothing behind "####"'):
        read_problem({"question": "q", "answer": "So. ####"}, reading())


def test_named_fields_are_read_and_must_be_there():
    fields = {"prompt": "ask", "answer": "gold", "solution": "cot"}
    record = {"ask": "a?", "gold": 7, "cot": "is 7", "prompt": "no", "answer": "no"}
    assert read_problem(record, reading(fields=fields)) == Problem("a?", "7", "is 7")
    with pytest.raises(
        ValueError, match=r"aks: found nothing, allowed: a field of the record \(ask, gold, cot, prompt"
    ):
        read_problem(record, reading(fields={"prompt": "aks"}))
    with pytest.raises(ValueError, match=r"gold: found \[1\], allowed: a text or a number"):
        read_problem(record | {"gold": [1]}, reading(fields=fields))


@pytest.mark.parametrize("name", ["solution", "response", "completion", "output"])
def test_sft_takes_the_response_under_its_usual_names_and_needs_no_answer(name):
    sft = reading("sft", prompts=0)
    assert read_problem({"prompt": "p", name: " r "}, sft) == Problem("p", "", "r")
    with pytest.raises(ValueError, match=r"solution: found nothing, allowed: .* named solution or response or compl"):
        read_problem({"prompt": "p", "answer": "1"}, sft)
    if name != "solution":
        assert read_problem({"prompt": "p", "answer": "1", name: "r"}, reading()).solution == ""


def test_sft_reads_conversations():
    sft = reading("sft", prompts=0)
    problem = read_problem({"messages": [SYSTEM, USER, reply("Ho.")]}, sft)
    assert problem == Problem((SYSTEM, USER), "", "Ho.")
    longer = {"prompt": "Hi?", "messages": [USER, reply("Ho."), USER, reply("Again?")]}
    assert read_problem(longer, sft) == Problem((USER, reply("Ho."), USER), "", "Again?")
    assert read_problem({**longer, "response": "r"}, sft) == Problem("Hi?", "", "r")
    with pytest.raises(ValueError, match='messages: found a last message of role "user", allowed: "assistant"'):
        read_problem({"messages": [USER]}, sft)


def test_answers_are_needed_by_what_is_graded():
    record = {"prompt": "p", "solution": "s", "chosen": "c", "rejected": "r"}
    for ungraded in (reading("sft"), reading("dpo"), reading("sft", heldout=True, prompts=0)):
        assert read_problem(record, ungraded).answer == ""
    methods = ("grpo", "expert_iteration", "eval")
    for graded in (*map(reading, methods), reading("sft", heldout=True), reading("dpo", heldout=True)):
        with pytest.raises(ValueError, match="answer: found nothing"):
            read_problem(record, graded)


def test_integer_answers_are_only_wanted_where_something_is_graded():
    record = {"prompt": "p", "answer": "two", "solution": "s"}
    assert read_problem(record, reading("sft", prompts=0, grader="integer")).answer == "two"
    with pytest.raises(ValueError, match=r"answer: found 'two', allowed with task\.grader"):
        read_problem(record, reading("sft", grader="integer"))


def test_preferences_are_texts_or_conversations():
    dpo = reading("dpo")
    expected = Problem("Hi?", "", chosen="good", rejected="bad")
    assert read_problem({"prompt": "Hi?", "chosen": "good", "rejected": " bad\n"}, dpo) == expected
    assert read_problem({"prompt": "Hi?", "chosen": [USER, reply("good")], "rejected": "bad"}, dpo) == expected
    pair = {"chosen": [SYSTEM, USER, reply("good")], "rejected": [SYSTEM, USER, reply("bad")]}
    assert read_problem(pair, dpo) == Problem((SYSTEM, USER), "", chosen="good", rejected="bad")
    named = reading("dpo", fields={"prompt": "q", "chosen": "better", "rejected": "worse"})
    assert read_problem({"q": "Hi?", "better": "good", "worse": "bad"}, named) == expected


@pytest.mark.parametrize(
    ("record", "error"),
    [({"prompt": "p", "rejected": "r"}, "chosen: found nothing, allowed: a text, or messages that end with the assist"),
     ({"prompt": "p", "chosen": "c", "rejected": " "}, "rejected: found ' '"),
     ({"prompt": "p", "chosen": [USER], "rejected": "r"}, 'chosen: found a last message of role "user"'),
     ({"prompt": "p", "chosen": [{"role": "x"}], "rejected": "r"}, "chosen: found .*allowed: a list of messages"),
     ({"chosen": "c", "rejected": "r"}, "prompt: found nothing"),
     ({"chosen": [reply("c")], "rejected": [reply("r")]}, "prompt: found nothing"),
     ({"chosen": [USER, reply("c")], "rejected": [SYSTEM, USER, reply("r")]},
      "rejected: found other messages before the response than chosen has")],
)  # fmt: skip
def test_preference_errors_name_the_field(record, error):
    with pytest.raises(ValueError, match=error):
        read_problem(record, reading("dpo"))


def test_r1_zero_format_puts_reasoning_and_answer_into_tags():
    r1 = reading(solution_format="r1_zero")
    record = {"question": "q", "answer": "Is <<1+1=2>>2.\n#### 2"}
    assert read_problem(record, r1).solution == "<think> Is 2. </think> <answer> 2 </answer>"
    boxed = {"problem": "p", "solution": r"It is \boxed{3}"}
    assert read_problem(boxed, r1).solution == r"<think> It is \boxed{3} </think> <answer> 3 </answer>"
    with pytest.raises(ValueError, match=r'answer: found nothing, allowed with task\.solution_format = "r1_zero"'):
        read_problem({"prompt": "p", "solution": "s"}, reading("sft", prompts=0, solution_format="r1_zero"))


def test_conversations_do_not_go_into_a_question_template():
    template = reading(template="question_only")
    assert read_problem({"prompt": [USER], "answer": 1}, template).prompt == (USER,)
    with pytest.raises(ValueError, match=r'prompt: found 2 messages, allowed with a task.template other than "chat"'):
        read_problem({"prompt": [SYSTEM, USER], "answer": 1}, template)


def test_usual_reading_has_no_mapping():
    assert Reading().fields == FieldsConfig()


def test_a_dotted_name_is_a_path_into_objects():
    """As in data sets that keep the reference beside its style."""
    record = {"prompt": "p", "reward_model": {"ground_truth": 3.5, "style": "rule"}}
    named = reading(fields={"answer": "reward_model.ground_truth"})
    assert read_problem(record, named) == Problem("p", "3.5")
    flat = {"prompt": "p", "reward_model.ground_truth": "7"}
    assert read_problem(flat, named).answer == "7", "a field of exactly that name comes first"
    with pytest.raises(ValueError, match=r"reward_model.ground_truth: found nothing, allowed: .*\(style\)"):
        read_problem({"prompt": "p", "reward_model": {"style": "rule"}}, named)


def test_alpaca_input_goes_behind_the_instruction():
    record = {"instruction": "Add.", "input": "1 and 2", "output": "3"}
    assert read_problem(record, reading("sft")).prompt == "Add.\n\n1 and 2"
    assert read_problem(record | {"input": ""}, reading("sft")).prompt == "Add."
    other = {"prompt": "Add.", "input": "1 and 2", "context": "3 and 4", "output": "3"}
    assert read_problem(other, reading("sft")).prompt == "Add.", "input is looked for beside an instruction alone"
    mapped = reading("sft", fields={"input": "context"})
    assert read_problem(other, mapped).prompt == "Add.\n\n3 and 4"
    assert read_problem(record | {"input": 5}, reading("sft")).prompt == "Add.", "nobody called it a text"
    with pytest.raises(ValueError, match=r"^input: found 5 beside instruction, allowed: a text behind a text"):
        read_problem(record | {"input": 5}, reading("sft", fields={"input": "input"}))
