"""Nothing leaves the machine: client, emulator and workers in a network with loopback alone."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

NETWORK_OF_ITS_OWN = """
import fcntl, json, os, re, socket, struct
from pathlib import Path

SIOCSIFFLAGS, IFF_UP, IFF_RUNNING = 0x8914, 0x1, 0x40
with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
    up = struct.pack("16sh14x", b"lo", IFF_UP | IFF_RUNNING)
    fcntl.ioctl(any_socket, SIOCSIFFLAGS, up)

def attempts():
    # The kernel counts packets and connections for which it has no route.
    names, values = re.findall("^Ip: (.*)$", Path("/proc/net/snmp").read_text(), re.M)
    v4 = dict(zip(names.split(), map(int, values.split())))["OutNoRoutes"]
    [v6] = re.findall(r"^Ip6OutNoRoutes\\s+(\\d+)$", Path("/proc/net/snmp6").read_text(), re.M)
    return v4 + int(v6)
"""

QUERY = """
from polars_cloud_emulator.testing import running_emulator

with running_emulator() as emulator:
    os.environ |= emulator.environment
    import polars as pl
    import polars_cloud as pc

    pc.authenticate(
        client_id=os.environ["POLARS_CLOUD_CLIENT_ID"],
        client_secret=os.environ["POLARS_CLOUD_CLIENT_SECRET"],
        interactive=False,
    )
    with pc.ComputeContext(workspace="playground", cpus=2, memory=4, cluster_size=2) as ctx:
        sales = pl.scan_parquet("s3://your-bucket/sales/")
        query = sales.group_by("region").len().remote(ctx).sink_parquet("s3://your-bucket/x/")
        rows = query.await_result().n_rows_total
        read = pl.read_parquet("s3://your-bucket/x/").height
print(json.dumps({"rows": rows, "read": read, "attempts": attempts()}))
"""

WAYS_OUT = """
seen = [attempts()]

def goes_out(call, *arguments):
    try:
        call(*arguments)
    except OSError:
        seen.append(attempts())

goes_out(socket.create_connection, ("192.0.2.1", 443), 5)
goes_out(socket.create_connection, ("2001:db8::1", 443), 5)
with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as datagrams:
    goes_out(datagrams.sendto, b"x", ("192.0.2.1", 9))
goes_out(socket.getaddrinfo, "api.example", 443)
print(json.dumps(seen))
"""


def run_without_a_way_out(code: str, tmp_path: Path) -> str:
    name_servers = tmp_path / "resolv.conf"
    name_servers.write_text("nameserver 192.0.2.1\n")
    unshare = ["unshare", "--net", "--mount"] + ["--map-root-user"] * (os.getuid() != 0)
    allowed = subprocess.run([*unshare, "true"], capture_output=True, text=True)
    if allowed.returncode != 0:
        pytest.skip(f"no network namespace on this machine: {allowed.stderr.strip()}")
    # A name server on loopback would hide the queries that it forwards.
    script = 'mount --bind "$0" /etc/resolv.conf && exec "$@"'
    python = [sys.executable, "-c", NETWORK_OF_ITS_OWN + code]
    ran = subprocess.run(
        [*unshare, "sh", "-c", script, name_servers, *python],
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert ran.returncode == 0, ran.stderr
    return ran.stdout


def test_no_connection_leaves_loopback(tmp_path: Path) -> None:
    ran = json.loads(run_without_a_way_out(QUERY, tmp_path))
    assert ran["rows"] == ran["read"] > 0
    assert ran["attempts"] == 0


def test_every_connection_attempt_would_be_counted(tmp_path: Path) -> None:
    seen = json.loads(run_without_a_way_out(WAYS_OUT, tmp_path))
    assert len(seen) == 5
    assert seen[0] == 0
    assert sorted(set(seen)) == seen
