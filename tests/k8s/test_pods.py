"""The chart's pods, run as the kubelet and KubeRay would run them, without either: a head and a worker on hosts of their own, as
the user and with the environment, files and mounts that the chart gives, started by the command KubeRay generates, configured
by the request the operator sends. What it takes from the cluster is only what KubeRay 1.6 adds to a pod."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.hosts import Host, Process, hosts, missing
from tests.k8s import chart
from tests.k8s.chart import CHART, ROOT
from tests.stack import until

pytestmark = [
    pytest.mark.ray,
    pytest.mark.slow,
    pytest.mark.timeout(280),
    pytest.mark.skipif(bool(missing()), reason=missing() or "-"),
]

BIN = str(Path(sys.executable).parent)
TOKEN = "x" * 44  # as KubeRay makes one for each cluster
ITL_MS = 40  # of the paced model
VALUES = chart.changed(
    "external-secret",
    {
        "secrets": {},
        "faultTolerance.backend": "none",
        "workers.0.replicas": 1,
        "topologySpread": [],
        "head.servesTraffic": True,
        "drainSeconds": 26,
        **{f"models.{i}.versions.0.drain_s": 8 for i in range(2)},
        "models.1.versions.0.engine.args.sim-itl-ms": ITL_MS,
    },
)


@dataclass
class Pod:
    """One pod of the rendered chart on a host."""

    host: Host
    spec: dict[str, Any]
    main: Process | None = None

    @property
    def container(self) -> dict[str, Any]:
        one: dict[str, Any] = self.spec["containers"][0]
        return one

    def env(self, address: str) -> dict[str, str]:
        own = {e["name"]: e["value"] for e in self.container["env"]}
        added = {
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": TOKEN,
            "RAY_ADDRESS": f"{address}:6379",
            "RAY_PORT": "6379",
            "RAY_USAGE_STATS_KUBERAY_IN_USE": "1",
            "RAY_SERVE_KV_TIMEOUT_S": "5",
            "RAY_timeout_ms_task_wait_for_death_info": "0",
            "RAY_gcs_server_request_timeout_seconds": "5",
        }
        assert not set(own) & set(added)
        return {"PATH": f"{BIN}:/usr/bin:/bin", "PYTHONPATH": str(ROOT), **own, **added}  # the image installs serving

    def mount(self, secrets: dict[str, str]) -> None:
        """Volumes as the kubelet makes them: writable for all, Secrets root's and readable for the pod's group."""
        context = self.spec["securityContext"]
        volumes = {v["name"]: v for v in self.spec["volumes"]}
        for mount in self.container["volumeMounts"]:
            at, volume = mount["mountPath"], volumes[mount["name"]]
            self.host.run("mkdir", "-p", at)
            if "emptyDir" in volume:
                self.host.run("chmod", "777", at)
                continue
            for item in volume["secret"]["items"]:
                there = self.host.inside(at) / item["path"]
                there.write_text(secrets[item["key"]])
                os.chown(there, 0, context["fsGroup"])
                there.chmod(volume["secret"]["defaultMode"] | 0o040)  # fsGroup adds the group's right

    def user(self, *command: str) -> list[str]:
        """As the pod's user, without a capability and without a way to get one."""
        context = self.spec["securityContext"]
        who = [f"--reuid={context['runAsUser']}", f"--regid={context['runAsGroup']}", f"--groups={context['fsGroup']}"]
        return ["setpriv", *who, "--no-new-privs", "--bounding-set=-all", "--inh-caps=-all", *command]

    def exec(self, *command: str, address: str = "127.0.0.1", **env: str) -> subprocess.CompletedProcess[str]:
        return self.host.run(*self.user(*command), env=self.env(address) | env, cwd="/tmp", check=False)


@dataclass
class Release:
    head: Pod
    worker: Pod
    spare: Pod  # a worker that is not started
    key: str
    config: dict[str, Any]
    start: Callable[[Pod], None]

    @property
    def url(self) -> str:
        """What the Service leads to: the workers' gateways."""
        return f"http://{self.worker.host.address}:8000"


