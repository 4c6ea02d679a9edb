"""A grading process with graders that hang, throw and die: started by test_grading.py in place of the product's."""

import ctypes
import os
import sys
import time

from actor.grading_worker import serve
from actor.rewards import GRADERS


def _hang(response: str, answer: str) -> dict[str, float]:
    if response == "hang":
        time.sleep(3600)
    return {"reward": 1.0}


def _hang_holding_the_gil(response: str, answer: str) -> dict[str, float]:
    ctypes.PyDLL(None).sleep(3600)  # PyDLL keeps the interpreter lock: no thread and no Python signal handler runs
    return {"reward": 1.0}


def _throw(response: str, answer: str) -> dict[str, float]:
    raise RuntimeError(f"no idea about {response}")


def _crash(response: str, answer: str) -> dict[str, float]:
    ctypes.string_at(0)
    return {"reward": 1.0}


def _exit_hard(response: str, answer: str) -> dict[str, float]:
    os._exit(3)


def _return(response: str, answer: str) -> dict[str, float]:
    return eval(response, {"nan": float("nan"), "inf": float("inf")})


def _print(response: str, answer: str) -> dict[str, float]:
    print("x" * 100_000, flush=True)
    return {"reward": float(sys.stdin.read() == "")}


HOSTILE = {
    "hang": _hang,
    "hang_holding_the_gil": _hang_holding_the_gil,
    "throw": _throw,
    "system_exit": lambda response, answer: sys.exit(1),
    "crash": _crash,
    "exit_hard": _exit_hard,
    "return": _return,
    "print": _print,
    "pid": lambda response, answer: {"reward": 0.0, "pid": float(os.getpid())},
    "modules": lambda response, answer: {"reward": float(answer in sys.modules)},
}

if __name__ == "__main__":
    serve({**GRADERS, **HOSTILE}, sys.argv[1:])
