"""Packing: who sees whom, what predicts what, and how rows share microbatches."""

import numpy as np
import pytest
import torch

from learner.batch import Line, Row, Sample, pack, pack_lines, plan_microbatches, split_row, tokenize_prompt_and_output
from tests.learner.reference import random_rows
from tests.tiny_model import make_tiny_tokenizer


def sample(ids: list[int], mask: list[int] | None = None, advantage: float = 0.0, lag: int = 0) -> Sample:
    return Sample(
        np.array(ids, np.int32), np.array([-i / 10 for i in ids], np.float32),
        np.array(mask or [1] * len(ids), bool), advantage, np.full(len(ids), lag, np.int32),
    )  # fmt: skip


def test_pack_lays_out_prompt_once_and_completions_without_their_last_token() -> None:
    packed = pack([
        Row((7, 8), (sample([11, 12, 13], [1, 0, 1], 0.5, 1), sample([21, 22], None, -1.0, 2)), 0.7),
        Row((9,), (sample([31]),), 1.5),
    ])  # fmt: skip
    assert packed.input_ids.tolist() == [[7, 8, 11, 12, 21], [9, 0, 0, 0, 0]]
    assert packed.position_ids.tolist() == [[0, 1, 2, 3, 2], [0, 0, 0, 0, 0]]
    assert packed.predict_index.tolist() == [1, 2, 3, 1, 4, 5]
    assert packed.target_ids.tolist() == [11, 12, 13, 21, 22, 31]
    assert packed.mask.tolist() == [True, False, True, True, True, True]
    assert packed.sequence_index.tolist() == [0, 0, 0, 1, 1, 2]
    assert packed.sequence_tokens.tolist() == [2, 2, 2, 2, 2, 1]
    assert packed.advantages.tolist() == [0.5, 0.5, 0.5, -1.0, -1.0, 0.0]
    assert packed.lag.tolist() == [1, 1, 1, 2, 2, 0]
    torch.testing.assert_close(packed.temperature, torch.tensor([0.7] * 5 + [1.5]))
    torch.testing.assert_close(packed.engine_logprobs, torch.tensor([-1.1, -1.2, -1.3, -2.1, -2.2, -3.1]))
    assert (packed.num_tokens, packed.num_positions) == (6, 10)


def test_pack_attention_shows_prompt_and_own_past_only() -> None:
    packed = pack([Row((7, 8), (sample([11, 12, 13]), sample([21, 22])), 1.0), Row((9,), (sample([31]),), 1.0)])
    assert packed.attention.shape == (2, 1, 5, 5)
    assert packed.attention[0, 0].int().tolist() == [
        [1, 0, 0, 0, 0],
        [1, 1, 0, 0, 0],
        [1, 1, 1, 0, 0],
        [1, 1, 1, 1, 0],
        [1, 1, 0, 0, 1],  # the second completion does not see the first
    ]
    assert packed.attention.any(dim=-1).all()  # padding has keys, too: no softmax over nothing
    assert not packed.attention[1, 0, 0, 1:].any()  # and nothing sees padding


def test_pack_keeps_a_token_that_equals_the_padding_id() -> None:
    packed = pack([Row((0, 0), (sample([0, 0, 5]),), 1.0)])
    assert packed.num_tokens == 3 and packed.mask.all()
    assert packed.attention[0, 0, 3].tolist() == [True] * 4


