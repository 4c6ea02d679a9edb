"""The grader pool with graders that hang, throw and die, and with a parent that is killed."""

import asyncio
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from actor.grading import GraderPool

ROOT = Path(__file__).resolve().parents[2]
HOSTILE = (sys.executable, str(Path(__file__).with_name("hostile_grading_worker.py")))
PATIENT_S = 60.0
"""A time limit that no honest grading reaches, however busy the machine."""
NO_REWARD = {"reward": 0.0}
ALL_RIGHT = {"reward": 1.0, "format_reward": 1.0, "answer_reward": 1.0}


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):  # the latter where it ends while the file is read
        return False


def wait_until_gone(pids, deadline_s: float = 30.0) -> None:
    end = time.monotonic() + deadline_s
    while remaining := [pid for pid in pids if is_running(pid)]:
        assert time.monotonic() < end, f"still running: {remaining}"
        time.sleep(0.01)


async def test_pool_grades_with_the_products_graders():
    async with GraderPool(1, PATIENT_S) as pool:
        assert await pool.grade("integer", "3 + 4 = 7", "7") == (ALL_RIGHT, "")
        assert await pool.grade("exact", "Zürich ½", "Zürich ½") == (ALL_RIGHT, "")


async def test_pool_names_the_graders_when_asked_for_an_unknown_one():
    async with GraderPool(1, PATIENT_S) as pool:
        scores, error = await pool.grade("os.system", "true", "")
        assert scores == NO_REWARD
        assert error == (
            "ValueError: grader: found 'os', allowed: exact, gsm8k, integer, math, question_only, r1_zero,"
            " reasoning_gym:NAME, or a user's module:function"
        )
        assert (await pool.grade("hang", "", ""))[1].startswith("ValueError"), "test graders are not in the product"


async def test_pool_replaces_a_worker_that_hangs():
    async with GraderPool(1, 0.5, HOSTILE) as pool:
        (pid,) = pool.pids
        assert await pool.grade("hang", "hang", "") == (NO_REWARD, "time limit of 0.5 s")
        assert not is_running(pid)
    async with GraderPool(1, 2.0, HOSTILE) as pool:
        assert (await pool.grade("hang_holding_the_gil", "", ""))[1] == "time limit of 2 s"
        assert await pool.grade("integer", "7", "7") == (ALL_RIGHT, "")


async def test_pool_limits_each_response_of_a_group_by_itself():
    async with GraderPool(2, 2.0, HOSTILE) as pool:
        graded = await pool.grade_group("hang", ["good", "hang", "good", "hang", "good"], "")
    assert graded == [
        ({"reward": 1.0}, ""),
        (NO_REWARD, "time limit of 2 s"),
        ({"reward": 1.0}, ""),
        (NO_REWARD, "time limit of 2 s"),
        ({"reward": 1.0}, ""),
    ]


async def test_pool_reports_what_a_grader_throws_and_keeps_the_worker():
    async with GraderPool(1, PATIENT_S, HOSTILE) as pool:
        before = pool.pids
        assert await pool.grade("throw", "cats", "") == (NO_REWARD, "RuntimeError: no idea about cats")
        assert await pool.grade("system_exit", "", "") == (NO_REWARD, "SystemExit: 1")
        assert await pool.grade("throw", "é" * 10_000, "") == (
            NO_REWARD,
            "RuntimeError: no idea about " + "é" * (500 - len("RuntimeError: no idea about ")),
        )
        assert pool.pids == before


@pytest.mark.parametrize(
    ("grader", "error"),
    [("crash", "the grading process ended with signal 11 (Segmentation fault)"),
     ("exit_hard", "the grading process ended with status 3")],
)  # fmt: skip
async def test_pool_replaces_a_worker_that_dies(grader, error):
    async with GraderPool(1, PATIENT_S, HOSTILE) as pool:
        before = pool.pids
        assert await pool.grade(grader, "", "") == (NO_REWARD, error)
        assert (await pool.grade("exact", "a", "a")) == (ALL_RIGHT, "")
        assert pool.pids != before


async def test_pool_replaces_a_worker_that_died_idle_without_charging_the_sample():
    async with GraderPool(1, PATIENT_S) as pool:
        (pid,) = pool.pids
        os.kill(pid, signal.SIGKILL)
        await asyncio.to_thread(wait_until_gone, [pid])
        assert await pool.grade("exact", "a", "a") == (ALL_RIGHT, "")


@pytest.mark.parametrize(
    ("returned", "error"),
    [("{'reward': nan}", "ValueError: scores: found reward = nan, allowed: finite numbers"),
     ("{'reward': 1.0, 'length': -inf}", "ValueError: scores: found length = -inf, allowed: finite numbers"),
     ("{'score': 1.0}", "ValueError: scores: found {'score': 1.0}, allowed: a mapping of names to numbers with"),
     ("1.0", "ValueError: scores: found 1.0, allowed: a mapping of names to numbers with"),
     ("{'reward': 'high'}", "ValueError: could not convert string to float"),
     ("{'reward': None}", "TypeError: float()"),
     ("{'reward': 10 ** 400}", "OverflowError:")],
)  # fmt: skip
async def test_pool_turns_scores_that_are_no_numbers_into_errors(returned, error):
    async with GraderPool(1, PATIENT_S, HOSTILE) as pool:
        scores, found = await pool.grade("return", returned, "")
    assert scores == NO_REWARD
    assert found.startswith(error)


