from __future__ import annotations

import pytest

from learner.state import RunState


def test_lags_add_up_over_steps_and_survive_a_checkpoint() -> None:
    state = RunState()
    state.count_lag({"lag_mean": 0.5, "lag_max": 1.0, "lag_tokens_0": 10.0, "lag_tokens_1": 10.0, "loss": 3.0})
    state.count_lag({"lag_mean": 0.25, "lag_max": 0.0, "lag_tokens_0": 4.0, "lag_tokens_7": 1.0})
    again = RunState()
    again.take_up(state.as_json())
    for one in (state, again):
        assert (one.lag_sum, one.lag_max) == (0.75, 1.0)
        assert one.lag_tokens == {"0": 14, "1": 10, "7": 1}


def test_field_of_another_version_is_named() -> None:
    with pytest.raises(ValueError, match="found colour, unknown to this version"):
        RunState().take_up({"step": 3, "colour": 1})
