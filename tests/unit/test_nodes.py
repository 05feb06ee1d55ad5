"""What several nodes add, as far as it needs no node: settings, keys on their way, counts, weights that lie elsewhere."""

from __future__ import annotations

import asyncio
import json
import os
import socket
import sys
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from serving.catalog import store, weights
from serving.cli import node
from serving.errors import InvalidKey, OperatorError
from serving.fleet import directory, keeper, manifest
from serving.fleet.directory import KeysFile, Table
from serving.gateway import keys
from serving.gateway.keys import KeyRing
from serving.settings import Settings, load_settings, worker_environment

NOW = 1_800_000_000.0


@pytest.fixture(autouse=True)
def bare(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in [n for n in os.environ if n.startswith("STEELYARD_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("STEELYARD_STATE_DIR", str(tmp_path / "state"))


def settings(**fields: Any) -> Settings:
    return load_settings(**fields)


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({}, "STEELYARD_NODE_ADDRESS is not set"),
        ({"node_address": "gpu-7"}, "is no IP address"),
        ({"node_address": "127.0.0.1"}, "cannot be reached by other nodes"),
        ({"node_address": "0.0.0.0"}, "cannot be reached by other nodes"),
        ({"node_address": "192.0.2.1"}, "is no address of this machine"),
    ],
)
def test_an_address_that_cannot_be_this_nodes_is_refused(fields: dict[str, str], told: str) -> None:
    for run in (node.run_head, node.run_worker):
        with pytest.raises(OperatorError, match=told):
            run(settings(**fields), lambda line: None)


@pytest.mark.parametrize("head", [None, "10.0.0.1", "10.0.0.1:", ":6379", "10.0.0.1:x", "10.0.0.1:70000"])
def test_a_head_that_is_no_address_and_port_is_refused(head: str | None) -> None:
    with pytest.raises(OperatorError, match="is not HOST:PORT"):
        node._head_of(settings(head=head))


def test_another_release_than_the_heads_is_named() -> None:
    node._same_release(("2.60.0", "3.11.7"), ("2.60.0", "3.11.7"))
    with pytest.raises(
        OperatorError, match=r"Ray 2\.60\.0 on Python 3\.11\.9, this node Ray 2\.61\.0 on Python 3\.11\.9"
    ):
        node._same_release(("2.61.0", "3.11.9"), ("2.60.0", "3.11.9"))


class Redis:
    """As much of one as the check asks for: a password, and PING."""

    def __init__(self, password: str) -> None:
        self._password = password
        self._server = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._server.getsockname()[1]}"
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        while True:
            try:
                client, _ = self._server.accept()
            except OSError:
                return
            with client, client.makefile("rwb") as wire:
                entered = not self._password
                while line := wire.readline():
                    words = [wire.read(int(wire.readline()[1:]) + 2)[:-2].decode() for _ in range(int(line[1:]))]
                    if words[0] == "AUTH":
                        entered = words[-1] == self._password
                        wire.write(b"+OK\r\n" if entered else b"-WRONGPASS invalid password\r\n")
                    else:
                        wire.write(b"+PONG\r\n" if entered else b"-NOAUTH Authentication required.\r\n")
                    wire.flush()

    def close(self) -> None:
        self._server.close()


def test_clusters_of_one_redis_are_kept_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """By their secret, which a head that moves takes along; a name of one's own wins. On its own disk it needs none."""

    def named(secret: str, **fields: Any) -> str | None:
        monkeypatch.setenv("STEELYARD_CLUSTER_SECRET", secret)
        found = settings(node_role="head", **fields)
        found.state_dir.mkdir(exist_ok=True)
        return node._ray_settings(found).get("RAY_external_storage_namespace")

    redis = {"redis": "10.0.0.9:6379"}
    one, again, two = named("a", **redis), named("a", **redis), named("b", **redis)
    assert one and one == again != two and one != "a"
    assert named("a", cluster_name="rack-7", **redis) == "rack-7"
    assert named("a") is None
    for wrong in ("rack 7", "", "-", "a@b"):
        with pytest.raises(OperatorError, match="STEELYARD_CLUSTER_NAME"):
            settings(cluster_name=wrong)


def test_a_redis_that_refuses_is_named_before_ray_starts() -> None:
    """Ray aborts the process otherwise."""
    redis = Redis("right")
    try:
        node._check_redis(redis.address, "", "right")
        node._check_redis(f"redis://{redis.address}", "steelyard", "right")
        for password in ("wrong", ""):
            with pytest.raises(OperatorError, match=r"refuses: (WRONGPASS|NOAUTH)") as told:
                node._check_redis(redis.address, "", password)
            assert "wrong" not in str(told.value)
    finally:
        redis.close()
    with pytest.raises(OperatorError, match="no Redis at"):
        node._check_redis("127.0.0.1:1", "", "")
    with pytest.raises(OperatorError, match="is not HOST:PORT"):
        node._check_redis("redis.example", "", "")


