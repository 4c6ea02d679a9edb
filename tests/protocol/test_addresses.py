"""Which addresses and ports a learner may bind."""

from __future__ import annotations

import pytest

from protocol.addresses import bind_address, check_host, check_loopback, check_port_number, is_loopback


@pytest.mark.parametrize("host", ["auto", "127.0.0.1", "localhost", "::1", "127.8.8.8", "::ffff:127.0.0.1"])
def test_loopback_host_needs_no_keys(host: str) -> None:
    check_host(host)
    check_loopback(host)
    assert is_loopback(host)


@pytest.mark.parametrize("host", ["10.0.0.1", "192.168.1.7", "2001:db8::1", "::ffff:10.0.0.1", "8.8.8.8"])
def test_address_of_an_interface_is_taken_but_not_without_keys(host: str) -> None:
    check_host(host)
    with pytest.raises(ValueError, match=f"^wire.host: found '{host}', allowed without keys: a loopback address"):
        check_loopback(host)


@pytest.mark.parametrize(
    "host",
    ["0.0.0.0", "*", "", "::", "::ffff:0.0.0.0", "224.0.0.1", "127.0.0.1.example.org", "127.evil", "eth0", "AUTO"],
)  # fmt: skip
def test_what_actors_could_not_connect_to_is_refused(host: str) -> None:
    with pytest.raises(ValueError, match='allowed: "auto", or the numeric address of one interface'):
        check_host(host)


def test_auto_and_localhost_are_loopback() -> None:
    assert [bind_address(host) for host in ("auto", "localhost", "10.0.0.1")] == ["127.0.0.1", "127.0.0.1", "10.0.0.1"]


def test_port_leaves_room_for_the_two_behind_it() -> None:
    for port in (0, 1, 65533):
        check_port_number(port)
    with pytest.raises(ValueError, match="port: found 65534, allowed: 0, or at most 65533"):
        check_port_number(65534)
