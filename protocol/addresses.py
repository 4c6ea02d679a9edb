"""Which addresses a learner may bind. Pure functions, used by the recipe, the hub and the launcher's preflight."""

from __future__ import annotations

import ipaddress

AUTO = "auto"
LOOPBACK = "127.0.0.1"
PORTS = 3
"""Work, bulk and news: a port that is named in the recipe is the first of so many."""


def _ip(host: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    """The numeric address, None for anything else; an IPv4 address in IPv6's clothes as what it is."""
    try:
        found = ipaddress.ip_address(host)
    except ValueError:
        return None
    return getattr(found, "ipv4_mapped", None) or found


def check_host(host: str) -> None:
    """Raise ValueError unless `host` can be announced to actors: "auto", "localhost" or one interface's address.

    A wildcard cannot: actors connect to the address that the learner says it has bound."""
    ip = _ip(host)
    if host not in (AUTO, "localhost") and (ip is None or ip.is_unspecified or ip.is_multicast):
        raise ValueError(
            f'host: found {host!r}, allowed: "{AUTO}", or the numeric address of one interface of this machine, such as'
            f" {LOOPBACK} (actors connect to the address that is bound, so it must be one, and no wildcard)"
        )


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach an address."""
    ip = _ip(bind_address(host))
    return ip is not None and ip.is_loopback


def check_loopback(host: str) -> None:
    """Raise ValueError unless `host` is a loopback address: what sockets without keys may bind."""
    if not is_loopback(host):
        raise ValueError(
            f"wire.host: found {host!r}, allowed without keys: a loopback address such as {LOOPBACK}. With the run's"
            " keys (RUN/keys, made by the launcher) any address of this machine is allowed"
        )


def bind_address(host: str) -> str:
    """The numeric address behind what a recipe may say. "auto" is loopback, unless a launcher has filled it in."""
    return LOOPBACK if host in (AUTO, "localhost") else host


def check_port_number(port: int) -> None:
    """Raise ValueError for a port behind which there is no room for the other two."""
    if port > (highest := 65536 - PORTS):
        raise ValueError(
            f"port: found {port}, allowed: 0, or at most {highest}: bulk and news take the two ports after it"
        )