def test_labels_are_pairs() -> None:
    assert node._labels("region=eu, rack=7,") == {"region": "eu", "rack": "7"}
    for wrong in ("region", "=eu", "region=", "a b=c", "ray.io/node-id=x"):
        with pytest.raises(OperatorError, match="STEELYARD_NODE_LABELS"):
            node._labels(wrong)


def test_a_nodes_gateways_listen_on_its_address_unless_told_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(node.socket.socket, "bind", lambda *_: None)
    assert node._as_node(settings(node_address="10.0.0.7"), "head").host == "10.0.0.7"
    told = node._as_node(settings(node_address="10.0.0.7", host="0.0.0.0"), "worker")
    assert told.host == "0.0.0.0"
    assert worker_environment(told)["STEELYARD_NODE_ROLE"] == "worker"


def test_a_worker_reads_a_copy_of_the_heads_keys() -> None:
    assert settings().keys_file.name == "keys.json"
    assert settings(node_role="head").keys_file.name == "keys.json"
    assert settings(node_role="worker").keys_file.name == "keys-of-head.json"


def test_gateways_are_counted_per_node_and_never_none() -> None:
    assert [keeper.wanted(n, 2) for n in (0, 1, 3)] == [2, 2, 6]


@pytest.mark.parametrize(
    ("state", "node_id", "waits"),
    [
        ("RUNNING", "stays", False),
        ("RUNNING", "dead", True),
        ("UPDATING", "dead", True),
        ("RECOVERING", None, True),
        ("PENDING_MIGRATION", "leaving", False),
        ("STOPPING", "dead", False),
        ("STARTING", None, False),
    ],
)
def test_gateways_become_fewer_once_serve_knows_whose_node_is_gone(
    state: str, node_id: str | None, waits: bool
) -> None:
    found = [{"replica_id": "x", "state": state, "node_id": node_id}]
    assert bool(keeper.strays(found, {"stays"})) is waits


def test_a_gpu_exporter_that_did_not_start_is_started_again_but_not_in_a_loop() -> None:
    started: dict[str, float] = {}
    due = lambda running, now, nodes=("a", "b"): keeper.due_exporters(nodes, running, started, now)  # noqa: E731
    assert sorted(due([], 0.0)) == ["a", "b"]
    assert due(["a"], 2.0) == due(["a"], 28.0) == []
    assert due(["a"], 30.0) == ["b"] and due(["a"], 32.0) == []
    assert due([], 40.0) == ["a"], "one that ran and is gone"
    assert due(["a"], 41.0, ("a",)) == [] and due(["a"], 42.0) == ["b"], (
        "a node that left and came back waits for nothing"
    )


def test_keys_of_the_head_open_another_node_until_they_are_revoked(tmp_path: Path) -> None:
    head, copy = tmp_path / "keys.json", tmp_path / "copy.json"
    key, token = keys.create_key(head, name="a", scopes=["infer:*"], now=NOW)
    assert keys.adopt(copy, b'{"keys": []}')
    ring = KeyRing(copy)
    with pytest.raises(InvalidKey):
        ring.check(token, NOW)
    assert keys.adopt(copy, head.read_bytes())
    assert not keys.adopt(copy, head.read_bytes()), "nothing is written when nothing changed"
    assert copy.stat().st_mode & 0o777 == 0o600
    assert ring.reload_if_changed() is None and ring.check(token, NOW).id == key.id
    keys.revoke_key(head, key.id, NOW)
    keys.adopt(copy, head.read_bytes())
    with pytest.raises(InvalidKey):
        KeyRing(copy).check(token, NOW)


@pytest.mark.parametrize("content", [b"", b"{", b'{"keys": 3}', b'{"keys": [{}]}', b"\xff"])
def test_what_is_no_keys_file_is_not_adopted(tmp_path: Path, content: bytes) -> None:
    copy = tmp_path / "copy.json"
    keys.adopt(copy, b'{"keys": []}')
    with pytest.raises(OperatorError, match="the head's keys file is damaged"):
        keys.adopt(copy, content)
    assert copy.read_bytes() == b'{"keys": []}'
    assert os.listdir(tmp_path) == ["copy.json"]


