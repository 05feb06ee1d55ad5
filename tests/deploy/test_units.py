"""The units are what systemd takes, and are shut in."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from serving.settings import Settings
from tests.deploy.init import parse
from tests.stack import ROOT

ALL = sorted((ROOT / "deploy" / "systemd").glob("*.service"))
UNITS = [u for u in ALL if u.stem in ("steelyard-head", "steelyard-worker")]
PROGRAMS = ("/opt/steelyard/venv/bin/python", "/usr/bin/nvidia-modprobe")
needs_systemd = pytest.mark.skipif(
    shutil.which("systemd-analyze") is None, reason="there is no `systemd-analyze` (apt-get install systemd)"
)


@pytest.fixture
def unit(tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    """The unit among the others, as on a machine where its program is there."""
    for file in ALL:
        text = file.read_text()
        assert any(f"ExecStart={p} " in text for p in PROGRAMS)
        for program in PROGRAMS:
            text = text.replace(f"ExecStart={program} ", "ExecStart=/usr/bin/env ")
        (tmp_path / file.name).write_text(text)
    found: Path = tmp_path / request.param.name
    return found


@needs_systemd
@pytest.mark.parametrize("unit", ALL, indirect=True, ids=lambda p: p.name)
def test_systemd_understands_every_line(unit: Path):
    done = subprocess.run(["systemd-analyze", "verify", "--man=no", unit], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout + done.stderr) == (0, "")


@needs_systemd
@pytest.mark.parametrize("unit", ALL, indirect=True, ids=lambda p: p.name)
def test_exposure_is_low(unit: Path):
    argv = ["systemd-analyze", "security", "--offline=true", "--no-pager", unit]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=60)
    found = re.search(r"Overall exposure level for \S+: ([0-9.]+)", done.stdout)
    assert found, done.stdout + done.stderr
    assert float(found[1]) <= 3.0  # 9.6 without any of it


@pytest.mark.parametrize("unit", UNITS, ids=lambda p: p.name)
def test_both_units_differ_in_their_role_only(unit: Path):
    def common(path: Path) -> list[str]:
        lines = [line for line in path.read_text().splitlines() if not line.startswith(("Description=", "#"))]
        return [re.sub(r"node (head|worker)$", "node ROLE", line) for line in lines]

    assert common(unit) == common(UNITS[0])
    assert f"node {unit.stem.removeprefix('steelyard-')}\n" in unit.read_text()


def found_in(name: str) -> dict[str, list[str]]:
    keys: dict[str, list[str]] = {}
    for line in (ROOT / "deploy" / "systemd" / name).read_text().splitlines():
        if line and line[0] not in "#[":
            key, _, value = line.partition("=")
            keys.setdefault(key, []).append(value)
    return keys


def test_stopping_takes_longer_than_draining_and_ends_every_process():
    keys = found_in("steelyard-worker.service")
    assert int(keys["TimeoutStopSec"][0]) > Settings().node_drain_s + 30  # type: ignore[call-arg]
    assert int(keys["TimeoutStartSec"][0]) > Settings().head_wait_s + 60  # type: ignore[call-arg]
    assert (keys["KillMode"], keys["Restart"], keys["StartLimitIntervalSec"]) == (["mixed"], ["always"], ["0"])


def test_gpus_pass_and_nothing_else_does():
    keys = found_in("steelyard-worker.service")
    assert keys["DevicePolicy"] == ["closed"] and "char-nvidia* rw" in keys["DeviceAllow"]
    assert "PrivateDevices" not in keys and "MemoryDenyWriteExecute" not in keys
    assert {
        "nvidia-persistenced.service",
        "nvidia-fabricmanager.service",
        "remote-fs.target",
        "network-online.target",
    } <= {name for line in keys["After"] for name in line.split()}


def test_unified_memory_is_there_before_the_unit_that_may_not_load_it():
    """After a reboot nobody else loads it; where there is no card or no such program, nothing is tried and nothing fails."""
    for unit in UNITS:
        keys = found_in(unit.name)
        for key in ("Wants", "After"):
            assert "steelyard-uvm.service" in {name for line in keys[key] for name in line.split()}
    keys = found_in("steelyard-uvm.service")
    assert set(keys["Before"][0].split()) == {u.name for u in UNITS}
    assert (keys["Type"], keys["RemainAfterExit"]) == (["oneshot"], ["yes"])
    assert keys["ExecStart"] == ["/usr/bin/nvidia-modprobe -u -c0"]
    assert keys["ConditionPathExists"] == ["/usr/bin/nvidia-modprobe"]
    assert keys["ConditionPathExistsGlob"] == ["/sys/bus/pci/drivers/nvidia/*:*"]
    assert "ProtectKernelModules" not in keys and "PrivateDevices" not in keys and "DevicePolicy" not in keys


def test_the_stand_in_reads_a_unit_and_its_drop_ins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("tests.deploy.init.UNITS", tmp_path)
    (tmp_path / "a.service").write_text("[Service]\n# no\nA=1\nB=2\n")
    (tmp_path / "a.service.d").mkdir()
    (tmp_path / "a.service.d" / "x.conf").write_text("[Service]\nA=3\n")
    assert parse("a.service") == {"A": ["1", "3"], "B": ["2"]}
