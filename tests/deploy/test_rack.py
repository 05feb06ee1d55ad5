"""`make deploy` for real: machines with sshd in network namespaces, and the machine that deploys in one of its own.

The tests are one story and run in order. systemd is not the init of a network namespace: `init.py` stands in and runs the units'
own ExecStart lines with their environment, user and limits. One model is real (the tiny one), the other simulated.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from serving.catalog import weights
from tests.deploy.rack import WEIGHTS, Rack, changes, missing
from tests.hosts import Host, network
from tests.stack import ROOT, until

pytestmark = [
    pytest.mark.ray,
    pytest.mark.engine,
    pytest.mark.slow,
    pytest.mark.skipif(bool(missing()), reason=missing() or "-"),
]

TINY = f"""
name: tiny
versions:
  - version: v1
    weights: {{source: {WEIGHTS}/tiny}}
    engine: {{args: {{max-model-len: 512, max-num-seqs: 8}}}}
"""
CHECKOUT = "/tmp/rack/checkout"
OURS = "/opt/steelyard /etc/steelyard /var/lib/steelyard /var/cache/steelyard /run/steelyard /usr/local/bin/steelyard"

_OUR_PROCESSES = "grep -E 'serving|raylet|gcs_server|ray::|vllm' | grep -v grep"


def simulated(replicas: int) -> str:
    return f"name: sim\nversions: [{{version: v1, engine: {{kind: simulator}}, scaling: {{min: {replicas}, max: {replicas}}}}}]\n"


@pytest.fixture(scope="module")
def tiny_weights() -> Path:
    """The real model, from the machine's cache; built when it is not there."""
    return weights.resolve("build:tiny/v1", base=ROOT / "models", cache=Path("~/.cache/steelyard").expanduser())


@pytest.fixture(scope="module")
def rack(tiny_weights: Path) -> Iterator[Rack]:
    """Four machines; the inventory names three at first."""
    with network() as net:
        made = Rack(net)
        for _ in range(4):
            made.add(weights=tiny_weights.parent)
        (made.folder / "models" / "tiny.yaml").write_text(
            TINY.replace(f"{WEIGHTS}/tiny", f"{WEIGHTS}/{tiny_weights.name}")
        )
        (made.folder / "models" / "sim.yaml").write_text(simulated(2))
        yield made


def ask(host: Host, key: str, model: str, **more: Any) -> httpx.Response:
    """A client outside the rack."""
    body = {"model": model, "messages": [{"role": "user", "content": "What is Steelyard?"}], "max_tokens": 16, **more}
    headers = {"authorization": f"Bearer {key}"}
    return httpx.post(f"http://{host.address}:8000/v1/chat/completions", json=body, headers=headers, timeout=30)


def key_of(rack: Rack) -> str:
    return rack.machines[0].run("cat", "/var/lib/steelyard/api-key").stdout.strip()


def status(rack: Rack) -> dict[str, Any]:
    told = rack.machines[0].run("/usr/local/bin/steelyard", "status", "--json").stdout
    return json.loads(told.splitlines()[-1])  # type: ignore[no-any-return]


def engines(host: Host) -> set[int]:
    """Pids of the engines' servers on a host."""
    found = host.run("pgrep", "-f", "serving.engine.simulator|vllm.entrypoints", check=False).stdout
    return {int(pid) for pid in found.split()}


def logs(host: Host) -> str:
    return host.run("sh", "-c", "tail -n 25 /run/init-logs/* 2>&1", check=False).stdout


def made(rack: Rack, *words: str, cwd: Path | str = ROOT) -> str:
    """Runs a target that must succeed; the machines' logs are in the failure."""
    done = rack.make(*words, check=False, cwd=cwd)
    assert done.returncode == 0, done.stdout + done.stderr + "".join(f"\n{h.name}\n{logs(h)}" for h in rack.machines)
    return done.stdout


def test_machines_that_are_unknown_or_away_are_named(rack: Rack):
    (rack.folder / "nobody").touch()
    head = rack.machines[0].address
    away = str(rack.net.subnet[200])
    text = f'head = "{head}"\nworkers = ["{away}"]\nssh = {{"key": "key", "known_hosts": "nobody"}}\n'
    (rack.folder / "unknown.py").write_text(text + 'serve = {"profile": "cpu"}\n')
    done = rack.make("deploy", "INVENTORY=/tmp/rack/unknown.py", check=False)
    assert done.returncode != 0 and "no ssh to 2 of 2 machines" in done.stderr and "nothing was changed" in done.stderr
    assert f"{head}: " in done.stderr and "compare its fingerprint" in done.stderr and f"{away}: " in done.stderr
    assert "Traceback" not in done.stderr


