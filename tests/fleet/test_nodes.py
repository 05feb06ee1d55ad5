"""Several nodes for real, each a host of its own: a client outside asks any of them; the head goes away and comes back; nodes
come and go. Engines are simulated, all else is what units start."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import httpx
import pytest
import yaml

from serving.settings import load_settings
from tests.cluster import CATALOG, STATE, Cluster, Node, answers, cluster
from tests.fleet.test_life import model_file
from tests.hosts import missing
from tests.stack import ROOT, until

pytestmark = [
    pytest.mark.ray,
    pytest.mark.slow,
    pytest.mark.timeout(300),
    pytest.mark.skipif(bool(missing()), reason=missing() or "-"),
]

ITL_MS = 40  # of the slow model's streams
HEAD_AWAY_S = float(os.environ.get("STEELYARD_TEST_HEAD_AWAY_S", "300"))


@pytest.fixture(scope="module")
def nodes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """A head and two workers with two models on them. Tests leave it whole."""
    with cluster(tmp_path_factory.mktemp("nodes")) as made:
        for rack, worker in enumerate([made.add(), made.add()]):
            worker.env["STEELYARD_NODE_LABELS"] = f"rack={rack}"
            worker.start()
        for worker in made.workers:
            until(worker.up, "a worker is up", 60)
        models = made.head.host.inside(CATALOG)
        models.parent.mkdir()
        for name, args in ("one", {}), ("two", {"sim-itl-ms": ITL_MS}):
            model_file(models, name, {"a": {"max-num-seqs": 8, **args}})
            change(models / f"{name}.yaml", drain_s=5)
        made.head.cli("up")
        yield made


def change(file: Path, **fields: object) -> None:
    """Of the first version in a model's file."""
    spec = yaml.safe_load(file.read_text())
    spec["versions"][0] |= fields
    file.write_text(yaml.safe_dump(spec))


def engines(nodes: Cluster) -> dict[str, tuple[str, int]]:
    """Replica -> its node and the pid of its engine, as its door states it."""
    secret = (nodes.head.host.inside(STATE) / "cluster-secret").read_text().strip()
    ready = [r for r in nodes.status()["replicas"] if r["state"] == "READY"]
    with httpx.Client(headers={"x-steelyard-secret": secret}) as door:
        return {r["id"]: (r["node"], door.get(f"{r['url']}/-/door").json()["pid"]) for r in ready}


def whole(nodes: Cluster) -> bool:
    """Whether Serve calls every application running and every node answers for every model."""
    apps = nodes.status()["applications"].values()
    return all(a["status"] == "RUNNING" for a in apps) and all(answers(n) for n in nodes.nodes)


def serving(nodes: Cluster) -> set[str]:
    """The nodes of the engines that the directory holds for ready."""
    return {r["node"] for r in nodes.status()["replicas"] if r["state"] == "READY"}


def gateways(nodes: Cluster) -> list[str]:
    """The node of every gateway in the directory."""
    return sorted(g["node"] for g in nodes.status()["gateways"])


def gateway_count(nodes: Cluster) -> int:
    """How many gateways Serve is told to run."""
    code = (
        "from serving.cli import cluster; from serving.settings import load_settings\n"
        "with cluster.joined(load_settings()):\n"
        "    from ray import serve\n"
        "    d = serve.context._get_global_client().get_serve_details()['applications']['gateway']['deployments']['gateway']\n"
        "    print('count', d['target_num_replicas'])"
    )
    done = nodes.head.host.run(sys.executable, "-c", code, env=nodes.head.env, cwd=ROOT)
    return int(done.stdout.split("count ")[1])