@pytest.mark.parametrize(
    ("row", "message"), [(Row((), (sample([1]),)), "empty prompt"), (Row((1,), (sample([]),)), "completion without")]
)
def test_pack_refuses_what_nothing_predicts(row: Row, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        pack([row])


def line_length(line: Line) -> int:
    return sum(row.packed_length for row in line)


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("budget", [1, 9, 14, 30, 1000])
def test_plan_keeps_budget_and_loses_no_completion(budget: int, packing: bool) -> None:
    rows = random_rows()
    plan = plan_microbatches(rows, budget, packing)
    for lines in plan:
        positions = len(lines) * max(map(line_length, lines))
        assert positions <= budget or (len(lines) == 1 and len(lines[0]) == 1 and len(lines[0][0].samples) == 1)
    kept = [row for lines in plan for line in lines for row in line]
    planned = sorted((row.prompt_ids, tuple(s.token_ids)) for row in kept for s in row.samples)
    assert planned == sorted((row.prompt_ids, tuple(s.token_ids)) for row in rows for s in row.samples)
    assert (len(plan) == 1) == (budget == 1000)


def test_packing_fills_lines_up_to_the_longest_and_no_further() -> None:
    rows = [Row((1,) * length, (sample([5]),)) for length in (6, 3, 3, 2, 1)]
    assert [len(line) for line in plan_microbatches(rows, 12, packing=False)[0]] == [1, 1]
    (lines,) = plan_microbatches(rows, 18, packing=True)
    assert [[row.packed_length for row in line] for line in lines] == [[6], [3, 3], [2, 1]]
    packed, padded = pack_lines(lines), pack([row for line in lines for row in line])
    assert (packed.num_positions, padded.num_positions) == (18, 30)
    assert packed.target_ids.tolist() == padded.target_ids.tolist()


def test_rows_of_one_line_do_not_see_each_other() -> None:
    packed = pack_lines([(Row((7,), (sample([1, 2]),)), Row((8, 9), (sample([3]),)))])
    assert packed.input_ids.tolist() == [[7, 1, 8, 9]]
    assert packed.position_ids.tolist() == [[0, 1, 0, 1]]
    assert packed.predict_index.tolist() == [0, 1, 3]
    assert packed.attention[0, 0].int().tolist() == [[1, 0, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 1, 1]]


def test_a_row_that_must_stay_whole_is_not_split() -> None:
    row = Row((1, 2, 3), (sample([4] * 5), sample([5] * 5)))
    assert len(plan_microbatches([row], 8)) == 2
    assert plan_microbatches([row], 8, split=False) == [[(row,)]]


def test_split_row_repeats_the_prompt_and_keeps_the_order() -> None:
    row = Row((1, 2, 3), tuple(sample([k] * 3) for k in range(5)), 0.7)
    pieces = split_row(row, 8)  # 3 + 2 + 2 fit, a third completion does not
    assert [[int(s.token_ids[0]) for s in piece.samples] for piece in pieces] == [[0, 1], [2, 3], [4]]
    assert all(piece.prompt_ids == row.prompt_ids and piece.temperature == 0.7 for piece in pieces)
    assert split_row(row, 13) == [row]


def test_tokenize_prompt_and_output_pads_first_and_cuts_then() -> None:
    class Tokenizer:
        pad_token_id = None
        eos_token_id = 9

        def __call__(self, text: str, add_special_tokens: bool) -> dict[str, list[int]]:
            assert not add_special_tokens
            return {"input_ids": [int(digit) for digit in text]}

    found = tokenize_prompt_and_output(["12", "3"], ["45", "6789"], Tokenizer())
    assert found["input_ids"].tolist() == [[1, 2, 4, 5], [3, 6, 7, 8]]
    assert found["labels"].tolist() == [[2, 4, 5, 9], [6, 7, 8, 9]]
    assert found["response_mask"].int().tolist() == [[0, 1, 1, 0], [1, 1, 1, 1]], "the 9 of an output is no padding"


def test_tokenize_prompt_and_output_with_a_real_tokenizer_loses_nothing() -> None:
    tokenizer = make_tiny_tokenizer()
    prompts, outputs = ["What is 1 + 1?", "7"], ["It is 2.", "1 and 2 and 3"]
    found = tokenize_prompt_and_output(prompts, outputs, tokenizer)
    for line, output in enumerate(outputs):
        assert tokenizer.decode(found["labels"][line][found["response_mask"][line]]) == output
