"""`make gpu-check` keeps the bars of the one table on a real GPU."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from bench.client import ROOT
from bench.report import gpus


def missing() -> str:
    """What this machine lacks, in one line; empty when nothing."""
    if not gpus():
        return "no GPU: NVML sees none"
    absent = [name for name in ("vllm", "ray", "torch") if find_spec(name) is None]
    return f"not installed: {', '.join(absent)}" if absent else ""


@pytest.mark.gpu
@pytest.mark.timeout(600)
@pytest.mark.skipif(bool(missing()), reason=missing() or "-")
def test_an_8b_shape_keeps_the_bars_on_one_gpu(tmp_path: Path) -> None:
    out = tmp_path / "gpu.json"
    command = [sys.executable, "-m", "bench.gpu_check", "--budget-s", "500", "--out", str(out)]
    done = subprocess.run(command, cwd=ROOT, check=False, capture_output=True, text=True, timeout=580)
    assert out.exists(), done.stdout[-4000:] + done.stderr[-2000:]
    missed = [bar for bar in json.loads(out.read_text())["bars"] if not bar["ok"]]
    assert not missed and done.returncode == 0, done.stdout[-6000:]