def ray_start(role: str, group: dict[str, Any], address: str) -> str:
    """KubeRay's generateRayStartCommand for the group."""
    params = {"dashboard-agent-listen-port": "52365", "metrics-export-port": "8080", **group["rayStartParams"]}
    params |= {"dashboard-host": "0.0.0.0"} if role == "head" else {"address": f"{address}:6379"}
    flags = " ".join(f"--{name}" if value == "true" else f"--{name}={value}" for name, value in sorted(params.items()))
    return f"ulimit -n 65536; ray start {'--head ' if role == 'head' else ''}{flags} --block"


@pytest.fixture(scope="module")
def release(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Release]:
    folder = tmp_path_factory.mktemp("pods")
    found = chart.objects(VALUES)
    cluster = chart.rayservice(found)["spec"]["rayClusterConfig"]
    groups = {"head": cluster["headGroupSpec"], "worker": cluster["workerGroupSpecs"][0]}
    from tests.k8s.test_upgrade import decoded

    secrets = decoded(found)

    def start(pod: Pod) -> None:
        role = "head" if pod is pods[0] else "worker"
        for place in ("/root", "/tmp"):  # where this machine's interpreter may lie
            pod.host.run("chmod", "755" if place == "/root" else "1777", place)
        pod.mount(secrets)
        command = pod.user("/bin/bash", "-c", "--", ray_start(role, groups[role], head))
        if role == "worker":
            ready = lambda: pod.exec("ray", "health-check", "--address", f"{head}:6379").returncode == 0  # noqa: E731
            until(ready, f"the init container sees the head:\n{(folder / 'head.log').read_text()}", 90)
        env = pod.env("127.0.0.1" if role == "head" else head)
        pod.main = pod.host.start(command, env=env, cwd="/tmp", log=folder / f"{role}.log")

    with hosts(3) as made:
        roles = ("head", "worker", "worker")
        pods = [Pod(host, groups[role]["template"]["spec"]) for role, host in zip(roles, made, strict=True)]
        head = pods[0].host.address
        for pod in pods[:2]:
            start(pod)
        config = chart.serve_config(found)
        until(lambda: sent(head, config), "the head's dashboard takes the Serve config", 90)
        ready_release = Release(*pods, secrets["api-key"], config, start)
        until(lambda: ok(f"{ready_release.url}/readyz"), f"every model is ready:\n{status(head)}", 120)
        yield ready_release


def sent(head: str, config: dict[str, Any]) -> bool:
    """The operator's request, with Ray's token."""
    try:
        answer = httpx.put(
            f"http://{head}:8265/api/serve/applications/",
            json=config,
            headers={"X-Ray-Authorization": f"Bearer {TOKEN}"},
            timeout=10,
        )
    except httpx.HTTPError:
        return False
    assert answer.status_code in (200, 503), answer.text
    return answer.status_code == 200


def status(head: str) -> dict[str, Any]:
    """What the operator reads back."""
    answer = httpx.get(
        f"http://{head}:8265/api/serve/applications/",
        headers={"X-Ray-Authorization": f"Bearer {TOKEN}"},
        timeout=10,
    )
    told: dict[str, Any] = answer.json()["applications"]
    return {name: (a["status"], a["message"]) for name, a in told.items()}


def ok(url: str) -> bool:
    try:
        return httpx.get(url, timeout=5).status_code == 200
    except httpx.HTTPError:
        return False


def test_the_operator_sees_every_application_run(release: Release) -> None:
    """KubeRay calls a RayService ready when they do."""
    wanted = {a["name"]: ("RUNNING", "") for a in release.config["applications"]}
    until(lambda: status(release.head.host.address) == wanted, str(status(release.head.host.address)), 60)


def test_the_probes_answer_the_kubelet(release: Release) -> None:
    for pod in (release.head, release.worker):
        ports = {p["name"]: p["containerPort"] for p in pod.container["ports"]}
        for probe in ("startupProbe", "livenessProbe", "readinessProbe"):
            get = pod.container[probe]["httpGet"]
            port = ports.get(get["port"], get["port"])
            assert ok(f"http://{pod.host.address}:{port}{get['path']}"), (probe, get)


