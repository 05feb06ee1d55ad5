"""What is laid down on a machine, without a machine."""

from __future__ import annotations

import io
import subprocess
import sys
import tarfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from deploy import inventory as inventories
from deploy import layout, place, release
from deploy.deploy import load_catalog
from deploy.inventory import Inventory
from tests.stack import ROOT

RACK = """
head = {"host": "h", "address": "10.0.0.1"}
workers = [{"host": "w", "address": "10.0.0.2", "labels": {"zone": "a", "rack": "7"}}]
"""


@pytest.fixture
def rack(tmp_path: Path) -> Any:
    def made(more: str = "") -> Inventory:
        (tmp_path / "rack.py").write_text(RACK + more)
        return inventories.load(tmp_path / "rack.py")

    return made


def target(rack: Inventory, role: str) -> Any:
    machine = rack.head if role == "head" else rack.workers[0]
    return SimpleNamespace(role=role, machine=machine, unit=f"steelyard-{role}.service", name=machine.host)


def values(text: str) -> dict[str, str]:
    return {k: v.strip('"') for k, _, v in (line.partition("=") for line in text.splitlines())}


def test_a_release_is_named_by_its_content_and_holds_what_a_node_runs():
    one, two = release.build("cpu"), release.build("cpu")
    assert one.id == two.id and one.ray == "2.60.0" and one.lock == "cpu.lock"
    assert release.build("gpu").id != one.id and release.build("gpu").lock == "gpu.lock"
    with tarfile.open(fileobj=io.BytesIO(one.archive)) as archive:
        names = archive.getnames()
    assert {"serving/cli/main.py", "serving/engine/door.py", "tools/install.py", "requirements/cpu.lock"} <= set(names)
    assert not [n for n in names if "__pycache__" in n or n.startswith(("tests/", "/", ".."))]


def test_settings_of_head_and_worker(rack):
    found = rack('serve = {"profile": "cpu", "gateways": 2, "environment": {"NCCL_SOCKET_IFNAME": "bond0"}}')
    head = values(place.environment(target(found, "head"), found))
    worker = values(place.environment(target(found, "worker"), found))
    assert (head["STEELYARD_NODE_ADDRESS"], head["STEELYARD_HOST"]) == ("10.0.0.1", "10.0.0.1")
    assert "STEELYARD_HEAD" not in head and worker["STEELYARD_HEAD"] == "10.0.0.1:6379"
    assert worker["STEELYARD_NODE_LABELS"] == "rack=7,zone=a"
    assert (worker["STEELYARD_GATEWAYS"], worker["NCCL_SOCKET_IFNAME"]) == ("2", "bond0")
    assert not [k for k in head | worker if "SECRET" in k or "TOKEN" in k]


def test_every_setting_is_one_that_the_product_reads(rack):
    from serving.settings import Settings

    found = rack(
        'serve = {"redis": "10.0.0.5:6379", "cluster_name": "rack-7", "otlp_endpoint": "http://10.0.0.5:4318"}'
    )
    assert values(place.environment(target(found, "head"), found))["STEELYARD_CLUSTER_NAME"] == "rack-7"
    assert values(place.environment(target(found, "worker"), found))["STEELYARD_TRACE_RATIO"] == "0.1"
    known = {f"STEELYARD_{name.upper()}" for name in Settings.model_fields}
    for role in ("head", "worker"):
        assert {k for k in values(place.environment(target(found, role), found))} <= known


def test_sh_reads_the_settings_as_systemd_does(rack, tmp_path: Path):
    found = rack('serve = {"environment": {"A": "x y; #z"}}')
    text = place.environment(target(found, "head"), found)
    (tmp_path / "env").write_text(text)
    done = subprocess.run(["sh", "-c", f". {tmp_path}/env && echo $A"], capture_output=True, text=True, check=True)
    assert done.stdout == "x y; #z\n"


def test_the_lock_files_installer_is_what_makes_the_runtime(rack):
    made = release.build("gpu")
    assert place.install_command(rack(), made) == (
        f"umask 022 && python3.11 /opt/steelyard/releases/{made.id}/tools/install.py gpu --runtime-only "
        f"--venv /opt/steelyard/runtimes/{made.lock_id}"
    )
    folder = rack().serve.models.parent / "wheels"
    folder.mkdir()
    (folder / "a-1-py3-none-any.whl").touch()
    command = place.install_command(rack('runtime = {"wheelhouse": "wheels", "python": "/usr/bin/python3.11"}'), made)
    assert command.startswith("umask 022 && /usr/bin/python3.11 ") and command.endswith(
        " --wheelhouse /opt/steelyard/wheelhouse"
    )


def test_the_installer_takes_that_command_line(tmp_path: Path):
    """For real with a lock file of nothing, from an empty wheelhouse: what it makes is an environment without our source."""
    root = tmp_path / "release"
    (root / "tools").mkdir(parents=True)
    (root / "requirements").mkdir()
    (root / "tools" / "install.py").write_text((ROOT / "tools" / "install.py").read_text())
    (root / "requirements" / "cpu.lock").write_text("")
    (tmp_path / "wheels").mkdir()
    argv = [sys.executable, root / "tools" / "install.py", "cpu", "--runtime-only", "--venv", tmp_path / "venv"]
    for _ in range(2):
        done = subprocess.run([*argv, "--wheelhouse", tmp_path / "wheels"], capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stdout + done.stderr
    assert (
        tmp_path / "venv" / "bin" / "python"
    ).exists() and done.stdout == ""  # the second time there is nothing to do
    (root / "requirements" / "cpu.lock").write_text("idna==3.10 \\\n    --hash=sha256:" + "0" * 64 + "\n")
    done = subprocess.run([*argv, "--wheelhouse", tmp_path / "wheels"], capture_output=True, text=True, timeout=120)
    assert done.returncode == 1 and "error: pip failed" in done.stderr


def test_weights_are_mounted_before_the_unit_starts(rack, tmp_path: Path):
    found = rack('serve = {"profile": "cpu", "drain_s": 100}')
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "a.yaml").write_text("name: a\nversions: [{version: v1, weights: {source: /data/w/a}}]\n")
    text = place.drop_in(load_catalog(found), found, 252)
    assert (
        "[Unit]\nRequiresMountsFor=/data/w/a\n" in text
        and "TimeoutStopSec=160\n" in text
        and "RestartSteps" not in text
    )
    assert "RestartSteps=5\nRestartMaxDelaySec=60" in place.drop_in(load_catalog(found), found, 255)


def test_secrets_agree_with_the_first_machine_that_has_them():
    fresh = place.agreed([{}, {}])
    assert set(fresh) == set(layout.SECRETS) and all(len(v) == 64 for v in fresh.values())
    assert place.agreed([{}, {"ray-token": "t"}])["ray-token"] == "t"
    assert place.agreed([{"ray-token": "head"}, {"ray-token": "t"}])["ray-token"] == "head"


def test_secrets_go_over_stdin_and_only_where_they_differ():
    ran: list[tuple[str, str | None]] = []
    fake = SimpleNamespace(
        run=lambda what, command, stdin=None: ran.append((command, stdin)),
        do=lambda *a, **k: ran.append((str(a), None)),
    )
    place.write_secrets(fake, {"ray-token": "s3cret", "cluster-secret": "same"}, {"cluster-secret": "same"})  # type: ignore[arg-type]
    assert [stdin for _, stdin in ran] == ["s3cret", None]
    assert not [command for command, _ in ran if "s3cret" in command or "same" in command]
    assert ran[0][0].startswith("runuser -u steelyard -- sh -c 'umask 077 && cat > ")
