"""Who may see a run through its page, and change its number of actors: checks before any of the app's own code.

A token is drawn at each start of a server. It stands behind "#" in the address that is printed, which no browser sends;
the page exchanges it for a cookie that no script can read. Every call of the API needs the cookie, every POST also a
header that no other site can send and the page's own origin; every request must name a host that no DNS entry of a
stranger could be (rebinding). Knows no file and no run; `app.py` puts it around the routes.
"""

from __future__ import annotations

import hmac
import ipaddress
import secrets
from collections.abc import Mapping

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

HEADER = "x-tandem"
"""Any POST must have it, with any value: a form of another site cannot, a script of another site is asked first."""
LARGEST_BODY = 4096
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self';"
    " base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
RESPONSE_HEADERS = {
    "content-security-policy": POLICY,
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-resource-policy": "same-origin",
    "cross-origin-opener-policy": "same-origin",
    "cache-control": "no-store",
}


class Access:
    """The secrets of one server, and what it lets in."""

    def __init__(self, host: str) -> None:
        """`host`: what the server binds; its name is allowed beside localhost and numeric addresses."""
        self.host = host
        self.token = secrets.token_urlsafe(32)
        self._session = secrets.token_urlsafe(32)

    def exchange(self, token: object) -> str | None:
        """The cookie's value for the right token, None for any other."""
        given = token.encode() if isinstance(token, str) else b""
        return self._session if hmac.compare_digest(given, self.token.encode()) else None

    def refusal(self, method: str, path: str, headers: Mapping[str, str], port: int) -> tuple[int, str] | None:
        """(status, why) for a request that is turned away, None for one that may go on."""
        host = headers.get("host", "")
        if not self._is_own(host):
            return 403, f"this server is not called {host[:80]!r}"
        if headers.get("sec-fetch-site", "none") not in ("same-origin", "none"):
            return 403, "asked for by another site"
        if method not in ("GET", "HEAD", "POST"):
            return 405, "GET and POST only"
        if method == "POST":
            if HEADER not in headers or headers.get("origin") != f"http://{host}":
                return 403, "a POST that is not from this page"
            if not headers.get("content-length", "").isdecimal() or int(headers["content-length"]) > LARGEST_BODY:
                return 413, f"expected a body of at most {LARGEST_BODY} bytes, and its length"
        if path.startswith("/api/") and path != "/api/login" and not self._has_cookie(headers.get("cookie", ""), port):
            return 401, "the token is missing"
        return None

    def _is_own(self, host: str) -> bool:
        name = host.rsplit(":", 1)[0] if not host.endswith("]") else host
        if name in ("localhost", self.host):
            return True
        try:
            ipaddress.ip_address(name.removeprefix("[").removesuffix("]"))
        except ValueError:
            return False
        return True  # a number is looked up nowhere

    def _has_cookie(self, header: str, port: int) -> bool:
        parts = (part.strip().partition("=") for part in header.split(";"))
        given = [value for name, _, value in parts if name == cookie_name(port)]  # whatever other servers have set
        return any(hmac.compare_digest(value.encode(), self._session.encode()) for value in given)


def cookie_name(port: int) -> str:
    """Servers on several ports of a host share its cookies."""
    return f"tandem-{port}"


class Door:
    """ASGI: turns away what `Access` refuses, and puts the security headers on whatever goes out."""

    def __init__(self, app: ASGIApp, access: Access) -> None:
        self.app, self.access = app, access

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return  # no websockets, no lifespan: nothing answers

        async def send_guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(RESPONSE_HEADERS)
            await send(message)

        port = (scope.get("server") or ("", 0))[1] or 0
        refused = self.access.refusal(scope["method"], scope["path"], Headers(scope=scope), port)
        if refused is not None:
            status, why = refused
            await JSONResponse({"error": why}, status)(scope, receive, send_guarded)
            return
        await self.app(scope, receive, send_guarded)
