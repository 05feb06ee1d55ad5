"""A node of GPUs that follows a script: NVML without a driver, for tests and for simulated stacks.

`STEELYARD_NVML_SCRIPT` names one of `NODES` or a YAML file like this:

    gpus: 8                        # or any of the figures of `Settings` below, for all GPUs
    name: NVIDIA H200
    figures: {sm: [0.2, 0.7, 60], tensor: 0.3, power_w: 430}
    events:                        # at seconds after the start; `gpu` is an index, a list, or left out for all
      - {at: 30, gpu: 3, figures: {temperature_c: 91, throttle: [sw_thermal]}}
      - {at: 60, gpu: 3, xid: 79, lost: true}
      - {at: 90, gpu: 3, lost: false}
      - {at: 120, driver: false}
      - {at: 150, driver: true}

A figure is a number, or [low, high, period in seconds] for a wave between the two. It raises `pynvml`'s own errors and fills
`pynvml`'s own structures.
"""

from __future__ import annotations

import ctypes
import math
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NoReturn

import msgspec
import pynvml
import yaml

from serving.errors import OperatorError
from serving.telemetry.nvml import Handle, Nvml

GIB = 1024**3
Wave = float | tuple[float, float, float]


class Process(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    pid: int
    memory_gib: float


class Figures(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """One GPU at one moment. Shares are 0..1; an idle H200 by default."""

    sm: Wave = 0.0
    occupancy: Wave = 0.0
    tensor: Wave = 0.0
    dram: Wave = 0.0
    kernel: Wave = 0.0
    memory_used_gib: Wave = 0.5
    power_w: Wave = 75.0
    temperature_c: Wave = 32.0
    memory_temperature_c: Wave = 38.0
    sm_clock_mhz: Wave = 345.0
    memory_clock_mhz: Wave = 3201.0
    pcie_tx_mib_s: Wave = 0.0
    pcie_rx_mib_s: Wave = 0.0
    nvlink_tx_mib_s: Wave = 0.0
    nvlink_rx_mib_s: Wave = 0.0
    throttle: tuple[str, ...] = ()  # reasons as the exporter names them
    processes: tuple[Process, ...] = ()
    ecc_corrected: int = 0
    ecc_uncorrected: int = 0
    remapped_correctable: int = 0
    remapped_uncorrectable: int = 0
    remap_pending: bool = False
    remap_failed: bool = False
    pcie_replays: int = 0
    nvlink_replays: int = 0
    recovery_action: int = 0


class Event(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Something that happens `at` seconds after the start and stays so."""

    at: float
    gpu: int | tuple[int, ...] | None = None
    figures: dict[str, Any] = {}
    xid: int | None = None
    lost: bool | None = None
    driver: bool | None = None


class Script(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A node."""

    gpus: int = 8
    name: str = "NVIDIA H200"
    driver: str = "580.95.05"
    memory_gib: float = 140.4
    reserved_gib: float = 0.6
    power_limit_w: float = 700.0
    gpm: bool = True
    mig: tuple[tuple[int, int], ...] = ()  # of every GPU: (GPU instance id, slices of 7)
    figures: Figures = Figures()
    events: tuple[Event, ...] = ()
    unsupported: tuple[str, ...] = ()  # NVML functions that this product lacks

    @property
    def units(self) -> int:
        """What replicas can hold: GPUs, or their MIG instances."""
        return self.gpus * max(1, len(self.mig))


_SERVING = Figures(  # a decode loop: kernels run all the time, a third of the chip works
    sm=(0.25, 0.65, 60),
    occupancy=(0.10, 0.25, 60),
    tensor=(0.05, 0.30, 60),
    dram=(0.30, 0.70, 60),
    kernel=1.0,
    memory_used_gib=126.0,
    power_w=(320.0, 560.0, 60),
    temperature_c=(48.0, 61.0, 300),
    memory_temperature_c=(58.0, 72.0, 300),
    sm_clock_mhz=1980.0,
    pcie_tx_mib_s=(20.0, 60.0, 30),
    pcie_rx_mib_s=(20.0, 60.0, 30),
)

NODES: dict[str, Script] = {
    "h200x8": Script(figures=_SERVING),
    "h200x8-mig": Script(figures=_SERVING, mig=((7, 1), (8, 1), (9, 1), (3, 2), (5, 2))),
    "a100x8": Script(figures=_SERVING, name="NVIDIA A100-SXM4-80GB", memory_gib=80.0, power_limit_w=400.0, gpm=False),
}


def load(script: str, clock: Callable[[], float] = time.monotonic) -> Nvml:
    """The node of `NODES` or of the YAML file that `script` names."""
    return ScriptedNvml(read(script), clock)


def read(script: str) -> Script:
    if script in NODES:
        return NODES[script]
    where = f"STEELYARD_NVML_SCRIPT={script}"
    try:
        found = msgspec.convert(yaml.safe_load(Path(script).read_text()) or {}, Script)
        for event in found.events:
            _with(found.figures, event.figures)
            gpus = (event.gpu,) if isinstance(event.gpu, int) else event.gpu or ()
            if any(not 0 <= i < found.gpus for i in gpus):
                raise OperatorError(f"{where}: an event names GPU {event.gpu}", f"there are {found.gpus}, from 0")
    except OSError as e:
        raise OperatorError(f"{where}: {e.strerror}", f"name a file, or one of {', '.join(NODES)}") from None
    except (yaml.YAMLError, msgspec.ValidationError) as e:
        raise OperatorError(f"{where}: {e}", "correct the file") from None
    return found


def _with(figures: Figures, changes: dict[str, Any]) -> Figures:
    return msgspec.convert(msgspec.structs.asdict(figures) | changes, Figures)


class _Gpu:
    """A GPU's state, and what it has counted."""

    def __init__(self, index: int, script: Script, address: int) -> None:
        self.index = index
        self.uuid = f"GPU-{index:08x}-5c71-4ed0-8000-{0x57EE1000 + index:012x}"
        self.figures = script.figures
        self.lost = False
        self.handle = _pointer(address, pynvml.c_nvmlDevice_t)
        self.instances = [
            (i, slices, f"MIG-{index:08x}-{i:04x}-4ed0-8000-{0x57EE1000 + index:012x}", _pointer(address + 1 + i))
            for i, slices in script.mig
        ]
        self.joules = 0.0
        self.throttled_s: Counter[str] = Counter()


class ScriptedNvml:
    """`nvml.Nvml` on a script."""

    def __init__(self, script: Script, clock: Callable[[], float] = time.monotonic) -> None:
        self._script = script
        self._clock = clock
        self._began = self._at = clock()
        self._left = sorted(script.events, key=lambda e: e.at)
        self._gpus = [_Gpu(i, script, 0x1000 * (i + 1)) for i in range(script.gpus)]
        self._driver = True
        self._inits = 0
        self._xids: list[tuple[_Gpu, int]] = []
        self._watching: set[int] = set()
        self._counted: list[_Gpu] = []  # those that the driver found when it was opened
        self._samples: dict[int, tuple[float, _Gpu]] = {}  # address -> when, of what
        self._next_sample = 0x100000
        self.calls: Counter[str] = Counter()

    # -- the script ------------------------------------------------------------------------------------------------

    def _now(self, function: str) -> float:
        """Plays what is due; raises what this call would."""
        self.calls[function] += 1
        now = self._clock()
        while self._left and self._began + self._left[0].at <= now:
            event = self._left.pop(0)
            self._pass(self._began + event.at)
            self._play(event)
        self._pass(now)
        if function in self._script.unsupported:
            _fail(pynvml.NVML_ERROR_NOT_SUPPORTED)
        if not self._driver:
            _fail(pynvml.NVML_ERROR_DRIVER_NOT_LOADED)
        if not self._inits and function != "nvmlInit":
            _fail(pynvml.NVML_ERROR_UNINITIALIZED)
        return now

    def _pass(self, until: float) -> None:
        passed = until - self._at
        if passed > 0:
            self._at = until
            for gpu in self._gpus:
                gpu.joules += self._value(gpu.figures.power_w) * passed
                gpu.throttled_s.update({reason: passed for reason in gpu.figures.throttle})

    def _play(self, event: Event) -> None:
        chosen = range(len(self._gpus)) if event.gpu is None else event.gpu
        for i in (chosen,) if isinstance(chosen, int) else chosen:
            gpu = self._gpus[i]
            gpu.figures = _with(gpu.figures, event.figures)
            gpu.lost = gpu.lost if event.lost is None else event.lost
            if event.xid is not None and i in self._watching:
                self._xids.append((gpu, event.xid))
        if event.driver is not None:
            self._driver = event.driver
            self._inits = 0

    def _value(self, wave: Wave, at: float | None = None) -> float:
        if not isinstance(wave, tuple):
            return wave
        low, high, period = wave
        passed = (self._at if at is None else at) - self._began
        return low + (high - low) * (1 - math.cos(2 * math.pi * passed / period)) / 2

    def _gpu(self, function: str, handle: Handle) -> _Gpu:
        """The physical GPU of a handle, its own or an instance's."""
        self._now(function)
        address = _address(handle)
        gpu = self._gpus[address // 0x1000 - 1]
        if gpu.lost:
            _fail(pynvml.NVML_ERROR_GPU_IS_LOST)
        return gpu

    def _instance(self, handle: Handle) -> tuple[int, int, str] | None:
        """GPU instance id, slices and UUID; None for a physical GPU."""
        address = _address(handle)
        gpu = self._gpus[address // 0x1000 - 1]
        return next(((i, n, uuid) for i, n, uuid, h in gpu.instances if _address(h) == address), None)

    # -- NVML ------------------------------------------------------------------------------------------------------

    def nvmlInit(self) -> None:
        self._now("nvmlInit")
        self._inits += 1
        self._counted = [g for g in self._gpus if not g.lost]

    def nvmlShutdown(self) -> None:
        self._now("nvmlShutdown")
        self._inits -= 1
        self._watching.clear()

    def nvmlSystemGetDriverVersion(self) -> str:
        self._now("nvmlSystemGetDriverVersion")
        return self._script.driver

    def nvmlDeviceGetCount(self) -> int:
        self._now("nvmlDeviceGetCount")
        return len(self._counted)

    def nvmlDeviceGetHandleByIndex(self, index: int) -> Handle:
        self._now("nvmlDeviceGetHandleByIndex")
        if not 0 <= index < len(self._counted):
            _fail(pynvml.NVML_ERROR_INVALID_ARGUMENT)
        return self._counted[index].handle

    def nvmlDeviceGetUUID(self, handle: Handle) -> str:
        gpu, instance = self._gpu("nvmlDeviceGetUUID", handle), self._instance(handle)
        return gpu.uuid if instance is None else instance[2]

    def nvmlDeviceGetMinorNumber(self, handle: Handle) -> int:
        return self._gpu("nvmlDeviceGetMinorNumber", handle).index

    def nvmlDeviceGetName(self, handle: Handle) -> str:
        self._gpu("nvmlDeviceGetName", handle)
        instance = self._instance(handle)
        if instance is None:
            return self._script.name
        return f"{self._script.name} MIG {instance[1]}g.{self._script.memory_gib / 8 * instance[1]:.0f}gb"

    def nvmlDeviceGetMigMode(self, device: Handle) -> Sequence[int]:
        self._gpu("nvmlDeviceGetMigMode", device)
        on = int(bool(self._script.mig))
        return [on, on]

    def nvmlDeviceGetMaxMigDeviceCount(self, device: Handle) -> int:
        self._gpu("nvmlDeviceGetMaxMigDeviceCount", device)
        return 7

    def nvmlDeviceGetMigDeviceHandleByIndex(self, device: Handle, index: int) -> Handle:
        gpu = self._gpu("nvmlDeviceGetMigDeviceHandleByIndex", device)
        if index >= len(gpu.instances):
            _fail(pynvml.NVML_ERROR_NOT_FOUND)
        return gpu.instances[index][3]

    def nvmlDeviceGetGpuInstanceId(self, device: Handle) -> int:
        self._gpu("nvmlDeviceGetGpuInstanceId", device)
        return self._of_instance(device)[0]

    def nvmlDeviceGetAttributes(self, device: Handle) -> Any:
        self._gpu("nvmlDeviceGetAttributes", device)
        return SimpleNamespace(gpuInstanceSliceCount=self._of_instance(device)[1])

    def _of_instance(self, handle: Handle) -> tuple[int, int, str]:
        return self._instance(handle) or _fail(pynvml.NVML_ERROR_INVALID_ARGUMENT)

    def nvmlDeviceGetMemoryInfo(self, handle: Handle, version: int | None = None) -> Any:
        gpu, instance = self._gpu("nvmlDeviceGetMemoryInfo", handle), self._instance(handle)
        share = 1.0 if instance is None else instance[1] / 8
        used = self._value(gpu.figures.memory_used_gib) * share
        total, reserved = self._script.memory_gib * share, self._script.reserved_gib * share
        bytes_of = {"total": total, "used": used, "reserved": reserved, "free": total - used - reserved}
        return SimpleNamespace(**{name: round(gib * GIB) for name, gib in bytes_of.items()})

    def nvmlDeviceGetUtilizationRates(self, handle: Handle) -> Any:
        gpu = self._gpu("nvmlDeviceGetUtilizationRates", handle)
        if self._script.mig:
            _fail(pynvml.NVML_ERROR_NOT_SUPPORTED)
        figures = gpu.figures
        return SimpleNamespace(
            gpu=round(self._value(figures.kernel) * 100), memory=round(self._value(figures.dram) * 100)
        )

    def nvmlDeviceGetPowerUsage(self, handle: Handle) -> int:
        return round(self._value(self._gpu("nvmlDeviceGetPowerUsage", handle).figures.power_w) * 1000)

    def nvmlDeviceGetEnforcedPowerLimit(self, handle: Handle) -> int:
        self._gpu("nvmlDeviceGetEnforcedPowerLimit", handle)
        return round(self._script.power_limit_w * 1000)

    def nvmlDeviceGetTotalEnergyConsumption(self, handle: Handle) -> int:
        return round(self._gpu("nvmlDeviceGetTotalEnergyConsumption", handle).joules * 1000)

    def nvmlDeviceGetTemperature(self, handle: Handle, sensor: int) -> int:
        return round(self._value(self._gpu("nvmlDeviceGetTemperature", handle).figures.temperature_c))

    def nvmlDeviceGetClockInfo(self, handle: Handle, type: int) -> int:
        figures = self._gpu("nvmlDeviceGetClockInfo", handle).figures
        return round(self._value(figures.memory_clock_mhz if type == pynvml.NVML_CLOCK_MEM else figures.sm_clock_mhz))

    def nvmlDeviceGetMaxClockInfo(self, handle: Handle, type: int) -> int:
        self._gpu("nvmlDeviceGetMaxClockInfo", handle)
        return 3201 if type == pynvml.NVML_CLOCK_MEM else 1980

    def nvmlDeviceGetCurrentClocksEventReasons(self, handle: Handle) -> int:
        reasons = self._gpu("nvmlDeviceGetCurrentClocksEventReasons", handle).figures.throttle
        return sum(_THROTTLE[reason] for reason in set(reasons))

    def nvmlDeviceGetPcieThroughput(self, device: Handle, counter: int) -> int:
        figures = self._gpu("nvmlDeviceGetPcieThroughput", device).figures
        sent = counter == pynvml.NVML_PCIE_UTIL_TX_BYTES
        return round(self._value(figures.pcie_tx_mib_s if sent else figures.pcie_rx_mib_s) * 1024)

    def nvmlDeviceGetComputeRunningProcesses(self, handle: Handle) -> Sequence[Any]:
        found = self._gpu("nvmlDeviceGetComputeRunningProcesses", handle).figures.processes
        return [SimpleNamespace(pid=p.pid, usedGpuMemory=round(p.memory_gib * GIB)) for p in found]

    def nvmlDeviceGetFieldValues(self, handle: Handle, fieldIds: Sequence[Any]) -> Sequence[Any]:
        gpu = self._gpu("nvmlDeviceGetFieldValues", handle)
        known = self._fields(gpu) | self._links(gpu)
        answers: Sequence[Any] = (pynvml.c_nvmlFieldValue_t * len(fieldIds))()
        for answer, field in zip(answers, fieldIds, strict=True):
            answer.fieldId, answer.scopeId = field
            if field in known:
                answer.nvmlReturn, answer.valueType = pynvml.NVML_SUCCESS, pynvml.NVML_VALUE_TYPE_UNSIGNED_LONG_LONG
                answer.value.ullVal = round(known[field])
            else:
                answer.nvmlReturn = pynvml.NVML_ERROR_NOT_SUPPORTED
        return answers

    def _links(self, gpu: _Gpu) -> dict[tuple[int, int], float]:
        """As Hopper has them: counters of each link, and zeroes in the totals of before."""
        replays = gpu.figures.nvlink_replays
        total = pynvml.NVML_FI_DEV_NVLINK_REPLAY_ERROR_COUNT_TOTAL, 0
        if not self._script.gpm:
            return {total: replays}
        links = {(pynvml.NVML_FI_DEV_NVLINK_ERROR_DL_REPLAY, link): 0.0 for link in range(18)}
        links[pynvml.NVML_FI_DEV_NVLINK_ERROR_DL_REPLAY, 3] = replays - replays // 2
        links[pynvml.NVML_FI_DEV_NVLINK_ERROR_DL_REPLAY, 17] = replays // 2
        return links | {total: 0.0}

    def _fields(self, gpu: _Gpu) -> dict[tuple[int, int], float]:
        f, held = gpu.figures, gpu.throttled_s
        found = {
            pynvml.NVML_FI_DEV_MEMORY_TEMP: self._value(f.memory_temperature_c),
            pynvml.NVML_FI_DEV_PERF_POLICY_POWER: held["power_cap"] * 1e9,
            pynvml.NVML_FI_DEV_PERF_POLICY_THERMAL: (held["sw_thermal"] + held["hw_thermal"]) * 1e9,
            pynvml.NVML_FI_DEV_PERF_POLICY_SYNC_BOOST: held["sync_boost"] * 1e9,
            pynvml.NVML_FI_DEV_PCIE_REPLAY_COUNTER: f.pcie_replays,
            pynvml.NVML_FI_DEV_ECC_SBE_VOL_TOTAL: f.ecc_corrected,
            pynvml.NVML_FI_DEV_ECC_DBE_VOL_TOTAL: f.ecc_uncorrected,
            pynvml.NVML_FI_DEV_ECC_SBE_AGG_TOTAL: f.ecc_corrected,
            pynvml.NVML_FI_DEV_ECC_DBE_AGG_TOTAL: f.ecc_uncorrected,
            pynvml.NVML_FI_DEV_REMAPPED_COR: f.remapped_correctable,
            pynvml.NVML_FI_DEV_REMAPPED_UNC: f.remapped_uncorrectable,
            pynvml.NVML_FI_DEV_REMAPPED_PENDING: f.remap_pending,
            pynvml.NVML_FI_DEV_REMAPPED_FAILURE: f.remap_failed,
            pynvml.NVML_FI_DEV_GET_GPU_RECOVERY_ACTION: f.recovery_action,
        }
        return {(field, 0): value for field, value in found.items()}

    def nvmlGpmQueryDeviceSupport(self, device: Handle) -> Any:
        self._gpu("nvmlGpmQueryDeviceSupport", device)
        return SimpleNamespace(isSupportedDevice=int(self._script.gpm))

    def nvmlGpmSampleAlloc(self) -> Handle:
        self._now("nvmlGpmSampleAlloc")
        self._next_sample += 1
        return _pointer(self._next_sample, pynvml.c_nvmlGpmSample_t)

    def nvmlGpmSampleFree(self, gpmSample: Handle) -> None:
        self.calls["nvmlGpmSampleFree"] += 1
        self._samples.pop(_address(gpmSample), None)

    def nvmlGpmSampleGet(self, device: Handle, gpmSample: Handle) -> Handle:
        gpu = self._gpu("nvmlGpmSampleGet", device)
        if not self._script.gpm:
            _fail(pynvml.NVML_ERROR_NOT_SUPPORTED)
        self._samples[_address(gpmSample)] = (self._at, gpu)
        return gpmSample

    def nvmlGpmMigSampleGet(self, device: Handle, gpuInstanceId: int, gpmSample: Handle) -> Handle:
        gpu = self._gpu("nvmlGpmMigSampleGet", device)
        if all(i != gpuInstanceId for i, *_ in gpu.instances):
            _fail(pynvml.NVML_ERROR_INVALID_ARGUMENT)
        self._samples[_address(gpmSample)] = (self._at, gpu)
        return gpmSample

    def nvmlGpmMetricsGet(self, metricsGet: Any) -> Any:
        self._now("nvmlGpmMetricsGet")
        (began, gpu), (ended, other) = (self._samples[_address(s)] for s in (metricsGet.sample1, metricsGet.sample2))
        if gpu is not other or ended - began < 0.1:  # the hardware's shortest interval
            _fail(pynvml.NVML_ERROR_INVALID_ARGUMENT)
        middle, f = (began + ended) / 2, gpu.figures
        known = {
            pynvml.NVML_GPM_METRIC_GRAPHICS_UTIL: self._value(f.kernel, middle) * 100,
            pynvml.NVML_GPM_METRIC_SM_UTIL: self._value(f.sm, middle) * 100,
            pynvml.NVML_GPM_METRIC_SM_OCCUPANCY: self._value(f.occupancy, middle) * 100,
            pynvml.NVML_GPM_METRIC_ANY_TENSOR_UTIL: self._value(f.tensor, middle) * 100,
            pynvml.NVML_GPM_METRIC_DRAM_BW_UTIL: self._value(f.dram, middle) * 100,
            pynvml.NVML_GPM_METRIC_PCIE_TX_PER_SEC: self._value(f.pcie_tx_mib_s, middle),
            pynvml.NVML_GPM_METRIC_PCIE_RX_PER_SEC: self._value(f.pcie_rx_mib_s, middle),
            pynvml.NVML_GPM_METRIC_NVLINK_TOTAL_TX_PER_SEC: self._value(f.nvlink_tx_mib_s, middle),
            pynvml.NVML_GPM_METRIC_NVLINK_TOTAL_RX_PER_SEC: self._value(f.nvlink_rx_mib_s, middle),
        }
        for metric in metricsGet.metrics[: metricsGet.numMetrics]:
            found = known.get(metric.metricId)
            metric.nvmlReturn = pynvml.NVML_ERROR_NOT_SUPPORTED if found is None else pynvml.NVML_SUCCESS
            metric.value = found or 0.0
        return metricsGet

    def nvmlEventSetCreate(self) -> Handle:
        self._now("nvmlEventSetCreate")
        return _pointer(0xE000000, pynvml.c_nvmlEventSet_t)

    def nvmlEventSetFree(self, eventSet: Handle) -> None:
        self._now("nvmlEventSetFree")
        self._watching.clear()

    def nvmlDeviceRegisterEvents(self, handle: Handle, eventTypes: int, eventSet: Handle) -> None:
        gpu = self._gpu("nvmlDeviceRegisterEvents", handle)
        if eventTypes & pynvml.nvmlEventTypeXidCriticalError:
            self._watching.add(gpu.index)

    def nvmlEventSetWait_v2(self, eventSet: Handle, timeoutms: int) -> Any:
        self._now("nvmlEventSetWait_v2")
        if not self._xids:
            _fail(pynvml.NVML_ERROR_TIMEOUT)
        gpu, xid = self._xids.pop(0)
        data = pynvml.c_nvmlEventData_t()
        data.device, data.eventData = gpu.handle, xid
        data.eventType = pynvml.nvmlEventTypeXidCriticalError
        data.gpuInstanceId = data.computeInstanceId = 0xFFFFFFFF  # not of one instance
        return data


_THROTTLE: dict[str, int] = {
    "power_cap": pynvml.nvmlClocksEventReasonSwPowerCap,
    "hw_slowdown": pynvml.nvmlClocksEventReasonHwSlowdown,
    "sync_boost": pynvml.nvmlClocksEventReasonSyncBoost,
    "sw_thermal": pynvml.nvmlClocksEventReasonSwThermalSlowdown,
    "hw_thermal": pynvml.nvmlClocksEventReasonHwThermalSlowdown,
    "hw_power_brake": pynvml.nvmlClocksEventReasonHwPowerBrakeSlowdown,
}


def _fail(code: int) -> NoReturn:
    raise pynvml.NVMLError(code)


def _pointer(address: int, kind: Any = pynvml.c_nvmlDevice_t) -> Handle:
    return ctypes.cast(address, kind)


def _address(handle: Handle) -> int:
    return ctypes.cast(handle, ctypes.c_void_p).value or 0