class Asking(threading.Thread):
    """A client that asks some nodes again and again; `wrong` holds every answer but a good one."""

    def __init__(self, nodes: Cluster, of: list[Node], model: str) -> None:
        super().__init__(daemon=True)
        self.nodes, self.of, self.model = nodes, of, model
        self.good = 0
        self.wrong: list[str] = []
        self._enough = threading.Event()

    def run(self) -> None:
        while not self._enough.wait(0.05):
            for node in self.of:
                try:
                    answer = self.nodes.chat(node, self.model)
                    if answer.status_code == 200:
                        self.good += 1
                    else:
                        self.wrong.append(f"{node.host.address}: {answer.status_code} {answer.text}")
                except httpx.HTTPError as e:
                    self.wrong.append(f"{node.host.address}: {e!r}")

    def end(self) -> None:
        self._enough.set()
        self.join()
        assert not self.wrong, self.wrong[:3]
        assert self.good > 0


class Stream(threading.Thread):
    """One long answer of the slow model through one node."""

    def __init__(self, nodes: Cluster, node: Node, tokens: int, model: str = "two") -> None:
        super().__init__(daemon=True)
        self.nodes, self.node, self.tokens, self.model = nodes, node, tokens, model
        self.began = threading.Event()
        self.lines: list[str] = []
        self.start()
        assert self.began.wait(30)

    def run(self) -> None:
        body = {
            "model": self.model,
            "messages": [{"role": "user", "content": "x"}],
            "max_tokens": self.tokens,
            "ignore_eos": True,
            "stream": True,
        }
        headers = {"authorization": f"Bearer {self.nodes.key}"}
        url = f"{self.node.url}/v1/chat/completions"
        with httpx.stream("POST", url, headers=headers, json=body, timeout=60) as answer:
            for line in answer.iter_lines():
                if line:
                    self.lines.append(line)
                    self.began.set()

    def whole(self) -> bool:
        self.join(60)
        return self.lines[-1] == "data: [DONE]" and len(self.lines) > self.tokens and "error" not in "".join(self.lines)


class Held(threading.Thread):
    """One request that has to wait."""

    def __init__(self, nodes: Cluster, node: Node, model: str) -> None:
        super().__init__(daemon=True)
        self.nodes, self.node, self.model = nodes, node, model
        self.got: httpx.Response | None = None
        self.start()

    def run(self) -> None:
        self.got = self.nodes.chat(self.node, self.model)

    def answer(self) -> httpx.Response:
        self.join(60)
        assert self.got is not None
        return self.got


def test_any_node_answers_for_every_model(nodes: Cluster) -> None:
    assert gateways(nodes) == sorted(n.host.address for n in nodes.nodes)
    for node in nodes.nodes:
        for model in ("one", "two"):
            assert nodes.chat(node, model).status_code == 200
    told = nodes.status()["nodes"]
    assert [(n["node"], n["role"]) for n in told] == [(n.host.address, n.role) for n in nodes.nodes]
    assert {at for at, _ in engines(nodes).values()} <= {w.host.address for w in nodes.workers}, "none on the head"


def test_every_listening_port_stands_in_the_security_page(nodes: Cluster) -> None:
    text = (ROOT / "docs" / "security.md").read_text().partition("## Several nodes")[2]
    assert text
    found = re.findall(r"^\| `([^`]+)` \| `([^`]+)` \|", text, re.M)
    rows = [(who.replace(r"\|", "|"), where.replace(r"\|", "|")) for who, where in found]
    assert rows
    unknown = []
    for node in nodes.nodes[:2]:
        for line in node.host.run("ss", "-lntpxH").stdout.splitlines():
            name = re.findall(r'\("([^"]+)",pid=', line)[0]
            address = line.split()[4].replace(node.host.address, "NODE")
            if not any(re.fullmatch(who, name) and re.fullmatch(where, address) for who, where in rows):
                unknown.append(f"{node.role}: {line}")
    assert not unknown


