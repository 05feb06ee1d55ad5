"""GPM figures against loads whose nature is known. What a figure says of an idle GPU, it must not say of a busy one."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from importlib.util import find_spec

import pynvml
import pytest
from prometheus_client.parser import text_string_to_metric_families

from bench.report import gpus
from serving.telemetry.gpu import GpuTelemetry
from serving.telemetry.nvml import driver

SETTLE_S, MEASURED_S = 3.0, 4.0

LOADS = {
    "idle": "pass",
    "matmul": """
        a = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
        step = lambda: torch.matmul(a, a)
    """,
    "copy": """
        a = torch.empty(2**30, device="cuda", dtype=torch.uint8); b = torch.empty_like(a)
        step = lambda: b.copy_(a)
    """,
    # One small kernel after another: what NVML calls 100 % utilisation.
    "trickle": """
        a = torch.zeros(32, device="cuda")
        step = lambda: a.add_(1)
    """,
}


def missing() -> str:
    """What this machine lacks, in one line; empty when nothing."""
    if not gpus():
        return "no GPU: NVML sees none"
    if find_spec("torch") is None:
        return "not installed: torch"
    pynvml.nvmlInit()
    try:
        handle = pynvml.nvmlDeviceGetHandleByIndex(0)
        return (
            "" if pynvml.nvmlGpmQueryDeviceSupport(handle).isSupportedDevice else "the GPU is older than Hopper: no GPM"
        )
    except pynvml.NVMLError as e:
        return f"no GPM: {e}"
    finally:
        pynvml.nvmlShutdown()


pytestmark = [pytest.mark.gpu, pytest.mark.timeout(180), pytest.mark.skipif(bool(missing()), reason=missing() or "-")]


@pytest.fixture(scope="module")
def seen() -> Iterator[dict[str, dict[str, float]]]:
    """GPU 0's figures under each load, measured once."""
    yield {name: figures(load) for name, load in LOADS.items()}


def figures(load: str) -> dict[str, float]:
    """GPU 0's means over `MEASURED_S` of a load that runs in another process."""
    program = f"import sys, torch\nstep = None\n{textwrap.dedent(load)}\nprint('on', flush=True)\n" + textwrap.dedent(
        """
        while step is not None:
            for _ in range(50): step()
            torch.cuda.synchronize()
        sys.stdin.read()
        """
    )
    process = subprocess.Popen(
        [sys.executable, "-c", program],
        env={**os.environ, "CUDA_DEVICE_ORDER": "PCI_BUS_ID", "CUDA_VISIBLE_DEVICES": "0"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None and process.stdout.readline() == "on\n"
        time.sleep(SETTLE_S)
        telemetry = GpuTelemetry(driver())
        telemetry.round()
        time.sleep(MEASURED_S)
        telemetry.round()
        samples = (s for f in text_string_to_metric_families(telemetry.text()) for s in f.samples)
        return {s.name: s.value for s in samples if s.labels.get("index") == "0" and s.labels["mig"] == ""}
    finally:
        process.kill()
        process.communicate()


Seen = dict[str, dict[str, float]]


def test_an_idle_gpu_reads_next_to_nothing(seen: Seen) -> None:
    idle = seen["idle"]
    assert idle["steelyard_gpu_sm_active_ratio"] < 0.02 and idle["steelyard_gpu_tensor_active_ratio"] < 0.02
    assert idle["steelyard_gpu_dram_active_ratio"] < 0.05


def test_a_matrix_product_keeps_the_tensor_cores_busy(seen: Seen) -> None:
    matmul = seen["matmul"]
    assert matmul["steelyard_gpu_tensor_active_ratio"] > 0.5 and matmul["steelyard_gpu_sm_active_ratio"] > 0.8
    assert matmul["steelyard_gpu_power_watts"] > 2 * seen["idle"]["steelyard_gpu_power_watts"]


def test_a_copy_is_bandwidth_and_no_tensor_work(seen: Seen) -> None:
    copy = seen["copy"]
    assert copy["steelyard_gpu_dram_active_ratio"] > 0.6 and copy["steelyard_gpu_tensor_active_ratio"] < 0.02


def test_small_kernels_fill_the_old_figure_and_not_the_chip(seen: Seen) -> None:
    trickle = seen["trickle"]
    assert trickle["steelyard_gpu_kernel_active_ratio"] > 5 * trickle["steelyard_gpu_sm_active_ratio"]