def test_helm_test_passes(release: Release) -> None:
    """The hook's own script, in its environment, from outside."""
    (hook,) = chart.kind(chart.objects(VALUES), "Pod")
    (container,) = hook["spec"]["containers"]
    env = {e["name"]: e.get("value", release.key) for e in container["env"]} | {"URL": release.url}
    done = subprocess.run(
        [sys.executable, "-c", container["args"][0]], env=env, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0 and done.stdout.startswith("ok: tiny answers"), done.stdout + done.stderr
    assert container["args"][0].strip() == (CHART / "files" / "smoke.py").read_text().strip()


def test_any_gateway_answers_for_every_model_and_the_head_has_one_and_no_engine(release: Release) -> None:
    for host in (release.head.host, release.worker.host):
        for model in ("tiny", "paced"):
            answer = ask(release, host.address, model)
            assert answer.status_code == 200, answer.text
    found = told(release)
    assert {r["node"] for r in found["replicas"]} == {release.worker.host.address}
    assert {g["node"] for g in found["gateways"]} == {release.head.host.address, release.worker.host.address}


def test_ray_answers_nobody_without_its_token(release: Release) -> None:
    head = release.head.host.address
    for path in ("/api/serve/applications/", "/api/version", "/api/jobs/", "/nodes?view=summary"):
        assert httpx.get(f"http://{head}:8265{path}", timeout=10).status_code == 401, path
    for host in (head, release.worker.host.address):
        assert httpx.get(f"http://{host}:52365/api/serve/applications/", timeout=10).status_code in (401, 404)
        with pytest.raises(httpx.HTTPError):
            httpx.get(f"http://{host}:8080/metrics", timeout=3)
    assert release.worker.exec("ray", "health-check", "--address", f"{head}:6379", RAY_AUTH_TOKEN="y" * 44).returncode


def test_verbs_that_would_fight_the_rayservice_are_refused_in_the_pod(release: Release) -> None:
    for verb in ("up", "down"):
        done = release.head.exec("python", "-m", "serving.cli.main", verb)
        assert done.returncode == 1 and "written by its RayService alone" in done.stderr


def test_everything_runs_as_the_pod_s_user(release: Release) -> None:
    for pod in (release.head, release.worker):
        pids = pod.host.pids()
        assert len(pids) > 3
        for pid in pids:
            lines = dict(x.split(":", 1) for x in Path(f"/proc/{pid}/status").read_text().splitlines() if ":" in x)
            if lines["Name"].strip() in ("nsenter",):
                continue
            assert set(lines["Uid"].split()) == {"10001"}, lines["Name"]
            assert int(lines["CapEff"], 16) == 0 and lines["NoNewPrivs"].strip() == "1", lines["Name"]


def test_every_listening_port_stands_in_the_page(release: Release) -> None:
    text = (ROOT / "docs" / "kubernetes.md").read_text().partition("### Every listening port")[2]
    found = re.findall(r"^\| `([^`]+)` \| `([^`]+)` \|", text, re.M)
    rows = [(who.replace(r"\|", "|"), where.replace(r"\|", "|")) for who, where in found]
    assert rows
    unknown = []
    for role, pod in (("head", release.head), ("worker", release.worker)):
        for line in pod.host.run("ss", "-lntpxH").stdout.splitlines():
            name = re.findall(r'\("([^"]+)",pid=', line)[0]
            address = line.split()[4].replace(pod.host.address, "POD")
            if not any(re.fullmatch(who, name) and re.fullmatch(where, address) for who, where in rows):
                unknown.append(f"{role}: {name} {address}")
    assert not unknown, "\n".join(unknown)


def test_what_answers_http_asks_for_a_key_or_a_token(release: Release) -> None:
    """Every HTTP server that other pods can reach, but for the health paths."""
    for role, pod in (("head", release.head), ("worker", release.worker)):
        for line in pod.host.run("ss", "-lntH").stdout.splitlines():
            address, _, port = line.split()[3].rpartition(":")
            if address.startswith("127."):
                continue
            for path in ("/metrics", "/v1/models", "/api/version", "/api/serve/applications/", "/logs", "/docs"):
                try:
                    answer = httpx.get(f"http://{pod.host.address}:{port}{path}", timeout=5)
                except httpx.HTTPError:
                    continue
                assert answer.status_code in (401, 403, 404, 405), (role, port, path, answer.text[:200])


# -- the ends of pods: the tests from here on leave the release with less than it had


def test_a_worker_that_is_told_to_stop_drains_first(release: Release) -> None:
    """Its preStop hook, while another pod comes up: a stream in progress ends as it should, new work goes elsewhere."""
    old, new = release.worker, release.spare
    release.start(new)
    until(lambda: len(told(release)["nodes"]) == 3, "the new pod joins", 60)
    stream = Stream(release, old.host.address, tokens=9_000 // ITL_MS)
    asking = Asking(release, release.head.host.address)
    began = time.monotonic()
    hook = stopped(old, release.head.host.address)
    took = time.monotonic() - began
    assert hook.returncode == 0 and "drained" in hook.stdout.splitlines(), hook.stdout + hook.stderr
    assert stream.whole()
    asking.end()
    assert took < grace(old), "before the kubelet would have killed it"
    after = told(release)
    assert {r["node"] for r in after["replicas"]} == {new.host.address}
    assert {g["node"] for g in after["gateways"]} == {release.head.host.address, new.host.address}
    assert {n["node"] for n in after["nodes"]} == {release.head.host.address, new.host.address}
    assert "raylet" not in {Path(f"/proc/{pid}/comm").read_text().strip() for pid in old.host.pids()}


def test_a_head_that_is_told_to_stop_drains_only_what_is_its_own(release: Release) -> None:
    head, worker = release.head.host.address, release.spare.host.address
    stream = Stream(release, head, tokens=4_000 // ITL_MS)
    hook = stopped(release.head)
    assert hook.returncode == 0 and "drained" in hook.stdout.splitlines(), hook.stdout + hook.stderr
    assert stream.whole()
    assert not ok(f"http://{head}:8000/-/healthz"), "it takes nothing new"
    assert ask(release, worker).status_code == 200


def test_drain_is_refused_where_a_unit_does_it(release: Release) -> None:
    drain = ["steelyard", "node", "drain"]
    done = release.spare.exec(*drain, STEELYARD_RAY_ADDRESS="")
    assert done.returncode == 1 and done.stderr.startswith("error: ") and "systemctl stop" in done.stderr


def stopped(pod: Pod, head: str = "127.0.0.1") -> subprocess.CompletedProcess[str]:
    """What the kubelet does first; the environment is the container's."""
    command = pod.container["lifecycle"]["preStop"]["exec"]["command"]
    return pod.exec(*command, address=head)


def grace(pod: Pod) -> int:
    return int(pod.spec["terminationGracePeriodSeconds"])


def told(release: Release) -> dict[str, Any]:
    done = release.head.exec("python", "-m", "serving.cli.main", "status", "--json")
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def ask(release: Release, at: str, model: str = "paced", tokens: int = 2) -> httpx.Response:
    headers = {"authorization": f"Bearer {release.key}"}
    body = {"model": model, "prompt": "hello", "max_tokens": tokens}
    return httpx.post(f"http://{at}:8000/v1/completions", json=body, headers=headers, timeout=60)


class Stream(threading.Thread):
    """One answer through the gateway at an address; the test goes on once it has begun."""

    def __init__(self, release: Release, at: str, tokens: int) -> None:
        super().__init__(daemon=True)
        self.release, self.at, self.tokens = release, at, tokens
        self.lines: list[str] = []
        self.began = threading.Event()
        self.start()
        assert self.began.wait(30)

    def run(self) -> None:
        body = {"model": "paced", "prompt": "x", "max_tokens": self.tokens, "ignore_eos": True, "stream": True}
        headers = {"authorization": f"Bearer {self.release.key}"}
        url = f"http://{self.at}:8000/v1/completions"
        with httpx.stream("POST", url, json=body, headers=headers, timeout=60) as answer:
            for line in filter(None, answer.iter_lines()):
                self.lines.append(line)
                self.began.set()

    def whole(self) -> bool:
        self.join(60)
        return self.lines[-1] == "data: [DONE]" and len(self.lines) > self.tokens and "error" not in "".join(self.lines)


class Asking(threading.Thread):
    """A client that asks again and again until `end`, which wants good answers only."""

    def __init__(self, release: Release, at: str) -> None:
        super().__init__(daemon=True)
        self.release, self.at = release, at
        self.answers: list[int] = []
        self._enough = threading.Event()
        self.start()

    def run(self) -> None:
        while not self._enough.wait(0.1):
            for model in ("tiny", "paced"):
                self.answers.append(ask(self.release, self.at, model).status_code)

    def end(self) -> None:
        self._enough.set()
        self.join(60)
        assert set(self.answers) == {200}, self.answers
