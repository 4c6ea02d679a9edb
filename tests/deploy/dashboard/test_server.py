"""The server in its thread, on real sockets, and the command that picks the run."""

from __future__ import annotations

import http.client
import json
import logging
import os
import signal
import socket
import threading
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from deploy import cli
from deploy.dashboard import command
from deploy.dashboard.server import PORT, Dashboard, open_socket
from protocol.errors import RecipeError
from protocol.rundir import RunDir
from tests.dashboard_harness import served


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    return make_run(tmp_path, "one")


def make_run(runs: Path, name: str) -> RunDir:
    run = RunDir((runs / name).resolve()).create()
    run.recipe.write_text(f'name = "{name}"\n')
    return run


def ask(dashboard: Dashboard, method: str, path: str, body: Any = None, **headers: str) -> http.client.HTTPResponse:
    connection = http.client.HTTPConnection("127.0.0.1", dashboard.port, timeout=10)
    own = {"X-Tandem": "1", "Origin": f"http://127.0.0.1:{dashboard.port}"}
    connection.request(method, path, body=json.dumps(body) if body is not None else None, headers=own | headers)
    return connection.getresponse()


def test_the_address_lets_in_and_the_token_is_in_no_log(run: RunDir, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    with served(run) as dashboard:
        place, token = dashboard.address.split("/#token=")
        assert place == f"http://127.0.0.1:{dashboard.port}"
        assert ask(dashboard, "GET", "/api/run").status == 401
        login = ask(dashboard, "POST", "/api/login", {"token": token})
        cookie = login.headers["Set-Cookie"].split(";")[0]
        answer = ask(dashboard, "GET", "/api/run", Cookie=f"other=1; {cookie}")
        assert json.loads(answer.read())["name"] == "one"
        assert "uvicorn" not in answer.headers.get("Server", "")
    assert token not in caplog.text
    assert token not in Path(f"/proc/{os.getpid()}/cmdline").read_text()
    assert not [path for path in run.path.rglob("*") if path.is_file() and token in path.read_text(errors="replace")]


def test_the_server_is_on_loopback_and_ends_with_its_context(run: RunDir) -> None:
    before = set(threading.enumerate())
    with served(run) as dashboard:
        port = dashboard.port
        assert dashboard._socket.getsockname()[0] == "127.0.0.1"
    assert not {thread for thread in set(threading.enumerate()) - before if thread.name == "dashboard"}
    with socket.socket() as probe:
        assert probe.connect_ex(("127.0.0.1", port)) != 0


def test_a_port_in_use_is_refused_where_it_was_asked_for_and_else_another_is_taken() -> None:
    with open_socket(port=0) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(RecipeError, match=rf"cannot listen on 127.0.0.1, port {port}: Address already in use"):
            open_socket(port=port)
    with open_socket() as usual, open_socket() as other:
        assert {PORT, usual.getsockname()[1]} != {other.getsockname()[1]}
        assert other.getsockname()[1] != usual.getsockname()[1]


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "example.com", ""])
def test_hosts_that_are_no_one_address_are_refused(host: str) -> None:
    with pytest.raises(RecipeError, match="--host: found"):
        open_socket(host, 0)


def test_a_port_in_use_is_refused_before_a_run_begins(tmp_path: Path) -> None:
    with open_socket(port=0) as taken:
        port = str(taken.getsockname()[1])
        arguments = ["demo", "--runs", str(tmp_path / "runs"), "--dashboard-port", port]
        result = CliRunner().invoke(cli.app, arguments)
    assert isinstance(result.exception, RecipeError)
    assert f"port {port}: Address already in use" in str(result.exception)
    assert not (tmp_path / "runs").exists()


def test_serve_says_the_address_and_ends_with_ctrl_c(run: RunDir) -> None:
    said: list[str] = []

    def say(text: str) -> None:
        said.append(text)
        if text.startswith("Ctrl-C"):
            os.kill(os.getpid(), signal.SIGINT)

    command.serve(run, "127.0.0.1", 0, say)
    assert said[0].startswith("one: http://127.0.0.1:")
    assert len(said) == 2