def test_an_unfit_machine_stops_it_before_anything_changes(rack: Rack):
    inventory = rack.inventory("taken.py", workers=2)
    blocker = rack.machines[1].start(
        ["python3", "-c", "import socket, time; s = socket.create_server(('', 8000)); time.sleep(99)"]
    )
    try:
        until(lambda: ":8000" in rack.machines[1].run("ss", "-lnt").stdout, "the port is taken")
        done = rack.make("deploy", f"INVENTORY={inventory}", check=False)
    finally:
        blocker.signal(signal.SIGKILL)
    assert done.returncode != 0
    assert "8000 (gateway) is taken by pid" in done.stdout and "machines are not fit" in done.stderr
    for host in rack.machines:
        assert host.run("sh", "-c", f"ls -d {OURS} 2>/dev/null; getent passwd steelyard", check=False).stdout == ""


def test_a_dry_run_tells_and_changes_nothing(rack: Rack):
    told = made(rack, "deploy", f"INVENTORY={rack.inventory(workers=1)}", "DRY_RUN=1")
    assert changes(told) > 30 and "would: user steelyard" in told and "would: steelyard-head.service starts" in told
    for host in rack.machines:
        assert host.run("sh", "-c", f"ls -d {OURS} 2>/dev/null; getent passwd steelyard", check=False).stdout == ""


def test_three_machines_come_up_and_each_answers_for_every_model(rack: Rack):
    told = made(rack, "deploy", f"INVENTORY={rack.inventory(workers=2)}")
    head, one, two = rack.machines[:3]
    assert (
        f"endpoint: http://{head.address}:8000" in told and f"key: /var/lib/steelyard/api-key on {head.address}" in told
    )
    key = key_of(rack)
    for host in (head, one, two):
        for model in ("tiny", "sim"):
            answer = ask(host, key, model)
            assert answer.status_code == 200, answer.text
    assert ask(one, "sk-wrong", "sim").status_code == 401
    assert engines(one) and engines(two) and not engines(head)


def test_the_second_run_changes_nothing_and_no_secret_is_told(rack: Rack):
    head, one, two = rack.machines[:3]
    before = [engines(h) for h in rack.machines]
    told = made(rack, "deploy", f"INVENTORY={rack.inventory(workers=2)}")
    assert changes(told) == 0
    assert [engines(h) for h in rack.machines] == before
    for name in ("cluster-secret", "ray-token"):
        values = {h.run("cat", f"/var/lib/steelyard/{name}").stdout.strip() for h in (head, one, two)}
        assert len(values) == 1 and len(values.pop()) >= 32
        assert head.run("stat", "-c", "%a %U", f"/var/lib/steelyard/{name}").stdout == "600 steelyard\n"
    secrets = [
        head.run("cat", f"/var/lib/steelyard/{n}").stdout.strip() for n in ("cluster-secret", "ray-token", "api-key")
    ]
    told += rack.told
    for host in (head, one, two):
        told += (
            logs(host)
            + host.run("sh", "-c", "cat /etc/steelyard/*.env /proc/*/cmdline 2>/dev/null", check=False).stdout
        )
    assert not [s for s in secrets if s in told]


def test_nothing_of_it_runs_as_root(rack: Rack):
    for host in rack.machines[:3]:
        owners = host.run(
            "sh", "-c", "ps -eo user:20,args | grep -E 'serving|raylet|gcs_server|ray::|vllm' | grep -v grep"
        ).stdout
        assert owners and {line.split()[0] for line in owners.splitlines()} == {"steelyard"}


def test_a_killed_head_comes_back_and_finds_its_cluster(rack: Rack):
    head, one = rack.machines[:2]
    key, before = key_of(rack), [engines(h) for h in rack.machines[1:]]
    main = head.run("systemctl", "show", "--property", "MainPID", "steelyard-head.service").stdout.strip()
    head.run("kill", "-9", main.removeprefix("MainPID="))
    answered = 0
    began = time.monotonic()
    # Meanwhile the workers' gateways answer, with the same engines.
    while not _active(head, main) or time.monotonic() - began < 6:
        assert time.monotonic() - began < 90, logs(head)
        assert ask(one, key, "sim").status_code == 200
        answered += 1
    assert answered > 5
    until(lambda: _answers(head, key), "the head's gateway answers again", 60)
    assert [engines(h) for h in rack.machines[1:]] == before


def test_a_machine_that_fails_is_named_and_the_others_serve_on(rack: Rack):
    new = rack.machines[3]
    new.run("touch", "/opt/steelyard")  # something is in the way
    done = rack.make("deploy", f"INVENTORY={rack.inventory(workers=3)}", check=False)
    new.run("rm", "/opt/steelyard")
    assert done.returncode != 0 and f"error: {new.address}: folder /opt/steelyard: " in done.stderr, done.stderr
    assert "it goes on from here" in done.stderr and ask(rack.machines[1], key_of(rack), "sim").status_code == 200


