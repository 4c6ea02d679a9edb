"""The page's server: what its calls answer, and who gets no answer."""

from __future__ import annotations

import json
import re
import tomllib
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from deploy.dashboard import access as access_module
from deploy.dashboard.access import Access, cookie_name
from deploy.dashboard.app import STATIC, make_app
from deploy.dashboard.history import History
from deploy.dashboard.overview import present
from deploy.dashboard.rollouts import RolloutReader
from deploy.dashboard.steps import MOST_POINTS, StepsReader
from deploy.scale import MAX_ACTORS
from protocol.keys import make_keys
from protocol.rundir import RunDir, read_json, write_json
from protocol.scaling import Wish, read_wish, write_wish
from tests.dashboard_harness import HOSTILE, MadeRun

HERE = "http://127.0.0.1:7704"
OWN = {"Origin": HERE, "X-Tandem": "1"}
READS = (
    "/api/run", "/api/now", "/api/timeline", "/api/lanes", "/api/steps", "/api/rollouts", "/api/rollouts/3",
    "/api/rollouts/3/0",
)  # fmt: skip


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> MadeRun:
    """Half a minute of a run with two actors and keys."""
    found = MadeRun(tmp_path_factory.mktemp("runs") / "made", actors=2, began=1_700_000_000.0)
    make_keys(found.run.keys)
    found.hostile = True
    found.advance(90)
    found.close()
    return found


@pytest.fixture
def run(made: MadeRun) -> RunDir:
    write_wish(made.run, Wish(2, "the recipe"))
    return made.run


@pytest.fixture
def access() -> Access:
    return Access("127.0.0.1")


@pytest.fixture
def stranger(run: RunDir, access: Access) -> TestClient:
    """Without a cookie."""
    return TestClient(make_app(run, access, RolloutReader(run)), base_url=HERE)


@pytest.fixture
def client(stranger: TestClient, access: Access) -> TestClient:
    """With the cookie."""
    assert stranger.post("/api/login", json={"token": access.token}, headers=OWN).status_code == 200
    return stranger


def ask(client: TestClient, path: str, **query: Any) -> Any:
    response = client.get(path, params=query)
    assert response.status_code == 200, response.text
    return response.json()


# --- what it answers --------------------------------------------------------------------------------------------------


def test_run_is_described_by_its_recipe(client: TestClient) -> None:
    found = ask(client, "/api/run")
    assert {key: found[key] for key in ("name", "method", "model", "steps", "draws")} == {
        "name": "made", "method": "grpo", "model": "HuggingFaceTB/SmolLM2-360M-Instruct", "steps": 250, "draws": True,
    }  # fmt: skip
    assert found["recipe"]["rollout.max_lag"] == 1


def test_now_has_status_actors_advice_and_events(client: TestClient, made: MadeRun) -> None:
    found = ask(client, "/api/now")
    assert found["status"]["step"] == made.step
    assert [(row["name"], row["version"]) for row in found["actors"]] == [
        ("actor-0", made.version),
        ("actor-1", made.version),
    ]
    assert sum(row["tokens_per_s"] for row in found["actors"]) > 500
    assert found["advice"]["text"]
    assert (found["alive"], found["scalable"], found["wish"]) == (False, False, {"actors": 2, "by": "the recipe"})


@pytest.mark.parametrize(
    ("phase", "ended", "end"),
    [
        ("training", False, "interrupted: its learner ended without a word"),
        ("finished", True, "finished"),
        ("stopped", True, "stopped; it can be resumed"),
        ("stopped by the guard", True, "stopped by the guard"),
        ("failed", True, "failed"),
    ],
)
def test_now_says_how_a_run_ended(tmp_path: Path, phase: str, ended: bool, end: str) -> None:
    run = RunDir(tmp_path)
    write_json(run.status, {"phase": phase, "phase_since": 1.0, "step": 3})
    status = present(run, History())["status"]
    assert (status["phase"].split(" (")[0], status["ended"], status["end"]) == (phase, ended, end)


def test_now_says_what_the_launcher_waits_for(client: TestClient, run: RunDir) -> None:
    run.actors.write_text(
        '[{"name": "actor-0", "state": "running"}, {"name": "actor-2", "state": "pending", "why": "no room"}]'
    )
    with run.lock("launcher"):
        found = ask(client, "/api/now")
    assert found["alive"]
    assert found["scalable"]
    assert found["actors"][-1] == {"name": "actor-2", "state": "pending", "node": "", "why": "no room"}


