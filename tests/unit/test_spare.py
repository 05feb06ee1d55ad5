"""The process that waits for the next replica, told apart from everything else below Ray's node process."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator

import pytest

from serving.fleet import spare

RAYLET = """
import ctypes, subprocess, sys
ctypes.CDLL(None).prctl(15, sys.argv[1].encode(), 0, 0, 0)  # PR_SET_NAME
pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
children = [subprocess.Popen([name], executable="/bin/cat", bufsize=0, **pipes) for name in sys.argv[2:]]
for c in children:
    c.stdin.write(b"!")
    c.stdout.read(1)  # it runs: in the middle of its exec it has no command line yet
print(*(c.pid for c in children), flush=True)
sys.stdin.read()
for c in children:
    c.kill()
"""

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


@pytest.fixture
def raylet(request: pytest.FixtureRequest) -> Iterator[tuple[int, list[int]]]:
    """A process of the first name, with children that call themselves as the others do; pids."""
    parent = subprocess.Popen(
        [sys.executable, "-c", RAYLET, *request.param], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    with parent:
        assert parent.stdout is not None
        yield parent.pid, [int(pid) for pid in parent.stdout.readline().split()]
        parent.communicate()


@pytest.mark.parametrize(
    "raylet", [["raylet", "ray::ServeReplica:m@a", "ray::IDLE", "/x/default_worker.py"]], indirect=True
)
def test_who_is_idle_or_starts_waits(raylet: tuple[int, list[int]]) -> None:
    pid, (_, idle, starts) = raylet
    assert sorted(spare.waiting(pid)) == sorted([idle, starts])


@pytest.mark.parametrize("raylet", [["raylet", "ray::ServeController", "ray::IDLE_SpillWorker"]], indirect=True)
def test_who_is_at_work_does_not_wait(raylet: tuple[int, list[int]]) -> None:
    assert spare.waiting(raylet[0]) == []


@pytest.mark.parametrize("raylet", [["bash", "ray::IDLE"]], indirect=True)
def test_below_anything_but_rays_node_process_none_is_kept(raylet: tuple[int, list[int]]) -> None:
    with pytest.raises(RuntimeError, match="bash, not Ray's raylet"):
        spare.waiting(raylet[0])