def test_what_listens_between_nodes_asks_for_a_secret(nodes: Cluster) -> None:
    """Every HTTP server on a node's address; Ray's gRPC is asked in the test of a wrong token."""
    for node in nodes.nodes[:2]:
        for line in node.host.run("ss", "-lntH").stdout.splitlines():
            address, _, port = line.split()[3].rpartition(":")
            if address != node.host.address:
                continue
            for path in ("/", "/metrics", "/v1/models", "/api/version", "/logs", "/docs"):
                try:
                    answer = httpx.get(f"http://{address}:{port}{path}", timeout=5)
                except httpx.HTTPError:
                    continue
                assert answer.status_code in (401, 403, 404, 405), (node.role, port, path, answer.text)


def test_secrets_and_keys_are_for_their_owner_only_and_on_no_command_line(nodes: Cluster) -> None:
    for node in nodes.nodes:
        there = node.host.inside(STATE)
        for path in there.rglob("*"):
            assert (
                path.is_dir()
                or path.parent != there
                or path.stat().st_mode & 0o077 == 0
                or path.suffix
                in (
                    ".lock",
                    ".pid",
                )
            ), path
        secrets = [nodes.key, *((there / name).read_text().strip() for name in ("cluster-secret", "ray-token"))]
        commands = b"".join(Path(f"/proc/{pid}/cmdline").read_bytes() for pid in node.host.pids())
        assert not any(s.encode() in commands for s in secrets)
    assert nodes.key not in (nodes.workers[0].host.inside(STATE) / "keys-of-head.json").read_text()


def test_a_key_of_the_head_opens_every_node_until_it_is_revoked(nodes: Cluster) -> None:
    made = json.loads(nodes.head.cli("keys", "create", "--name", "t", "--scope", "infer:one", "--json").stdout)

    def told(node: Node, status: int) -> bool:
        return nodes.chat(node, "one", made["token"]).status_code == status

    for node in nodes.nodes:
        until(partial(told, node, 200), "the new key works", 3)
    assert "Make and revoke keys on the head" in nodes.workers[0].cli("keys", "list", check=False).stderr
    nodes.head.cli("keys", "revoke", made["id"])
    for node in nodes.nodes:
        until(partial(told, node, 401), "the revoked key is refused", 3)