def test_the_directory_tells_of_another_keys_file_and_keeps_the_last_when_it_is_away(tmp_path: Path) -> None:
    path = tmp_path / "keys.json"
    file = KeysFile(path)
    assert not file.changed() and file.digest == ""
    keys.create_key(path, name="a", scopes=["infer:*"], now=NOW)
    assert file.changed() and not file.changed()
    content, digest = file.content, file.digest
    assert "keys" in json.loads(content)
    path.touch()
    assert not file.changed(), "another time, the same content"
    path.unlink()
    assert not file.changed() and (file.content, file.digest) == (content, digest)


def test_other_keys_are_news_for_pollers() -> None:
    table = Table(0)
    before = table.snapshot(0)
    assert table.set_keys("digest") and not table.set_keys("digest")
    table.publish()
    after = table.snapshot(0)
    assert after.number == before.number + 1 and after.keys == "digest"


async def test_a_control_store_that_is_away_blocks_one_thread_and_no_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    back, lookups = threading.Event(), []

    def handle() -> Any:
        lookups.append(1)
        back.wait(10)
        raise ConnectionError

    monkeypatch.setattr(directory, "handle", handle)
    client = directory.Client()
    for _ in range(3):
        with pytest.raises(TimeoutError):
            await client.call("snapshot", timeout_s=0.05)
    assert len(lookups) == 1
    back.set()
    with pytest.raises(ConnectionError):
        await client.call("snapshot", timeout_s=5)
    with pytest.raises(ConnectionError):  # a lookup that failed is not the last
        await client.call("snapshot", timeout_s=5)
    assert len(lookups) == 2
    await asyncio.sleep(0)


def test_weights_may_lie_on_other_nodes_only(tmp_path: Path) -> None:
    there = "/srv/weights/of-another-node"
    with pytest.raises(OperatorError, match="no such folder"):
        weights.locate(there, base=tmp_path, cache=tmp_path)
    assert weights.locate(there, base=tmp_path, cache=tmp_path, here=False) == Path(there)
    assert weights.locate("w", base=tmp_path, cache=tmp_path, here=False) == tmp_path / "w"
    for wrong in ("s3://bucket/x", "build:none/x"):
        with pytest.raises(OperatorError):
            weights.locate(wrong, base=tmp_path, cache=tmp_path, here=False)


def test_what_a_node_builds_is_told_without_rolling_anything(tmp_path: Path) -> None:
    """Where the recipes lie is no part of what identifies an engine."""
    spec = {
        "name": "m",
        "versions": [
            {"version": "a", "weights": {"source": "build:r/v1"}, "adapters": [{"name": "x", "source": "/srv/x"}]}
        ],
        "release": {"stable": "a"},
    }
    (tmp_path / "m.yaml").write_text(yaml.safe_dump(spec))
    catalog = store.load(tmp_path, "gpu")
    config = manifest.serve_config(catalog, gateways=2, nodes=3, locate=lambda source, base: Path("/cache") / source)
    gateway, engine = config["applications"]
    deployment = gateway["deployments"][0]
    assert (deployment["num_replicas"], deployment["max_replicas_per_node"]) == (6, 2)
    knobs = engine["deployments"][0]["user_config"]
    assert knobs["builds"] == [{"source": "build:r/v1", "base": str(tmp_path)}]
    assert str(tmp_path) not in json.dumps(engine["args"])


@pytest.mark.parametrize("jump_s", [-3600.0, 3600.0])
def test_a_clock_that_is_set_neither_prolongs_a_drain_nor_ends_it(
    monkeypatch: pytest.MonkeyPatch, jump_s: float
) -> None:
    class Clock:
        slept = jumped = 0.0

        def monotonic(self) -> float:
            return self.slept

        def time(self) -> float:
            return NOW + self.slept + self.jumped

        def sleep(self, seconds: float) -> None:
            self.slept, self.jumped = self.slept + seconds, jump_s
            assert self.slept < 20

    told: list[float] = []

    def drain_node(node_id: str, reason: int, why: str, deadline_ms: int, timeout: float) -> tuple[bool, str]:
        told.append(deadline_ms / 1000)
        return True, ""

    clock, words = Clock(), SimpleNamespace(DrainNodeReason=SimpleNamespace(DRAIN_NODE_REASON_PREEMPTION=2))
    monkeypatch.setitem(sys.modules, "ray.core.generated", SimpleNamespace(autoscaler_pb2=words))
    monkeypatch.setattr(node, "time", clock)
    node._leave(SimpleNamespace(drain_node=drain_node), "n", 10.0, lambda: False)
    assert clock.slept == pytest.approx(10.0, abs=0.2) and told == [NOW + 10.0]