def test_timeline_and_lanes_are_of_the_same_time(client: TestClient) -> None:
    series, lanes = ask(client, "/api/timeline", points=50), ask(client, "/api/lanes", cells=50)
    assert (series["first"], series["last"]) == (lanes["since"], lanes["until"])
    assert len(series["t"]) == 50
    assert [lane["name"] for lane in lanes["lanes"]] == ["learner", "actor-0", "actor-1"]
    assert ask(client, "/api/timeline", since=-10)["t"][0] >= series["last"] - 11
    assert ask(client, "/api/timeline", have=series["last"]) == {"unchanged": True}
    assert ask(client, "/api/lanes", have=lanes["until"]) == {"unchanged": True}


def test_steps_come_as_columns_and_only_the_new_ones(client: TestClient, made: MadeRun) -> None:
    found = ask(client, "/api/steps")
    assert found["step"] == list(range(1, made.step + 1))
    assert len(found["columns"]["reward_mean"]) == made.step
    before = found["evaluations"][0]
    assert before.pop("reward") == pytest.approx(0.09, abs=0.02)
    assert before == {"ci95": 0.045, "problems": 64, "name": "before", "step": 0}
    assert ask(client, "/api/steps", since=made.step - 2)["step"] == [made.step - 1, made.step]


def test_steps_that_were_rolled_back_show_as_another_generation(tmp_path: Path) -> None:
    run, door = RunDir(tmp_path).create(), Access("127.0.0.1")
    client = TestClient(make_app(run, door, RolloutReader(run)), base_url=HERE)
    client.post("/api/login", json={"token": door.token}, headers=OWN)
    assert ask(client, "/api/steps") == {"generation": 0, "step": [], "columns": {}, "evaluations": []}
    run.metrics.write_text('{"step": 1, "loss": 1.0}\n{"step": 2, "loss": null}\n{"step": 3')
    assert ask(client, "/api/steps")["columns"] == {"loss": [1.0, None]}
    run.metrics.rename(tmp_path / "old")
    run.metrics.write_text('{"step": 1, "loss": 1.0}\n')
    found = ask(client, "/api/steps")
    assert (found["generation"], found["step"]) == (1, [1])


def test_first_look_at_a_long_run_is_short_and_exact_at_both_ends(tmp_path: Path) -> None:
    run, count = RunDir(tmp_path).create(), 20 * MOST_POINTS + 7
    rows = [{"step": step, "loss": float(step)} | ({"lr": 0.5} if step == 30 else {}) for step in range(1, count + 1)]
    run.metrics.write_text("".join(json.dumps(row) + "\n" for row in rows))
    reader = StepsReader(run)
    found = reader.columns(0)
    steps, losses = found["step"], found["columns"]["loss"]
    assert MOST_POINTS / 2 < len(steps) <= MOST_POINTS + 2
    assert (steps[0], losses[0], steps[-1], losses[-1]) == (1, 1.0, count, count)
    assert losses[1:-1] == [(low + 1 + high) / 2 for low, high in pairwise(steps[:-1])]
    assert [value for value in found["columns"]["lr"] if value is not None] == [0.5], "a mean of those that have one"
    assert found["columns"].keys() == {"loss", "lr"}
    with open(run.metrics, "a") as file:
        file.write(json.dumps({"step": count + 1, "loss": 0.25}) + "\n")
    assert reader.columns(count) == {"generation": 0, "step": [count + 1], "columns": {"loss": [0.25]}}


def test_rollouts_are_those_of_the_reader(client: TestClient, run: RunDir) -> None:
    reader = RolloutReader(run)
    assert ask(client, "/api/rollouts") == {"steps": reader.steps()}
    assert ask(client, "/api/rollouts", step=2) == {"steps": reader.steps(2)}
    assert ask(client, "/api/rollouts/3") == {"groups": reader.groups(3)}
    group = ask(client, "/api/rollouts/3/0")
    assert group == json.loads(json.dumps(reader.group(3, 0)))
    assert HOSTILE in group["completions"][0]["tokens"]


def test_what_is_not_there_is_404_and_what_is_no_number_400(client: TestClient) -> None:
    assert client.get("/api/rollouts/999").status_code == 404
    assert client.get("/api/rollouts/3/99").status_code == 404
    assert client.get("/api/rollouts/x").status_code == 404
    assert client.get("/api/timeline", params={"since": "nan"}).json() == {
        "error": "since: expected a number, found 'nan'"
    }
    assert client.get("/api/steps", params={"since": "x" * 500}).status_code == 400


def test_a_run_without_any_file_is_shown_as_such(tmp_path: Path) -> None:
    run, door = RunDir(tmp_path), Access("127.0.0.1")
    client = TestClient(make_app(run, door, RolloutReader(run)), base_url=HERE)
    client.post("/api/login", json={"token": door.token}, headers=OWN)
    now = ask(client, "/api/now")
    assert (now["alive"], now["sampled"], now["actors"], now["events"], now["summary"]) == (False, None, [], [], None)
    assert ask(client, "/api/lanes")["lanes"] == []
    assert ask(client, "/api/rollouts") == {"steps": []}