async def test_pool_passes_more_scores_and_whole_numbers():
    async with GraderPool(1, PATIENT_S, HOSTILE) as pool:
        assert await pool.grade("return", "{'reward': True, 'steps': 3}", "") == ({"reward": 1.0, "steps": 3.0}, "")


async def test_pool_survives_a_grader_that_prints_and_reads_standard_input():
    async with GraderPool(1, PATIENT_S, HOSTILE) as pool:
        assert await pool.grade("print", "", "") == ({"reward": 1.0}, "")


async def test_pool_takes_a_megabyte_and_text_that_is_not_unicode():
    async with GraderPool(1, PATIENT_S) as pool:
        assert (await pool.grade("integer", "word " * 200_000 + "7", "7"))[0]["reward"] == 1.0
        scores, error = await pool.grade("integer", "\ud800 7", "7")
        assert (scores, error.split(":")[0]) == (NO_REWARD, "UnicodeEncodeError")
        assert (await pool.grade_group("exact", ["a" * 10**6, "b"], "b")) == [
            ({"reward": 0.0, "format_reward": 1.0, "answer_reward": 0.0}, ""),
            (ALL_RIGHT, ""),
        ]


async def test_pool_never_gives_a_cancelled_calls_reply_to_the_next():
    async with GraderPool(1, PATIENT_S, HOSTILE) as pool:
        call = asyncio.create_task(pool.grade("hang", "hang", ""))
        await asyncio.sleep(0.05)
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call
        assert await pool.grade("throw", "dogs", "") == (NO_REWARD, "RuntimeError: no idea about dogs")


async def test_pool_keeps_answers_apart_under_many_calls():
    async with GraderPool(2, PATIENT_S, HOSTILE) as pool:
        graded = await pool.grade_group("return", [f"{{'reward': {i}}}" for i in range(100)], "")
        assert [scores["reward"] for scores, _ in graded] == list(range(100))
        workers = {scores["pid"] for scores, _ in await pool.grade_group("pid", [""] * 100, "")}
        assert workers == {float(pid) for pid in pool.pids}


async def test_pool_leaves_no_process_and_answers_those_who_still_wait():
    async with GraderPool(1, PATIENT_S, HOSTILE) as pool:
        pids = pool.pids
        waiting = [asyncio.create_task(pool.grade("hang", "hang", "")) for _ in range(3)]
        await asyncio.sleep(0.05)
    assert not any(is_running(pid) for pid in pids)
    async with asyncio.timeout(30):
        graded = await asyncio.gather(*waiting)
    assert [scores for scores, _ in graded] == [NO_REWARD] * 3
    assert all(error for _, error in graded)
    assert pool.pids == ()


async def test_pool_says_why_its_workers_do_not_start():
    with pytest.raises(OSError, match="ended with status 9 at its start"):
        async with GraderPool(2, PATIENT_S, (sys.executable, "-c", "raise SystemExit(9)")):
            pass
    with pytest.raises(FileNotFoundError):
        async with GraderPool(1, PATIENT_S, ("./no-such-program",)):
            pass
    with pytest.raises(ValueError, match="workers: found 0, allowed: at least 1"):
        GraderPool(0, PATIENT_S)


async def test_workers_import_nothing_heavy_and_not_the_main_module():
    async with GraderPool(1, PATIENT_S, HOSTILE) as pool:
        for module in (
            "torch",
            "vllm",
            "ray",
            "numpy",
            "transformers",
            "pydantic",
            "zmq",
            "learner",
            "math_verify",
            "sympy",
            "reasoning_gym",
            "pytest",
            "pickle",
        ):
            assert await pool.grade("modules", "", module) == ({"reward": 0.0}, ""), module
        assert (await pool.grade("modules", "", "actor.rewards"))[0]["reward"] == 1.0


def test_pool_works_in_a_thread_with_its_own_loop():
    results: list[object] = []

    async def grade() -> None:
        async with GraderPool(1, 1.0, HOSTILE) as pool:
            results.append(await pool.grade("hang", "hang", ""))

    thread = threading.Thread(target=asyncio.run, args=(grade(),))
    thread.start()
    thread.join(60)
    assert results == [(NO_REWARD, "time limit of 1 s")]


PARENT = """
import asyncio, sys
from actor.grading import GraderPool

async def main():
    async with GraderPool(2, 3600.0, sys.argv[1:]) as pool:
        busy = asyncio.create_task(pool.grade(GRADER, "hang", ""))
        await asyncio.sleep(0.1)
        print(*pool.pids, flush=True)
        await busy

asyncio.run(main())
"""


@pytest.mark.parametrize("grader", ["hang", "hang_holding_the_gil"])
def test_killing_the_parent_leaves_no_worker(grader):
    code = PARENT.replace("GRADER", repr(grader))
    parent = subprocess.Popen([sys.executable, "-c", code, *HOSTILE], stdout=subprocess.PIPE, text=True, cwd=ROOT)
    try:
        pids = [int(pid) for pid in parent.stdout.readline().split()]
        assert len(pids) == 2
        assert all(is_running(pid) for pid in pids)
    finally:
        parent.kill()
        parent.wait(30)
        parent.stdout.close()
    wait_until_gone(pids)
