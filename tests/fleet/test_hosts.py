"""The hosts that other tests run on are what they claim to be."""

from __future__ import annotations

import signal
import socket
import subprocess
from pathlib import Path

import pytest

from tests.hosts import hosts, missing
from tests.stack import until

pytestmark = pytest.mark.skipif(bool(missing()), reason=missing() or "-")

_LISTEN = "import socket,time; s=socket.create_server(('0.0.0.0', 8000)); time.sleep(600)"


def reachable(address: str) -> bool:
    try:
        socket.create_connection((address, 8000), 1).close()
    except OSError:
        return False
    return True


def test_hosts_are_apart_and_reach_each_other() -> None:
    with hosts(2) as (one, two):
        names = [h.name for h in (one, two)]
        server = one.start(["python3", "-c", _LISTEN])
        until(lambda: reachable(one.address), "a client outside reaches a host", 10)
        ask = f"import socket; socket.create_connection(('{one.address}', 8000), 5)"
        two.run("python3", "-c", ask)
        assert not reachable(two.address)

        one.run("sh", "-c", "mkdir /var/lib/steelyard; echo hello > /var/lib/steelyard/x; echo t > /tmp/t")
        assert one.inside("/var/lib/steelyard/x").read_text() == "hello\n"
        for place in (Path("/"), two.inside("/")):
            assert not (place / "var/lib/steelyard/x").exists() and not (place / "tmp/t").exists()
        assert two.run("cat", str(Path(__file__))).stdout == Path(__file__).read_text()
        assert one.run("hostname").stdout.strip() == one.name
        assert one.run("sh", "-c", "echo $$").stdout.strip().isdigit()
        assert server.pid in one.pids() and server.pid not in two.pids()

        one.unplug()
        assert not reachable(one.address)
        one.plug()
        until(lambda: reachable(one.address), "it is plugged in again", 10)
        server.signal(signal.SIGKILL)
        assert server.wait(10) == -signal.SIGKILL
        two.start(["python3", "-c", "import time; time.sleep(600)"])
        left = [h.init for h in (one, two)] + two.pids()
    assert not any(Path(f"/proc/{pid}").exists() for pid in left)
    links = subprocess.run(["ip", "link"], capture_output=True, text=True, check=True).stdout
    spaces = subprocess.run(["ip", "netns"], capture_output=True, text=True, check=True).stdout
    assert not any(name in spaces for name in names) and names[0].split("-")[0] not in links
