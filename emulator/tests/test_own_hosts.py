"""Check of the ``Host`` header."""

import pytest

from polars_cloud_emulator.protocol.own_hosts import is_own_host


@pytest.mark.parametrize(
    "host",
    [
        "127.0.0.1",
        "127.0.0.1:7410",
        "localhost:1",
        "LocalHost:7410",
        "localhost.:7410",
        "[::1]:7410",
        "emulator:7410",
        "EMULATOR",
        "172.18.0.3:80",
    ],
)
def test_this_machine_is_named_at_any_port(host: str) -> None:
    assert is_own_host(host, ["Emulator", "172.18.0.3"])


@pytest.mark.parametrize(
    "host",
    [
        "",
        ":7410",
        "evil.example",
        "evil.example:7410",
        "127.0.0.1.evil.example",
        "localhost.evil.example",
        "evil-emulator",
        "emulator.evil.example",
        "localhost..",
        "192.0.2.1:7410",
        "[2001:db8::1]:7410",
        "::1",
        "localhost@evil.example",
        "evil.example@localhost",
        "localhost:",
        "localhost:port",
        "localhost:7410:7410",
        "localhost/",
        "localhost#evil.example",
        "localhost evil.example",
        "localhost,evil.example",
        "localhost\n",
        "lOcalhost\u0131",
        "127.0.0.\u0661",
    ],
)
def test_another_machine_or_no_machine_is_not_this_one(host: str) -> None:
    assert not is_own_host(host, ["emulator", "172.18.0.3"])