def test_the_next_run_goes_on_a_machine_joins_alone_and_more_replicas_start(rack: Rack):
    """The head was killed before: that the number of replicas follows shows that control is whole again."""
    *old, new = rack.machines
    before = [engines(h) for h in old]
    (rack.folder / "models" / "sim.yaml").write_text(simulated(3))
    told = made(rack, "deploy", f"INVENTORY={rack.inventory(workers=3)}")
    changed = [line.partition("] ")[::2] for line in told.splitlines() if line.startswith("[")]
    assert {what for who, what in changed if who.strip("[") in (old[1].address, old[2].address)} == {
        "catalog /etc/steelyard/models"
    }
    assert any("worker.service starts" in what for who, what in changed if who.strip("[") == new.address)
    assert ask(new, key_of(rack), "tiny").status_code == 200
    until(lambda: _ready(rack, "sim@v1") == 3, "three replicas", 60)
    assert all(was <= engines(h) for was, h in zip(before, old, strict=True))


def test_removing_one_worker_leaves_nothing_on_it_and_the_others_serving(rack: Rack):
    inventory, new = f"INVENTORY={rack.inventory(workers=3)}", rack.machines[3]
    refused = rack.make("deploy-remove", inventory, check=False)
    assert refused.returncode != 0 and "give YES=1" in refused.stderr
    made(rack, "deploy-remove", inventory, f"LIMIT={new.address}", "YES=1")
    gone(new)
    assert ask(rack.machines[1], key_of(rack), "sim").status_code == 200


@pytest.mark.soak
def test_an_upgrade_goes_machine_by_machine_and_refuses_no_request(rack: Rack):
    inventory = f"INVENTORY={rack.inventory(workers=2)}"
    (rack.folder / "models" / "tiny.yaml").unlink()  # the simulated model alone from here on: it starts in a second
    made(rack, "deploy", inventory)
    assert ask(rack.machines[0], key_of(rack), "tiny").status_code == 404
    checkout = rack.folder / "checkout"
    checkout.mkdir()
    for name in ("Makefile", "deploy", "serving", "tools", "requirements", "pyproject.toml", "README.md", "LICENSE"):
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, checkout / name)
    (checkout / ".venv").symlink_to((ROOT / ".venv").resolve())
    with open(checkout / "README.md", "a") as readme:
        readme.write("Another release.\n")
    here = CHECKOUT
    done = rack.make("deploy", inventory, check=False, cwd=here)
    assert done.returncode != 0 and "make deploy-upgrade" in done.stderr
    key, failed, stop = key_of(rack), [], threading.Event()

    def client() -> None:
        """Goes to the next machine when one is stopping or does not listen, as a load balancer does."""
        while not stop.wait(0.1):
            for host in rack.machines[:3]:
                with contextlib.suppress(httpx.ConnectError):
                    answer = ask(host, key, "sim", max_tokens=4)
                    if answer.status_code != 200:
                        failed.append(answer.text)
                    break
            else:
                failed.append("no machine listens")

    thread = threading.Thread(target=client)
    thread.start()
    try:
        told = made(rack, "deploy-upgrade", inventory, cwd=here)
    finally:
        stop.set()
        thread.join()
    assert failed == []
    stops = [line.split("]")[0].strip("[") for line in told.splitlines() if "drains and stops" in line]
    assert stops == [h.address for h in (*rack.machines[1:3], rack.machines[0])]
    assert len({h.run("readlink", "/opt/steelyard/current").stdout for h in rack.machines[:3]}) == 1


def test_removing_leaves_nothing(rack: Rack):
    inventory = f"INVENTORY={rack.inventory(workers=3)}"
    made(rack, "deploy-remove", inventory, "YES=1")
    for host in rack.machines:
        gone(host)
    assert changes(made(rack, "deploy-remove", inventory, "YES=1")) == 0


def gone(host: Host) -> None:
    units = "/etc/systemd/system/steelyard* /etc/systemd/system/*/steelyard*"
    left = f"ls -d {OURS} {units} 2>/dev/null; getent passwd steelyard; getent group steelyard"
    assert host.run("sh", "-c", left, check=False).stdout == ""
    running = host.run(
        "sh", "-c", "ps -eo args | grep -E 'serving|raylet|gcs_server|ray::|vllm' | grep -v grep", check=False
    )
    assert running.stdout == ""


def _active(head: Host, old: str) -> bool:
    told = head.run(
        "systemctl", "show", "--property", "MainPID", "--property", "SubState", "steelyard-head.service"
    ).stdout
    return "SubState=running" in told and old not in told


def _answers(host: Host, key: str) -> bool:
    try:
        return ask(host, key, "sim").status_code == 200
    except httpx.HTTPError:
        return False


def _ready(rack: Rack, version: str) -> int:
    return sum(f"{r['model']}@{r['version']}" == version and r["state"] == "READY" for r in status(rack)["replicas"])
