"""The page's server as an ASGI application: static files by name, JSON out of the readers, the wish in.

    POST /api/login {"token"} -> cookie              GET /api/run, /api/now
    GET /api/timeline?since&points&have              GET /api/lanes?since&cells&have
    GET /api/steps?since                             POST /api/scale {"actors"}
    GET /api/rollouts?step, /api/rollouts/STEP, /api/rollouts/STEP/INDEX

Who may call is decided before, in `access.py`. `server.py` runs it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp

from deploy.dashboard.access import Access, Door, cookie_name
from deploy.dashboard.overview import run_card
from deploy.dashboard.readers import Readers
from deploy.scale import MAX_ACTORS, LocalRun
from protocol.errors import RecipeError
from protocol.rundir import RunDir
from protocol.scaling import Wish

STATIC = Path(__file__).resolve().parent / "static"
TYPES = {
    ".html": "text/html; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".svg": "image/svg+xml",
}


class Rollouts(Protocol):
    """What `rollouts.RolloutReader` offers, to any number of threads; KeyError for what is not there."""

    def steps(self, asked: int | None = None) -> list[dict[str, Any]]: ...
    def groups(self, step: int) -> list[dict[str, Any]]: ...
    def group(self, step: int, index: int) -> dict[str, Any]: ...


class BadRequest(Exception):
    """What is wrong with a request; goes back as 400."""


def make_app(run: RunDir, access: Access, rollouts: Rollouts) -> ASGIApp:
    """The whole application, its door included."""
    api = Api(run, access, rollouts)
    routes = [
        Route("/api/login", api.login, methods=["POST"]),
        Route("/api/run", api.run_card),
        Route("/api/now", api.now),
        Route("/api/timeline", api.timeline),
        Route("/api/lanes", api.lanes),
        Route("/api/steps", api.steps),
        Route("/api/rollouts", api.rollout_steps),
        Route("/api/rollouts/{step:int}", api.rollout_groups),
        Route("/api/rollouts/{step:int}/{index:int}", api.rollout_group),
        Route("/api/scale", api.scale, methods=["POST"]),
        *static_routes(STATIC),
    ]
    app = Starlette(routes=routes, exception_handlers={BadRequest: _bad_request, KeyError: _not_there})
    return Door(app, access)


def static_routes(directory: Path) -> list[Route]:
    """A route for each file of the page, its bytes read once: no request names a path that is opened."""
    routes = []
    for path in sorted(directory.rglob("*")):
        if path.suffix in TYPES:
            name = path.relative_to(directory).as_posix()
            routes.append(Route("/" if name == "index.html" else f"/{name}", _file(path.read_bytes(), path.suffix)))
    return routes


def _file(content: bytes, suffix: str) -> Callable[[Request], Any]:
    async def send(_: Request) -> Response:
        return Response(content, media_type=TYPES[suffix])

    return send


class Api:
    """Each method answers one route. Those that read files run in threads; the readers have locks of their own."""

    def __init__(self, run: RunDir, access: Access, rollouts: Rollouts) -> None:
        self.run, self.access = run, access
        self.readers = Readers(run)
        self.rollouts = rollouts

    async def login(self, request: Request) -> Response:
        session = self.access.exchange((await _body(request)).get("token"))
        if session is None:
            return JSONResponse({"error": "a wrong token"}, 401)
        response = JSONResponse({"ok": True})
        port = (request.scope.get("server") or ("", 0))[1] or 0
        response.set_cookie(cookie_name(port), session, httponly=True, samesite="strict")
        return response

    def run_card(self, _: Request) -> Response:
        return JSONResponse(run_card(self.run))

    def now(self, _: Request) -> Response:
        return JSONResponse(self.readers.now())

    def timeline(self, request: Request) -> Response:
        since, points, have = _number(request, "since"), _number(request, "points", 300), _number(request, "have")
        return JSONResponse(self.readers.timeline(since, int(points), have))

    def lanes(self, request: Request) -> Response:
        since, cells, have = _number(request, "since"), _number(request, "cells", 300), _number(request, "have")
        return JSONResponse(self.readers.lanes(since, int(cells), have))

    def steps(self, request: Request) -> Response:
        return JSONResponse(self.readers.steps(int(_number(request, "since"))))

    def rollout_steps(self, request: Request) -> Response:
        return JSONResponse({"steps": self.rollouts.steps(int(_number(request, "step")) or None)})

    def rollout_groups(self, request: Request) -> Response:
        return JSONResponse({"groups": self.rollouts.groups(request.path_params["step"])})

    def rollout_group(self, request: Request) -> Response:
        return JSONResponse(self.rollouts.group(request.path_params["step"], request.path_params["index"]))

    async def scale(self, request: Request) -> Response:
        """Leave a wish, as `tandem scale` does; only where a launcher reads it."""
        actors = (await _body(request)).get("actors")
        if not isinstance(actors, int) or isinstance(actors, bool) or not 0 <= actors <= MAX_ACTORS:
            raise BadRequest(f"actors: expected a whole number from 0 to {MAX_ACTORS}, found {actors!r:.40}")
        if not self.run.is_held("launcher"):
            return JSONResponse({"error": "the run is not running: nobody would start its actors"}, 409)
        try:
            before = LocalRun(self.run).leave_wish(Wish(actors, "the dashboard"))
        except RecipeError as error:
            return JSONResponse({"error": str(error)}, 409)
        return JSONResponse({"before": before, "actors": actors})


async def _body(request: Request) -> dict[str, Any]:
    try:
        found = json.loads(await request.body())
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise BadRequest("expected a JSON object")
    return found


def _number(request: Request, name: str, default: float = 0.0) -> float:
    text = request.query_params.get(name)
    try:
        value = default if text is None else float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise BadRequest(f"{name}: expected a number, found {(text or '')[:40]!r}")
    return value


async def _bad_request(_: Request, error: Exception) -> Response:
    return JSONResponse({"error": str(error)}, 400)


async def _not_there(_: Request, error: Exception) -> Response:
    return JSONResponse({"error": f"not there: {error}"}, 404)