# --- scaling ----------------------------------------------------------------------------------------------------------


def test_scale_leaves_a_wish_for_the_launcher(client: TestClient, run: RunDir) -> None:
    with run.lock("launcher"):
        response = client.post("/api/scale", json={"actors": 5}, headers=OWN)
    assert response.json() == {"before": 2, "actors": 5}
    assert read_wish(run) == Wish(5, "the dashboard")


@pytest.mark.parametrize("actors", [-1, MAX_ACTORS + 1, 2.0, True, "3", None])
def test_scale_refuses_what_is_no_number_of_actors(client: TestClient, run: RunDir, actors: Any) -> None:
    with run.lock("launcher"):
        response = client.post("/api/scale", json={"actors": actors}, headers=OWN)
    assert response.status_code == 400
    assert read_wish(run) == Wish(2, "the recipe")


def test_scale_refuses_where_nobody_would_start_actors(client: TestClient, run: RunDir) -> None:
    assert client.post("/api/scale", json={"actors": 3}, headers=OWN).status_code == 409
    run.scale.unlink()
    with run.lock("launcher"):
        assert client.post("/api/scale", json={"actors": 3}, headers=OWN).status_code == 409
    assert read_wish(run) is None


# --- who gets no answer -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", READS)
def test_every_call_needs_the_cookie(stranger: TestClient, access: Access, path: str) -> None:
    assert stranger.get(path).status_code == 401
    assert stranger.get(path, params={"token": access.token}).status_code == 401
    for value in ("", access.token, "x" * 43):
        assert stranger.get(path, headers={"Cookie": f"{cookie_name(7704)}={value}"}).status_code == 401


def test_scale_needs_the_cookie(stranger: TestClient, run: RunDir) -> None:
    with run.lock("launcher"):
        assert stranger.post("/api/scale", json={"actors": 9}, headers=OWN).status_code == 401
    assert read_wish(run) == Wish(2, "the recipe")


@pytest.mark.parametrize("token", ["", "wrong", None, 7, "é", ["x"]])
def test_a_wrong_token_is_no_login(stranger: TestClient, token: Any) -> None:
    response = stranger.post("/api/login", json={"token": token}, headers=OWN)
    assert response.status_code == 401
    assert "set-cookie" not in response.headers


def test_the_cookie_is_out_of_reach_of_scripts_and_of_other_sites(stranger: TestClient, access: Access) -> None:
    cookie = stranger.post("/api/login", json={"token": access.token}, headers=OWN).headers["set-cookie"]
    assert cookie.startswith("tandem-7704=")
    assert {"HttpOnly", "SameSite=strict", "Path=/"} <= set(cookie.split("; "))
    assert access.token not in cookie


def test_secrets_are_compared_in_constant_time(
    client: TestClient, access: Access, monkeypatch: pytest.MonkeyPatch
) -> None:
    compared = []

    def spy(a: bytes, b: bytes) -> bool:
        compared.append((a, b))
        return False

    monkeypatch.setattr(access_module.hmac, "compare_digest", spy)
    assert client.get("/api/now").status_code == 401
    assert client.post("/api/login", json={"token": access.token}, headers=OWN).status_code == 401
    assert len(compared) == 2
    assert compared[1] == (access.token.encode(), access.token.encode())


def test_each_server_has_secrets_of_its_own() -> None:
    one, other = Access("127.0.0.1"), Access("127.0.0.1")
    assert one.token != other.token
    assert one.exchange(one.token) not in (None, one.token)
    assert one.exchange(other.token) is None
    assert len(one.token) >= 43


@pytest.mark.parametrize(
    "headers",
    [
        {"Origin": HERE},
        {"X-Tandem": "1"},
        {"X-Tandem": "1", "Origin": "null"},
        {"X-Tandem": "1", "Origin": "http://127.0.0.1:7705"},
        {"X-Tandem": "1", "Origin": "https://127.0.0.1:7704"},
        {"X-Tandem": "1", "Origin": "http://evil.example"},
        OWN | {"Sec-Fetch-Site": "cross-site"},
        OWN | {"Sec-Fetch-Site": "same-site"},
    ],
    ids=str,
)
def test_a_post_from_elsewhere_is_refused(client: TestClient, run: RunDir, headers: dict[str, str]) -> None:
    with run.lock("launcher"):
        assert client.post("/api/scale", json={"actors": 9}, headers=headers).status_code == 403
    assert read_wish(run) == Wish(2, "the recipe")


