"""The benchmark of the hub's scale counts what happens, in one process and for a moment."""

from __future__ import annotations

import itertools
import time
from pathlib import Path

import msgspec
import pytest

from benchmarks.scale import idle_costs
from benchmarks.scale_actors import Swarm
from benchmarks.scale_groups import GROUP_SIZE, MEAN_TOKENS, Prepared, make_groups
from benchmarks.scale_learner import Learner
from learner.intake.journal import read_groups
from protocol import codec
from protocol.messages import TicketId
from tests.actor_harness import until
from tests.learner.telemetry.test_exporter import parse, scrape

DEADLINE_S = 120.0


def test_prepared_frames_are_those_of_the_group_with_its_id_name_and_version() -> None:
    group = make_groups()[0]
    for index in (0, 127, 70_000):
        frames = Prepared(group, 300).frames(TicketId(2, index), msgspec.msgpack.encode("actor-500"))
        found = codec.decode_from_actor(frames)
        assert (found.id, found.actor) == (TicketId(2, index), "actor-500")
        assert {completion.spans for completion in found.completions} == {((300, 0),)}
        assert (found.token_ids, found.prompt_ids) == (group.token_ids, group.prompt_ids)


def test_simulated_completions_are_skewed_and_of_the_mean_length() -> None:
    lengths = sorted(completion.num_tokens for group in make_groups() for completion in group.completions)
    assert {len(group.completions) for group in make_groups()} == {GROUP_SIZE}
    assert abs(sum(lengths) / len(lengths) - MEAN_TOKENS) < 1
    assert lengths[len(lengths) // 2] < 0.85 * MEAN_TOKENS
    assert lengths[-len(lengths) // 20] > 2 * MEAN_TOKENS


@pytest.mark.parametrize(("keys", "fsync"), [(True, False), (False, True)])
def test_two_simulated_actors_groups_are_all_journaled_once_and_acknowledged(
    tmp_path: Path, keys: bool, fsync: bool
) -> None:
    enough = 1_200  # more than two steps: versions are followed
    with Learner(tmp_path, 2, keys, fsync, heartbeat_s=0.1, telemetry=keys) as learner:
        swarm = Swarm(["actor-0", "actor-1"], learner.endpoint, learner.keys, 8, 100_000.0, 0.1)
        deadline, turns = time.monotonic() + DEADLINE_S, itertools.count()

        def turn(swarm: Swarm) -> None:
            assert time.monotonic() < deadline, f"{swarm.tally.acknowledged} of {enough} groups acknowledged"
            if next(turns) == 0:
                learner.source.resume_training()
            if swarm.tally.acknowledged >= 20:  # first at the pace of engines
                swarm.saturate()
            if swarm.tally.acknowledged >= enough and learner.sample()["versions"] > 2:
                learner.source.pause_training()
                swarm.stop()

        swarm.run(turn)
        until(lambda: not learner.server.peers, "the intake to hear both goodbyes")
        tally, cpu_s = swarm.tally, learner.sample()["cpu_s"]
        assert learner.server.crash is None
        assert bool(learner.metrics) == keys
        if keys:
            whole = {(): learner.accepted()[0]}
            place, name = learner.metrics, "tandem_groups_accepted_total"
            until(lambda: parse(scrape(place)).get(name) == whole, "a sample of the end")
    counts, sample = learner.server.dispatcher.counts(), learner.sample()
    assert sample["faults"].keys() <= {"unroutable"}, "only what the actors left unheard"
    journaled = list(read_groups(tmp_path / "groups.journal"))
    assert counts["duplicates"] == counts["reissued"] - counts["leased"] == 0
    assert len(journaled) == len({group.id for group in journaled}) == learner.accepted()[0]
    assert sum(group.num_tokens for group in journaled) == learner.accepted()[1]
    assert enough <= tally.acknowledged == len(tally.latencies_s) <= len(journaled)
    assert {group.actor for group in journaled} == {"actor-0", "actor-1"}
    assert sample["versions"] == counts["trained"] // 512 + 1
    assert min(tally.latencies_s) > 0
    assert cpu_s["intake"] > 0 < cpu_s["zmq"]


def test_idle_cost_is_the_slope_between_the_fewest_and_the_most_actors() -> None:
    def row(actors: int, cpu: float, rss: float, way: str = "curve") -> dict[str, object]:
        return {"actors": actors, "way": way, "idle": {"cpu_share": [0, cpu, 1], "rss_mb": [0, rss, 1]}}

    rows = [row(8, 0.02, 60.0), row(1, 0.01, 50.0), row(101, 0.11, 70.0), row(1, 0.5, 1.0, "plain")]
    assert idle_costs(rows) == {"curve": {"cpu_percent": pytest.approx(0.1), "rss_kb": pytest.approx(200)}}