def test_a_killed_head_stops_nothing_and_finds_its_cluster_again(nodes: Cluster) -> None:
    made = json.loads(nodes.head.cli("keys", "create", "--name", "t", "--scope", "infer:one", "--json").stdout)
    nodes.head.cli("keys", "revoke", made["id"])
    before = engines(nodes)
    through = nodes.workers[0]
    asking = Asking(nodes, nodes.workers, "one")
    stream = Stream(nodes, through, 16_000 // ITL_MS)
    asking.start()
    nodes.head.kill()
    assert all(answers(w) for w in nodes.workers)
    killed = asking.good
    until(lambda: asking.good > killed + 40, "requests are answered without a head", 20)
    began = time.monotonic()
    nodes.head.start()
    until(nodes.head.up, "the head is up again", 60)
    until(lambda: answers(nodes.head), "the head's own gateway answers", 30)
    assert stream.whole()
    assert engines(nodes) == before
    assert time.monotonic() - began < 60
    for node in nodes.nodes:
        assert nodes.chat(node, "one", made["token"]).status_code == 401

    # Control is back: what a person changes takes effect, and what did not change is not touched.
    models = nodes.head.host.inside(CATALOG)
    change(models / "one.yaml", scaling={"min": 2, "max": 2})
    nodes.head.cli("up")
    after = engines(nodes)
    assert before.items() <= after.items() and len(after) == len(before) + 1
    asking.end()


def test_a_node_that_joins_answers_soon_and_one_that_stops_ends_in_order(nodes: Cluster) -> None:
    third = nodes.add().start()
    until(third.up, "it is up", 60)
    until(lambda: answers(third), "it answers for every model", 10)
    assert nodes.chat(third, "two").status_code == 200

    asking = Asking(nodes, [nodes.head, *nodes.workers[:2]], "one")
    asking.start()
    stream = Stream(nodes, third, 3_000 // ITL_MS)
    assert third.main is not None
    third.main.signal(signal.SIGTERM)
    assert third.main.wait(60) == 0, third.main.output()
    assert stream.whole(), "its gateway let the stream finish"
    assert not third.host.pids()
    until(lambda: len(nodes.status()["nodes"]) == 3, "it left", 10)
    asking.end()
    nodes.nodes.remove(third)


def test_a_killed_worker_leaves_the_tables_and_the_others_serve_on(nodes: Cluster) -> None:
    count = Counter(at for at, _ in engines(nodes).values())
    other, victim = sorted(nodes.workers, key=lambda w: count[w.host.address])
    assert count[victim.host.address] > 0
    asking = [Asking(nodes, [nodes.head, other], model) for model in ("one", "two")]
    for a in asking:
        a.start()
    until(lambda: all(a.good for a in asking), "both are answered", 20)
    victim.kill()
    until(lambda: victim.host.address not in serving(nodes), "its engines are gone from the table", 15)
    until(lambda: answers(nodes.head) and answers(other), "both models are served by the other", 60)
    until(lambda: victim.host.address not in gateways(nodes), "its gateway is gone", 15)
    nodes.head.cli("up")  # is not held up by a gateway that has no node
    for a in asking:  # what was at an engine of it, or waits for the next one, is answered too
        a.end()
    victim.start()
    until(victim.up, "it joins again", 60)
    until(lambda: whole(nodes), "all is as it was", 90)


def test_a_node_whose_ray_dies_ends_with_a_sentence(nodes: Cluster) -> None:
    """Its raylet says goodbye, so that Ray knows of its end before Serve does: no other node's gateway may pay for it."""
    count = Counter(at for at, _ in engines(nodes).values())
    # The node with fewer replicas is the one whose gateway Serve would stop first, were it told to while it counts the dead.
    _, victim = sorted(nodes.workers, key=lambda w: count[w.host.address])
    survivors = {g["id"] for g in nodes.status()["gateways"] if g["node"] != victim.host.address}
    assert victim.main is not None and len(survivors) == 2
    raylet = next(p for p in victim.host.pids() if Path(f"/proc/{p}/comm").read_text().strip() == "raylet")
    (victim.logs).write_text("")
    os.kill(raylet, signal.SIGTERM)
    assert victim.main.wait(20) == 1
    errors = [line for line in victim.main.output().splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and "raylet" in errors[0] and "Traceback" not in victim.main.output()
    assert not victim.host.pids()
    until(lambda: gateway_count(nodes) == 2, "Serve wants a gateway less", 30)
    until(lambda: len(gateways(nodes)) == 2, "it left the table", 15)
    assert {g["id"] for g in nodes.status()["gateways"]} == survivors, "no live one was stopped"
    victim.start()
    until(victim.up, "its unit starts it again", 60)
    until(lambda: whole(nodes), "all is as it was", 90)


@pytest.mark.engine
@pytest.mark.skipif(
    importlib.util.find_spec("vllm") is None, reason="vLLM is not installed: it checks the engine's arguments"
)
def test_weights_that_a_node_lacks_are_named_with_the_node(nodes: Cluster) -> None:
    models = nodes.head.host.inside(CATALOG)
    known = load_settings().cache_dir.glob("vllm-args-*.json")  # asking vLLM for them takes long
    nodes.head.host.inside("/var/cache/steelyard").mkdir(exist_ok=True)
    for file in known:
        shutil.copy(file, nodes.head.host.inside("/var/cache/steelyard"))
    spec = {
        "name": "three",
        "versions": [{"version": "a", "weights": {"source": "/srv/none"}}],
        "release": {"stable": "a"},
    }
    (models / "three.yaml").write_text(yaml.safe_dump(spec))
    before = engines(nodes)
    nodes.head.env["STEELYARD_PROFILE"] = "cpu"  # the others are simulators by their own files
    try:
        failed = nodes.head.cli("up", check=False)
    finally:
        nodes.head.env["STEELYARD_PROFILE"] = "sim"
        (models / "three.yaml").unlink()
    assert failed.returncode == 1
    told = [line for line in failed.stderr.splitlines() if line.startswith("error: ")]
    assert len(told) == 1 and "/srv/none" in told[0] and "three@a" in told[0]
    assert any(f"node {w.host.address}" in told[0] for w in nodes.workers), (
        "the head runs no engines, so it needs no weights"
    )
    nodes.head.cli("up")
    assert engines(nodes) == before


def test_a_worker_that_cannot_join_says_why(nodes: Cluster) -> None:
    stranger = nodes.add()
    try:
        told = run(stranger, {"STEELYARD_HEAD": f"{nodes.net.gateway}:6379", "STEELYARD_HEAD_WAIT_S": "2"})
        assert "waiting for the head" in told and "no head at" in told

        stranger.env["STEELYARD_HEAD"] = f"{nodes.net.gateway}:6379"
        stranger.logs.unlink()
        waiting = stranger.start().main
        assert waiting is not None
        until(lambda: "waiting for the head" in waiting.output(), "it waits", 30)
        waiting.signal(signal.SIGTERM)
        assert waiting.wait(10) == 0 and not stranger.host.pids()
        stranger.env["STEELYARD_HEAD"] = nodes.workers[0].env["STEELYARD_HEAD"]

        (stranger.host.inside(STATE) / "ray-token").write_text("0" * 64)
        assert "refuses this node's token" in run(stranger, {})
        (stranger.host.inside(STATE) / "ray-token").unlink()
        assert "copy it from the head" in run(stranger, {})
        assert "is no address of this machine" in run(stranger, {"STEELYARD_NODE_ADDRESS": nodes.head.host.address})
        assert "is not HOST:PORT" in run(stranger, {"STEELYARD_HEAD": "nonsense"})
    finally:
        nodes.nodes.remove(stranger)
        shutil.rmtree(stranger.host.inside(STATE))


def run(node: Node, env: dict[str, str]) -> str:
    """What a node that fails to start says: one error line, nothing left behind."""
    node.env, before = node.env | env, node.env
    node.logs.unlink(missing_ok=True)
    try:
        node.start()
        assert node.main is not None
        assert node.main.wait(60) == 1
    finally:
        node.env = before
    told = node.main.output()
    assert len([line for line in told.splitlines() if line.startswith("error: ")]) == 1 and "Traceback" not in told
    assert not node.host.pids()
    return told


@pytest.fixture
def far(nodes: Cluster) -> Iterator[Node]:
    """A worker that alone may run the model `far`, while `near` runs on the other alone."""
    models = nodes.head.host.inside(CATALOG)
    for name, rack in ("near", "0"), ("far", "1"):
        model_file(models, name, {"a": {"max-num-seqs": 8, "sim-itl-ms": ITL_MS}})
        spec = yaml.safe_load((models / f"{name}.yaml").read_text())
        (models / f"{name}.yaml").write_text(yaml.safe_dump(spec | {"placement": {"labels": {"rack": rack}}}))
    nodes.head.cli("up")
    yield nodes.workers[1]
    for name in ("near", "far"):
        (models / f"{name}.yaml").unlink()
    nodes.head.cli("up")


@pytest.mark.soak
@pytest.mark.timeout(int(HEAD_AWAY_S) + 300)
def test_a_head_that_is_stopped_for_minutes_stops_nothing_and_scales_again_when_it_is_back(nodes: Cluster) -> None:
    """As an operator stops its unit, to mend the machine. Everybody's requests go on, by the engines that there were; load
    that came meanwhile gets its engine within 10 s of the head's return."""
    models = nodes.head.host.inside(CATALOG)
    args = {"max-num-seqs": 8, "sim-itl-ms": ITL_MS}
    model_file(models, "grows", {"a": args})
    change(models / "grows.yaml", scaling={"min": 1, "max": 2, "target_ongoing": 2})
    nodes.head.cli("up")
    before = engines(nodes)
    asking = Asking(nodes, nodes.workers, "one")
    asking.start()
    assert nodes.head.main is not None
    nodes.head.main.signal(signal.SIGTERM)
    assert nodes.head.main.wait(60) == 0, nodes.head.main.output()
    assert not nodes.head.host.pids()
    nodes.head.logs.unlink()
    back = time.monotonic() + HEAD_AWAY_S
    while time.monotonic() < back:
        count = asking.good
        until(lambda: asking.good > count + 40, "requests are answered without a head", 30)  # noqa: B023 - called in this turn
        assert all(answers(w) for w in nodes.workers)
        time.sleep(1)  # the head stays away for so long; this only looks once a second
    streams = [Stream(nodes, nodes.workers[i % 2], 60_000 // ITL_MS, model="grows") for i in range(6)]
    nodes.head.start()
    until(nodes.head.up, "the head is up again", 60)
    returned = time.time()
    until(lambda: ups(nodes, "grows"), "the load that came meanwhile gets its engine", 30)
    assert ups(nodes, "grows")[0] < returned + 10
    assert before.items() <= engines(nodes).items()
    until(lambda: answers(nodes.head), "the head's own gateway answers", 30)
    asking.end()
    assert all(s.whole() for s in streams)
    (models / "grows.yaml").unlink()
    nodes.head.cli("up")


def ups(nodes: Cluster, model: str) -> list[float]:
    """When the model got another replica for its load, in epoch seconds; nothing while control is not back."""
    told = nodes.head.cli("scale", "explain", model, "--json", check=False)
    if told.returncode:
        return []
    return [c["at"] for c in json.loads(told.stdout)[0]["changes"] if c["cause"] == "load" and c["after"] > c["before"]]


@pytest.mark.soak
def test_a_node_whose_link_fails_is_left_out_and_comes_back(nodes: Cluster, far: Node) -> None:
    """Its processes run on and hear nothing. What is not on it goes on as before; what is ends with an error or waits."""
    head, other = nodes.head, nodes.workers[0]
    before = engines(nodes)
    assert {at for id, (at, _) in before.items() if id.startswith("far@")} == {far.host.address}

    asking = Asking(nodes, [head, other], "near")
    stream = Stream(nodes, head, 60_000 // ITL_MS, model="far")
    asking.start()
    far.host.unplug()
    try:
        until(lambda: far.host.address not in serving(nodes), "its engines left the table", 10)
        until(lambda: far.host.address not in gateways(nodes), "its gateway left the table", 10)
        stream.join(20)
        assert not stream.is_alive(), "it ended"
        last = json.loads(stream.lines[-1].removeprefix("data: "))
        assert last["error"]["code"] == "engine_error" and "data: [DONE]" not in stream.lines
        held = Held(nodes, head, "far")
    finally:
        far.host.plug()
    until(lambda: answers(far), "its own gateway is ready again", 60)
    assert held.answer().status_code == 200, "a request waited for it"
    until(lambda: engines(nodes) == before, "the same engines serve on", 60)
    until(lambda: len(gateways(nodes)) == 3, "so do the gateways", 30)
    asking.end()
    for node in nodes.nodes:
        assert nodes.chat(node, "far").status_code == 200


@pytest.mark.soak
def test_a_node_that_was_away_too_long_starts_again(nodes: Cluster) -> None:
    """Ray has declared it dead and started its engines elsewhere: when it hears so it ends, and its unit starts it again."""
    victim = nodes.workers[1]
    victim.host.unplug()
    try:
        until(lambda: len(nodes.status()["nodes"]) == 2, "Ray calls it dead", 120)
        until(lambda: answers(nodes.head), "both models are served without it", 60)
        until(lambda: gateway_count(nodes) == 2, "Serve wants a gateway less", 30)
    finally:
        victim.host.plug()
    assert victim.main is not None
    assert victim.main.wait(120) == 1, "its main process ends"
    assert not victim.host.pids()
    victim.start()
    until(victim.up, "its unit starts it again", 60)
    until(lambda: whole(nodes), "all is as it was", 90)
