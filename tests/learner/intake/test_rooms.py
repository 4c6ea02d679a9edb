"""Who has the most room: against looking through all actors."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from learner.intake.rooms import Rooms

changes = st.tuples(st.sampled_from("abcdef"), st.integers(1, 3), st.integers(-1, 4))


@given(st.lists(changes, max_size=60), st.integers(0, 3))
def test_most_room_is_that_of_whoever_has_had_it_longest(history: list[tuple[str, int, int]], above: int) -> None:
    rooms = Rooms()
    known: dict[str, tuple[int, int, int]] = {}
    for number, (actor, version, room) in enumerate(history):
        rooms.put(actor, version, room)
        known[actor] = (version, room, number)
        fitting = [(-room, number, actor) for actor, (version, room, number) in known.items()
                   if room > 0 and version > above]  # fmt: skip
        assert rooms.most(above) == min(fitting, default=(0, 0, None))[2]


def test_rooms_keep_no_entry_of_versions_that_nobody_serves() -> None:
    rooms = Rooms()
    for version in range(1, 50):
        rooms.put("a", version, 2)
        assert rooms.most(above=0) == "a"
    assert list(rooms._lines) == [49]
