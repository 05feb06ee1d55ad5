"""Two clusters whose control stores lie in one Redis: each finds its own again, and nothing of the other's."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tests.cluster import CATALOG, STATE, Cluster
from tests.fleet.test_life import model_file
from tests.hosts import Network, missing, network
from tests.stack import until

pytestmark = [
    pytest.mark.ray,
    pytest.mark.soak,
    pytest.mark.timeout(300),
    pytest.mark.skipif(bool(missing()), reason=missing() or "-"),
    pytest.mark.skipif(shutil.which("redis-server") is None, reason="there is no `redis-server`"),
]
PORT = 6390


@pytest.fixture
def net() -> Iterator[Network]:
    """With a Redis on the machine outside."""
    with network() as made:
        argv = ["redis-server", "--bind", made.gateway, "--port", str(PORT), "--protected-mode", "no", "--save", ""]
        redis = subprocess.Popen(argv, cwd=made.root, stdout=subprocess.DEVNULL)
        try:
            yield made
        finally:
            redis.terminate()
            redis.wait(10)


def test_two_clusters_of_one_redis_do_not_meet(net: Network, tmp_path: Path) -> None:
    clusters = []
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        made = Cluster(net, tmp_path / name)
        head = made.add()
        head.env |= {"STEELYARD_REDIS": f"{net.gateway}:{PORT}", "STEELYARD_HEAD_RUNS_ENGINES": "1"}
        head.start()
        until(head.up, f"a head is up:\n{head.logs.read_text()}", 60)
        folder = head.host.inside(CATALOG)
        folder.mkdir(parents=True)
        model_file(folder, name, {"a": {"max-num-seqs": 8}})
        head.cli("up")
        made.key = head.host.inside(STATE / "api-key").read_text().strip()
        clusters.append(made)
    one, two = clusters
    one.head.kill()
    one.head.start()
    until(one.head.up, "it is up again", 60)
    for made, model in ((one, "one"), (two, "two")):
        until(lambda m=made, n=model: answered(m, n), f"{model} is served", 60)  # type: ignore[misc]
        assert set(made.status()["applications"]) == {"gateway", f"{model}@a"}
        assert len(made.status()["nodes"]) == 1


def answered(made: Cluster, model: str) -> bool:
    try:
        return made.chat(made.head, model).status_code == 200
    except httpx.HTTPError:
        return False