@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:7704", "127.0.0.1.evil.example", "localhost.evil.example", ""]
)
def test_another_name_for_this_server_is_refused_everywhere(client: TestClient, host: str) -> None:
    for path in ("/", "/app.js", *READS):
        assert client.get(path, headers={"Host": host}).status_code == 403


@pytest.mark.parametrize("host", ["127.0.0.1:7704", "localhost:9000", "[::1]:7704", "localhost"])
def test_its_own_names_are_not(client: TestClient, host: str) -> None:
    assert client.get("/api/now", headers={"Host": host}).status_code == 200


def test_calls_of_other_sites_are_refused(client: TestClient) -> None:
    assert client.get("/api/now", headers={"Sec-Fetch-Site": "cross-site"}).status_code == 403
    assert client.get("/api/now", headers={"Sec-Fetch-Site": "same-origin"}).status_code == 200


@pytest.mark.parametrize("path", ["/", "/app.js", "/api/now", "/api/rollouts/999", "/nowhere"])
def test_every_answer_is_guarded(client: TestClient, path: str) -> None:
    headers = client.get(path, headers={"Origin": "http://evil.example"}).headers
    policy = dict(part.split(" ", 1) for part in headers["content-security-policy"].split("; "))
    assert policy["default-src"] == "'none'"
    assert policy["script-src"] == policy["style-src"] == policy["connect-src"] == "'self'"
    assert policy["frame-ancestors"] == policy["base-uri"] == policy["form-action"] == "'none'"
    assert headers["x-content-type-options"] == "nosniff"
    assert headers["referrer-policy"] == "no-referrer"
    assert headers["cache-control"] == "no-store"
    assert not [name for name in headers if name.startswith("access-control")]


def test_refusals_are_guarded_too(stranger: TestClient) -> None:
    for response in (stranger.get("/api/now"), stranger.get("/", headers={"Host": "x"}), stranger.put("/api/scale")):
        assert response.status_code in (401, 403, 405)
        assert "default-src 'none'" in response.headers["content-security-policy"]


@pytest.mark.parametrize(
    "path",
    [
        "/keys/learner.json", "/../keys/learner.json", "/%2e%2e/keys/learner.json", "/vendor/../../app.py",
        "//etc/passwd", "/vendor/..%2f..%2f..%2fapp.py", "/static/app.js", "/app.js/../../access.py", "/recipe.toml",
        "/journal/groups.journal", "/api/../keys/actor.json", "/vendor", "/vendor/",
    ],
)  # fmt: skip
def test_no_path_leads_to_a_file_that_is_not_the_pages(client: TestClient, path: str) -> None:
    assert client.get(path, follow_redirects=False).status_code == 404


def test_no_answer_holds_a_secret_of_the_run(client: TestClient, run: RunDir, access: Access) -> None:
    answers = [client.get(path).text for path in READS]
    secrets = [read_json(path)["secret"] for path in (run.keys / "learner.json", run.actor_keys)]
    assert all(secrets)
    assert not [secret for secret in (*secrets, access.token) for answer in answers if secret in answer]


def test_long_bodies_are_refused(stranger: TestClient) -> None:
    assert stranger.post("/api/login", content=b'"' + b"x" * 5000 + b'"', headers=OWN).status_code == 413
    assert stranger.post("/api/login", content=iter([b"{}"]), headers=OWN).status_code == 413, "of unknown length"
    assert stranger.post("/api/login", content=b"[" * 4000, headers=OWN).status_code == 400


def test_the_page_asks_for_nothing_from_elsewhere_and_makes_no_markup() -> None:
    for path in STATIC.rglob("*"):
        if path.suffix in (".html", ".js", ".css") and "vendor" not in path.parts:
            text = path.read_text("utf-8")
            assert not re.search(r"https?://|[\"'(]//\w", text), path
            assert not re.search(
                r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(|new Function", text
            ), path
            assert not re.search(r"<script>|<style| style=\"| on\w+=\"", text), path


def test_the_vendored_library_has_its_licence_and_version() -> None:
    vendor = STATIC / "vendor"
    assert "MIT License" in (vendor / "uPlot.LICENSE").read_text()
    version = re.search(r"uPlot (\d+\.\d+\.\d+)", (vendor / "README.md").read_text())
    assert version is not None
    assert f"(v{version[1]})" in (vendor / "uPlot.esm.js").read_text()[:400]


def test_a_wheel_holds_every_file_of_the_page() -> None:
    globs = tomllib.loads((STATIC.parents[2] / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"][
        "deploy"
    ]
    packed = {path for glob in globs for path in STATIC.parents[1].glob(glob) if path.is_file()}
    assert {path for path in STATIC.rglob("*") if path.is_file()} <= packed
