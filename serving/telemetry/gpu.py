"""GPUs of one node as Prometheus text: `GpuTelemetry.round` reads NVML, `text` renders what the last round found.

On Hopper and later the headline figures are GPM's (SM activity, occupancy, tensor activity, DRAM bandwidth), means over
the time between two rounds. The utilisation that NVML is known for says only that some kernel ran, reads 100 % in any
decode loop, and is named so. docs/gpu.md tells what each figure means.

What a GPU or a driver does not have has no series. A GPU that answers nothing is `steelyard_gpu_up 0`; its GPUs and
the driver are looked for again until they are back. Every gauge says which replica of which version holds its GPU.
"""

from __future__ import annotations

import contextlib
import ctypes
import logging
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import pynvml
from prometheus_client import CollectorRegistry, disable_created_metrics, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

from serving.telemetry.metrics import process_metrics
from serving.telemetry.nvml import Handle, Nvml

log = logging.getLogger(__name__)

T = TypeVar("T")

SLOW_EVERY_S = 10.0  # of what changes slowly or costs more: errors, clocks, temperatures, processes
REOPEN_FIRST_S, REOPEN_LONGEST_S = 30.0, 120.0  # while the driver or a GPU is away, it is looked for; doubles
STALE_S = 15.0  # a call that hangs: older values are not shown
WORKS = 0.01  # mean SM activity beyond which a GPU does something
PROCESSES_KEPT = 32  # per GPU

_MIB = 1024 * 1024
_HOST_PID_NAMESPACE = "pid:[4026531836]"  # the kernel's fixed number of the first one


class Figure(NamedTuple):
    """One family. Its labels come after those of `UNIT`, and of `HOLDER` where it has them."""

    help: str
    kind: str = "gauge"  # or counter
    labels: tuple[str, ...] = ()

    @property
    def held(self) -> bool:
        """Whether its series name the holder. A counter is the GPU's own: a series that ended when its holder died of
        what it counts, and began again under another one, would show no increase."""
        return self.kind == "gauge"


UNIT = ("gpu", "index", "mig", "name")  # which GPU or MIG instance, by UUID
HOLDER = ("model", "version", "replica")  # several are joined by commas, empty is nobody

FIGURES: dict[str, Figure] = {
    "steelyard_gpu_up": Figure("1 while the GPU answers, 0 when it is lost or its driver is away."),
    "steelyard_gpu_info": Figure("Always 1; names the driver.", labels=("driver",)),
    "steelyard_gpu_sm_active_ratio": Figure(
        "Mean share of the SMs that had work (GPM; Hopper and later). The headline figure."
    ),
    "steelyard_gpu_sm_occupancy_ratio": Figure("Warps in flight of those that the SMs can hold (GPM)."),
    "steelyard_gpu_tensor_active_ratio": Figure("Share of time in which the tensor cores computed (GPM)."),
    "steelyard_gpu_dram_active_ratio": Figure("Memory bandwidth used of what the GPU has (GPM)."),
    "steelyard_gpu_kernel_active_ratio": Figure(
        "Share of time in which any kernel ran, however small: NVML's utilisation. It reads 1 in any decode loop."
    ),
    "steelyard_gpu_memory_used_bytes": Figure("Memory that processes have."),
    "steelyard_gpu_memory_total_bytes": Figure("Memory of the GPU or MIG instance."),
    "steelyard_gpu_memory_reserved_bytes": Figure("Memory that the driver keeps for itself."),
    "steelyard_gpu_process_memory_bytes": Figure("Memory of one process.", labels=("pid", "process")),
    "steelyard_gpu_power_watts": Figure("Power drawn."),
    "steelyard_gpu_power_limit_watts": Figure("Power at which the driver throttles."),
    "steelyard_gpu_energy_joules_total": Figure("Energy since the driver was loaded.", "counter"),
    "steelyard_gpu_temperature_celsius": Figure("Temperature of the chip (gpu) and of its memory.", labels=("sensor",)),
    "steelyard_gpu_clock_hertz": Figure("Clock now.", labels=("clock",)),
    "steelyard_gpu_clock_max_hertz": Figure("Highest clock of the product.", labels=("clock",)),
    "steelyard_gpu_throttled": Figure("1 while the clocks are held down for this reason.", labels=("reason",)),
    "steelyard_gpu_throttled_seconds_total": Figure(
        "Time in which the clocks were held down for this reason, since the driver was loaded.", "counter", ("reason",)
    ),
    "steelyard_gpu_pcie_bytes_per_second": Figure("PCIe traffic: tx leaves the GPU.", labels=("direction",)),
    "steelyard_gpu_pcie_errors_total": Figure("PCIe errors and replays.", "counter", ("kind",)),
    "steelyard_gpu_nvlink_bytes_per_second": Figure("NVLink traffic of all links (GPM).", labels=("direction",)),
    "steelyard_gpu_nvlink_errors_total": Figure("NVLink errors of all links.", "counter", ("kind",)),
    "steelyard_gpu_ecc_errors_total": Figure(
        "Memory errors: volatile ones since the driver was loaded, aggregate ones in the GPU's life.",
        "counter",
        ("severity", "scope"),
    ),
    "steelyard_gpu_remapped_rows": Figure("Memory rows replaced by spare ones.", labels=("kind",)),
    "steelyard_gpu_row_remap_pending": Figure("1 when a remap waits for a reset of the GPU."),
    "steelyard_gpu_row_remap_failed": Figure("1 when no spare row was left: replace the GPU."),
    "steelyard_gpu_recovery_action": Figure(
        "What the driver asks for: 0 nothing, 1 reset, 2 reboot, 3 drain peers, 4 drain and reset."
    ),
    "steelyard_gpu_xid_errors_total": Figure("XID errors since the exporter started.", "counter", ("xid",)),
    "steelyard_gpu_last_xid": Figure("The last of them; 0 when there was none."),
}

_GPM: dict[int, tuple[str, tuple[str, ...], float]] = {  # metric -> figure, labels, factor
    pynvml.NVML_GPM_METRIC_SM_UTIL: ("steelyard_gpu_sm_active_ratio", (), 0.01),
    pynvml.NVML_GPM_METRIC_SM_OCCUPANCY: ("steelyard_gpu_sm_occupancy_ratio", (), 0.01),
    pynvml.NVML_GPM_METRIC_ANY_TENSOR_UTIL: ("steelyard_gpu_tensor_active_ratio", (), 0.01),
    pynvml.NVML_GPM_METRIC_DRAM_BW_UTIL: ("steelyard_gpu_dram_active_ratio", (), 0.01),
    pynvml.NVML_GPM_METRIC_GRAPHICS_UTIL: ("steelyard_gpu_kernel_active_ratio", (), 0.01),
    pynvml.NVML_GPM_METRIC_PCIE_TX_PER_SEC: ("steelyard_gpu_pcie_bytes_per_second", ("tx",), _MIB),
    pynvml.NVML_GPM_METRIC_PCIE_RX_PER_SEC: ("steelyard_gpu_pcie_bytes_per_second", ("rx",), _MIB),
    pynvml.NVML_GPM_METRIC_NVLINK_TOTAL_TX_PER_SEC: ("steelyard_gpu_nvlink_bytes_per_second", ("tx",), _MIB),
    pynvml.NVML_GPM_METRIC_NVLINK_TOTAL_RX_PER_SEC: ("steelyard_gpu_nvlink_bytes_per_second", ("rx",), _MIB),
}
_GPM_RATIOS_OF_MIG = (  # an instance has no links of its own
    pynvml.NVML_GPM_METRIC_GRAPHICS_UTIL,
    pynvml.NVML_GPM_METRIC_SM_UTIL,
    pynvml.NVML_GPM_METRIC_SM_OCCUPANCY,
    pynvml.NVML_GPM_METRIC_ANY_TENSOR_UTIL,
    pynvml.NVML_GPM_METRIC_DRAM_BW_UTIL,
)

_NS = 1e-9
_FIELDS: dict[int, tuple[str, tuple[str, ...], float]] = {  # read in one call; likewise
    pynvml.NVML_FI_DEV_MEMORY_TEMP: ("steelyard_gpu_temperature_celsius", ("memory",), 1),
    pynvml.NVML_FI_DEV_PERF_POLICY_POWER: ("steelyard_gpu_throttled_seconds_total", ("power_cap",), _NS),
    pynvml.NVML_FI_DEV_PERF_POLICY_THERMAL: ("steelyard_gpu_throttled_seconds_total", ("thermal",), _NS),
    pynvml.NVML_FI_DEV_PERF_POLICY_SYNC_BOOST: ("steelyard_gpu_throttled_seconds_total", ("sync_boost",), _NS),
    pynvml.NVML_FI_DEV_PERF_POLICY_BOARD_LIMIT: ("steelyard_gpu_throttled_seconds_total", ("board_limit",), _NS),
    pynvml.NVML_FI_DEV_PERF_POLICY_RELIABILITY: ("steelyard_gpu_throttled_seconds_total", ("reliability",), _NS),
    pynvml.NVML_FI_DEV_PCIE_REPLAY_COUNTER: ("steelyard_gpu_pcie_errors_total", ("replay",), 1),
    pynvml.NVML_FI_DEV_PCIE_COUNT_CORRECTABLE_ERRORS: ("steelyard_gpu_pcie_errors_total", ("correctable",), 1),
    pynvml.NVML_FI_DEV_PCIE_COUNT_NON_FATAL_ERROR: ("steelyard_gpu_pcie_errors_total", ("non_fatal",), 1),
    pynvml.NVML_FI_DEV_PCIE_COUNT_FATAL_ERROR: ("steelyard_gpu_pcie_errors_total", ("fatal",), 1),
    pynvml.NVML_FI_DEV_ECC_SBE_VOL_TOTAL: ("steelyard_gpu_ecc_errors_total", ("corrected", "volatile"), 1),
    pynvml.NVML_FI_DEV_ECC_DBE_VOL_TOTAL: ("steelyard_gpu_ecc_errors_total", ("uncorrected", "volatile"), 1),
    pynvml.NVML_FI_DEV_ECC_SBE_AGG_TOTAL: ("steelyard_gpu_ecc_errors_total", ("corrected", "aggregate"), 1),
    pynvml.NVML_FI_DEV_ECC_DBE_AGG_TOTAL: ("steelyard_gpu_ecc_errors_total", ("uncorrected", "aggregate"), 1),
    pynvml.NVML_FI_DEV_REMAPPED_COR: ("steelyard_gpu_remapped_rows", ("correctable",), 1),
    pynvml.NVML_FI_DEV_REMAPPED_UNC: ("steelyard_gpu_remapped_rows", ("uncorrectable",), 1),
    pynvml.NVML_FI_DEV_REMAPPED_PENDING: ("steelyard_gpu_row_remap_pending", (), 1),
    pynvml.NVML_FI_DEV_REMAPPED_FAILURE: ("steelyard_gpu_row_remap_failed", (), 1),
    pynvml.NVML_FI_DEV_GET_GPU_RECOVERY_ACTION: ("steelyard_gpu_recovery_action", (), 1),
}
# Hopper answers the old totals with zeroes, whatever went wrong; its own counters are of each link, the field's scope.
_NVLINK_TOTALS: dict[int, tuple[str, tuple[str, ...], float]] = {
    pynvml.NVML_FI_DEV_NVLINK_CRC_FLIT_ERROR_COUNT_TOTAL: ("steelyard_gpu_nvlink_errors_total", ("crc_flit",), 1),
    pynvml.NVML_FI_DEV_NVLINK_CRC_DATA_ERROR_COUNT_TOTAL: ("steelyard_gpu_nvlink_errors_total", ("crc_data",), 1),
    pynvml.NVML_FI_DEV_NVLINK_REPLAY_ERROR_COUNT_TOTAL: ("steelyard_gpu_nvlink_errors_total", ("replay",), 1),
    pynvml.NVML_FI_DEV_NVLINK_RECOVERY_ERROR_COUNT_TOTAL: ("steelyard_gpu_nvlink_errors_total", ("recovery",), 1),
    pynvml.NVML_FI_DEV_NVLINK_ECC_DATA_ERROR_COUNT_TOTAL: ("steelyard_gpu_nvlink_errors_total", ("ecc_data",), 1),
}
_NVLINK_OF_LINKS: dict[int, tuple[str, tuple[str, ...], float]] = {
    pynvml.NVML_FI_DEV_NVLINK_ERROR_DL_CRC: ("steelyard_gpu_nvlink_errors_total", ("crc",), 1),
    pynvml.NVML_FI_DEV_NVLINK_ERROR_DL_REPLAY: ("steelyard_gpu_nvlink_errors_total", ("replay",), 1),
    pynvml.NVML_FI_DEV_NVLINK_ERROR_DL_RECOVERY: ("steelyard_gpu_nvlink_errors_total", ("recovery",), 1),
}
_MEANS = _FIELDS | _NVLINK_TOTALS | _NVLINK_OF_LINKS
_VALUE_OF_TYPE = ("dVal", "uiVal", "ulVal", "ullVal", "sllVal", "siVal", "usVal")  # by NVML_VALUE_TYPE_*

_CLOCKS = {
    "graphics": pynvml.NVML_CLOCK_GRAPHICS,
    "sm": pynvml.NVML_CLOCK_SM,
    "memory": pynvml.NVML_CLOCK_MEM,
    "video": pynvml.NVML_CLOCK_VIDEO,
}
# Without those that are no trouble: an idle GPU, clocks that an operator set, a display.
THROTTLE = {
    "power_cap": pynvml.nvmlClocksEventReasonSwPowerCap,
    "hw_slowdown": pynvml.nvmlClocksEventReasonHwSlowdown,
    "sync_boost": pynvml.nvmlClocksEventReasonSyncBoost,
    "sw_thermal": pynvml.nvmlClocksEventReasonSwThermalSlowdown,
    "hw_thermal": pynvml.nvmlClocksEventReasonHwThermalSlowdown,
    "hw_power_brake": pynvml.nvmlClocksEventReasonHwPowerBrakeSlowdown,
}
# What an operator must know of the number; NVIDIA's XID catalogue has the rest.
XIDS = {
    13: "an engine's kernel failed",
    31: "an engine's kernel touched memory that is not its own",
    43: "an engine's kernel was stopped",
    45: "an engine's work was removed",
    48: "an uncorrectable memory error",
    63: "a memory row will be replaced at the next reset",
    64: "a memory row could not be replaced",
    74: "an NVLink error",
    79: "the GPU has fallen off the bus",
    92: "many corrected memory errors",
    94: "a contained memory error: the process that met it ended",
    95: "an uncontained memory error: reset the GPU",
    119: "the GPU's system processor does not answer",
    120: "the GPU's system processor failed",
}

# A driver that is away for all GPUs, and a GPU that is away alone.
_AWAY = frozenset(
    {
        pynvml.NVML_ERROR_UNINITIALIZED,
        pynvml.NVML_ERROR_DRIVER_NOT_LOADED,
        pynvml.NVML_ERROR_LIBRARY_NOT_FOUND,
        pynvml.NVML_ERROR_LIB_RM_VERSION_MISMATCH,
    }
)
_LOST = frozenset({pynvml.NVML_ERROR_GPU_IS_LOST, pynvml.NVML_ERROR_RESET_REQUIRED, pynvml.NVML_ERROR_GPU_NOT_FOUND})
_NEVER = frozenset(
    {
        pynvml.NVML_ERROR_NOT_SUPPORTED,
        pynvml.NVML_ERROR_FUNCTION_NOT_FOUND,
        pynvml.NVML_ERROR_NO_PERMISSION,
        pynvml.NVML_ERROR_ARGUMENT_VERSION_MISMATCH,
    }
)

Values = dict[tuple[str, tuple[str, ...]], float]  # (figure, its own labels) -> value


class Lost(Exception):
    """This GPU answers nothing any more."""


class Holder(NamedTuple):
    """A replica of this node, as it announced itself."""

    replica: str
    model: str
    version: str
    gpus: tuple[str, ...]  # what Ray assigned: indices, or (parts of) UUIDs
    starting: bool = False
    running: int = 0  # requests


@dataclass(frozen=True)
class Known:
    """What was seen once stays: a GPU that the driver does not count any more is a GPU that is lost."""

    index: str
    physical: str  # UUID
    mig: str
    name: str
    share: float


@dataclass(eq=False)
class Unit:
    """What a replica can hold: a whole GPU, or a MIG instance of one."""

    index: str  # of the physical GPU, as nvidia-smi counts
    uuid: str
    name: str  # of the product
    handle: Handle
    instance: int | None = None  # GPU instance id of a MIG instance
    share: float = 1.0  # of a whole GPU
    values: Values = field(default_factory=dict)
    samples: list[Handle] = field(default_factory=list)  # GPM: the last, and room for the next

    @property
    def mig(self) -> str:
        return "" if self.instance is None else str(self.instance)


@dataclass(eq=False)
class Gpu:
    """One physical GPU. `whole` carries what only that has; with MIG, it is none of `units`, and nobody can hold it."""

    whole: Unit
    units: list[Unit]
    gpm: bool = False
    lost: bool = False
    never: set[str] = field(default_factory=set)  # calls and fields that it does not have

    @property
    def all(self) -> list[Unit]:
        return self.units if self.whole in self.units else [self.whole, *self.units]

    @property
    def has_mig(self) -> bool:
        return self.whole not in self.units


@dataclass(frozen=True)
class Shown:
    """What one unit showed in the last round."""

    uuid: str
    index: str
    mig: str
    name: str
    up: bool
    values: Values


class Page(NamedTuple):
    """What a round found, whole, for other threads."""

    at: float
    driver: bool  # it answers
    units: tuple[Shown, ...]
    seconds: dict[tuple[str, str, str], float]


class GpuTelemetry:
    """`round` is called by one thread at a time, everything else by any."""

    def __init__(self, nvml: Nvml, clock: Callable[[], float] = time.monotonic, expected: int = 0) -> None:
        """`expected`: GPUs that Ray counts here, so that one which was lost before this began is missed."""
        disable_created_metrics()  # type: ignore[no-untyped-call]
        self._nvml = nvml
        self._clock = clock
        self._open = False
        self._retry_at = self._slow_at = self._round_at = float("-inf")
        self._retry_s = REOPEN_FIRST_S
        self._why = ""  # the driver is away; said once
        self._gpus: list[Gpu] = []
        self._expected = expected
        self._order: list[str] = []  # UUIDs of physical GPUs by index, which one that is lost keeps; "" was never seen
        self._gaps: tuple[int, ...] = ()  # places of GPUs that were lost before they were seen
        self._known: dict[str, Known] = {}  # UUID of a unit -> what it is
        self._driver = ""
        self._events: Handle | None = None
        self._ask = pynvml.c_nvmlGpmMetricsGet_t()
        self._xids: dict[tuple[str, int], int] = {}  # (UUID, XID) -> count
        self._last_xid: dict[str, int] = {}
        self._said: set[tuple[str, str, int]] = set()
        self._holders: Mapping[str, tuple[Holder, ...]] = {}  # by UUID of the unit
        self._fresh = False  # whether the holders' own counts are recent
        self._seconds: dict[tuple[str, str, str], float] = {}  # (state, model, version)
        self._page = Page(float("-inf"), False, (), {})
        self.registry = CollectorRegistry()
        self.registry.register(_Families(self))
        process_metrics(self.registry)

    # -- a round ---------------------------------------------------------------------------------------------------

    def round(self) -> None:
        """Reads everything that is due. Raises nothing that NVML can raise. Blocks as long as the driver does."""
        now = self._clock()
        try:
            missing = {k.physical for k in self._known.values()} - {g.whole.uuid for g in self._gpus if not g.lost}
            if self._open and (missing or self._gaps) and now >= self._retry_at:
                self._close()
            if self._open and not missing and not self._gaps:
                self._retry_s = REOPEN_FIRST_S
            if not self._open and now >= self._retry_at:
                self._retry_at, self._retry_s = now + self._retry_s, min(2 * self._retry_s, REOPEN_LONGEST_S)
                self._enumerate()
            if self._open:
                self._read(now)
        except pynvml.NVMLError as e:
            self._away(e)
        self._count(now)
        self._publish(now)

    def _enumerate(self) -> None:
        self._nvml.nvmlInit()
        self._driver = self._nvml.nvmlSystemGetDriverVersion()
        self._gpus = []
        self._events = self._maybe_events()
        count = self._nvml.nvmlDeviceGetCount()
        self._order += [""] * (max(count, self._expected) - len(self._order))
        lost = False
        for index in range(count):
            try:
                self._gpus.append(self._found(index, whole=count == len(self._order)))
            except pynvml.NVMLError as e:
                if e.value in _AWAY:
                    raise
                lost |= e.value in _LOST
                self._say("", f"GPU {index}", e)  # the others are worth as much
        if any(g.has_mig for g in self._gpus):  # Ray counts instances
            self._expected = 0
            while self._order and not self._order[-1]:
                self._order.pop()
        lost |= len(self._gpus) < self._expected  # without either, it is one that this user may not see
        self._gaps = tuple(i for i, uuid in enumerate(self._order) if not uuid) if lost else ()
        self._open = True
        self._slow_at = float("-inf")
        if self._why:
            log.info("the GPU driver is back: %d GPUs", len(self._gpus))
        self._why = ""
        for gpu in self._gpus:  # another MIG layout than before
            for uuid in [u for u, k in self._known.items() if k.physical == gpu.whole.uuid]:
                del self._known[uuid]
            self._known |= {u.uuid: Known(u.index, gpu.whole.uuid, u.mig, u.name, u.share) for u in gpu.units}

    def _found(self, index: int, whole: bool) -> Gpu:
        """`whole`: the driver counts all that there are; it counts anew when one is lost."""
        handle = self._nvml.nvmlDeviceGetHandleByIndex(index)
        uuid = self._nvml.nvmlDeviceGetUUID(handle)
        if uuid not in self._order:
            place = index if whole else self._minor(handle, index)
            free = [i for i, known in enumerate(self._order) if not known]
            if free:
                self._order[place if place in free else free[0]] = uuid
            else:
                self._order.append(uuid)
        unit = Unit(str(self._order.index(uuid)), uuid, self._nvml.nvmlDeviceGetName(handle), handle)
        gpu = Gpu(unit, [unit])
        mode = self._maybe(gpu, "mig", lambda: self._nvml.nvmlDeviceGetMigMode(handle))
        if mode is not None and mode[0] == pynvml.NVML_DEVICE_MIG_ENABLE:
            gpu.units = list(self._instances(gpu))
        support = self._maybe(gpu, "gpm", lambda: self._nvml.nvmlGpmQueryDeviceSupport(handle))
        gpu.gpm = bool(support is not None and support.isSupportedDevice)
        if not gpu.gpm and ("", "gpm", 0) not in self._said:
            self._said.add(("", "gpm", 0))
            log.info("%s has no GPM figures: all that is known of its activity is that a kernel ran", unit.name)
        if self._events is not None:
            with contextlib.suppress(pynvml.NVMLError):
                self._nvml.nvmlDeviceRegisterEvents(handle, pynvml.nvmlEventTypeXidCriticalError, self._events)
        return gpu

    def _minor(self, handle: Handle, otherwise: int) -> int:
        """The number of its device file: as the index while none is lost, and the same when one is."""
        try:
            return self._nvml.nvmlDeviceGetMinorNumber(handle)
        except pynvml.NVMLError as e:
            if e.value in _AWAY:
                raise
            return otherwise

    def _instances(self, gpu: Gpu) -> Iterator[Unit]:
        most = self._nvml.nvmlDeviceGetMaxMigDeviceCount(gpu.whole.handle)
        for i in range(most):
            with contextlib.suppress(pynvml.NVMLError_NotFound, pynvml.NVMLError_InvalidArgument):
                handle = self._nvml.nvmlDeviceGetMigDeviceHandleByIndex(gpu.whole.handle, i)
                slices = self._nvml.nvmlDeviceGetAttributes(handle).gpuInstanceSliceCount
                yield Unit(
                    gpu.whole.index,
                    self._nvml.nvmlDeviceGetUUID(handle),
                    self._nvml.nvmlDeviceGetName(handle),
                    handle,
                    instance=self._nvml.nvmlDeviceGetGpuInstanceId(handle),
                    share=slices / most,
                )

    def _maybe_events(self) -> Handle | None:
        try:
            return self._nvml.nvmlEventSetCreate()
        except pynvml.NVMLError as e:
            if e.value in _AWAY:
                raise
            self._say("", "XID events", e)
            return None

    def _read(self, now: float) -> None:
        slow = now >= self._slow_at
        if slow:
            self._slow_at = now + SLOW_EVERY_S
        for gpu in self._gpus:
            if gpu.lost:
                continue
            try:
                self._read_gpu(gpu, slow)
            except Lost as e:
                gpu.lost = True
                self._retry_at = now + self._retry_s
                log.error("GPU %s (%s) does not answer any more: %s", gpu.whole.index, gpu.whole.uuid, e)
        self._take_events()

    def _read_gpu(self, gpu: Gpu, slow: bool) -> None:
        if slow and gpu.has_mig and {u.uuid for u in self._instances(gpu)} != {u.uuid for u in gpu.units}:
            raise Lost("it has other MIG instances now")  # all is looked at anew
        answered = False
        for unit in gpu.all:
            if slow:
                unit.values = {}
            answered |= self._fast(gpu, unit)
        if slow:
            self._slow(gpu)
        if not answered:
            raise Lost("it answers nothing")

    def _fast(self, gpu: Gpu, unit: Unit) -> bool:
        """What moves from second to second."""
        nvml, put, is_whole = self._nvml, unit.values, unit is gpu.whole
        memory = self._maybe(
            gpu, f"memory {unit.mig}", lambda: nvml.nvmlDeviceGetMemoryInfo(unit.handle, pynvml.nvmlMemory_v2)
        )
        if memory is not None:
            put["steelyard_gpu_memory_used_bytes", ()] = memory.used
            put["steelyard_gpu_memory_total_bytes", ()] = memory.total
            put["steelyard_gpu_memory_reserved_bytes", ()] = memory.reserved
        power = used = None
        if is_whole:
            power = self._maybe(gpu, "power", lambda: nvml.nvmlDeviceGetPowerUsage(unit.handle))
            if power is not None:
                put["steelyard_gpu_power_watts", ()] = power / 1000
        if is_whole and not gpu.has_mig:
            used = self._maybe(gpu, "utilisation", lambda: nvml.nvmlDeviceGetUtilizationRates(unit.handle))
        if gpu.gpm and unit in gpu.units:
            self._sample(gpu, unit)
        if used is not None:  # after GPM's, which stands in for it where MIG has none
            put["steelyard_gpu_kernel_active_ratio", ()] = used.gpu / 100
        return memory is not None or power is not None or used is not None

    def _sample(self, gpu: Gpu, unit: Unit) -> None:
        """GPM figures between this sample and the last one."""
        nvml, instance = self._nvml, unit.instance
        wanted = _GPM if instance is None else _GPM_RATIOS_OF_MIG
        for metric in wanted:  # an interval that was not measured must not go on showing the one before
            unit.values.pop(_GPM[metric][:2], None)
        if len(unit.samples) > 1:
            spare = unit.samples.pop(0)
        elif (spare := self._maybe(gpu, "gpm memory", nvml.nvmlGpmSampleAlloc)) is None:
            return
        what = f"gpm sample {unit.mig}"  # may need a permission that this user lacks
        if instance is None:
            taken = self._maybe(gpu, what, lambda: nvml.nvmlGpmSampleGet(unit.handle, spare))
        else:
            taken = self._maybe(gpu, what, lambda: nvml.nvmlGpmMigSampleGet(gpu.whole.handle, instance, spare))
        if taken is None:
            nvml.nvmlGpmSampleFree(spare)
            return
        unit.samples.append(spare)
        if len(unit.samples) < 2:
            return
        ask = self._ask
        ask.version, ask.numMetrics = pynvml.NVML_GPM_METRICS_GET_VERSION, len(wanted)
        ask.sample1, ask.sample2 = unit.samples
        for i, metric in enumerate(wanted):
            ask.metrics[i].metricId = metric
        if self._maybe(gpu, "gpm metrics", lambda: nvml.nvmlGpmMetricsGet(ask)) is None:
            return
        for i, metric in enumerate(wanted):
            found = ask.metrics[i]
            if found.nvmlReturn == pynvml.NVML_SUCCESS and found.value == found.value:  # not a number where no data
                name, labels, factor = _GPM[metric]
                unit.values[name, labels] = found.value * factor

    def _slow(self, gpu: Gpu) -> None:
        nvml, handle, put = self._nvml, gpu.whole.handle, gpu.whole.values

        def one(what: str, name: str, labels: tuple[str, ...], factor: float, call: Callable[[], float]) -> None:
            value = self._maybe(gpu, what, call)
            if value is not None:
                put[name, labels] = value * factor

        one("limit", "steelyard_gpu_power_limit_watts", (), 1e-3, lambda: nvml.nvmlDeviceGetEnforcedPowerLimit(handle))
        one(
            "energy", "steelyard_gpu_energy_joules_total", (), 1e-3,
            lambda: nvml.nvmlDeviceGetTotalEnergyConsumption(handle),
        )  # fmt: skip
        one(
            "temperature", "steelyard_gpu_temperature_celsius", ("gpu",), 1,
            lambda: nvml.nvmlDeviceGetTemperature(handle, pynvml.NVML_TEMPERATURE_GPU),
        )  # fmt: skip
        for clock, kind in _CLOCKS.items():
            one(
                f"{clock} clock", "steelyard_gpu_clock_hertz", (clock,), 1e6,
                lambda kind=kind: nvml.nvmlDeviceGetClockInfo(handle, kind),  # type: ignore[misc]
            )  # fmt: skip
            one(
                f"{clock} clock max", "steelyard_gpu_clock_max_hertz", (clock,), 1e6,
                lambda kind=kind: nvml.nvmlDeviceGetMaxClockInfo(handle, kind),  # type: ignore[misc]
            )  # fmt: skip
        bits = self._maybe(gpu, "throttle", lambda: nvml.nvmlDeviceGetCurrentClocksEventReasons(handle))
        if bits is not None:
            for reason, bit in THROTTLE.items():
                put["steelyard_gpu_throttled", (reason,)] = float(bool(bits & bit))
        if not (gpu.gpm and "gpm sample " not in gpu.never) and not gpu.has_mig:
            for direction, counter in (("tx", pynvml.NVML_PCIE_UTIL_TX_BYTES), ("rx", pynvml.NVML_PCIE_UTIL_RX_BYTES)):
                one(
                    f"pcie {direction}", "steelyard_gpu_pcie_bytes_per_second", (direction,), 1024,
                    lambda counter=counter: nvml.nvmlDeviceGetPcieThroughput(handle, counter),  # type: ignore[misc]
                )  # fmt: skip
        self._fields(gpu)
        for unit in gpu.units:
            self._processes(gpu, unit)

    def _fields(self, gpu: Gpu) -> None:
        """Many counters by few calls of the driver."""
        self._ask_fields(gpu, "fields", [(f, 0) for f in (_FIELDS if gpu.gpm else _FIELDS | _NVLINK_TOTALS)])
        if gpu.gpm:
            links = range(pynvml.NVML_NVLINK_MAX_LINKS)
            self._ask_fields(gpu, "nvlink fields", [(f, link) for f in _NVLINK_OF_LINKS for link in links])

    def _ask_fields(self, gpu: Gpu, what: str, fields: Sequence[tuple[int, int]]) -> None:
        """`fields` and their scopes; what several scopes say of one figure is added up."""
        wanted = [f for f in fields if f"field {f}" not in gpu.never]
        if not wanted:
            return
        answers = self._maybe(gpu, what, lambda: self._nvml.nvmlDeviceGetFieldValues(gpu.whole.handle, wanted))
        values: Values = {}
        for answer in answers or ():
            if answer.nvmlReturn in _NEVER or answer.nvmlReturn == pynvml.NVML_ERROR_INVALID_ARGUMENT:
                gpu.never.add(f"field {(answer.fieldId, answer.scopeId)}")  # this driver, this product, or no such link
            elif answer.nvmlReturn == pynvml.NVML_SUCCESS and answer.valueType < len(_VALUE_OF_TYPE):
                name, labels, factor = _MEANS[answer.fieldId]
                value = getattr(answer.value, _VALUE_OF_TYPE[answer.valueType]) * factor
                values[name, labels] = values.get((name, labels), 0.0) + value
        gpu.whole.values |= values

    def _processes(self, gpu: Gpu, unit: Unit) -> None:
        found = self._maybe(
            gpu, f"processes {unit.mig}", lambda: self._nvml.nvmlDeviceGetComputeRunningProcesses(unit.handle)
        )
        found = [p for p in found or () if p.usedGpuMemory is not None]  # a container may not see it
        for p in sorted(found, key=lambda p: -p.usedGpuMemory)[:PROCESSES_KEPT]:
            labels = (str(p.pid), _process_name(p.pid))
            unit.values["steelyard_gpu_process_memory_bytes", labels] = p.usedGpuMemory

    def _take_events(self) -> None:
        while self._events is not None:
            try:
                event = self._nvml.nvmlEventSetWait_v2(self._events, 0)
            except pynvml.NVMLError as e:
                if e.value in _AWAY:
                    raise
                if e.value != pynvml.NVML_ERROR_TIMEOUT:
                    self._say("", "XID events", e)
                return
            xid = int(event.eventData)
            at = next((g for g in self._gpus if _same(g.whole.handle, event.device)), None)
            if at is None:
                log.error("XID %d of a GPU that is not known", xid)
                continue
            unit = next((u for u in at.units if u.instance == event.gpuInstanceId), at.whole)
            self._xids[unit.uuid, xid] = self._xids.get((unit.uuid, xid), 0) + 1
            self._last_xid[unit.uuid] = xid
            told = XIDS.get(xid, "see NVIDIA's catalogue of XID errors")
            log.error("GPU %s (%s): XID %d: %s", unit.index, unit.uuid, xid, told)

    # -- errors ----------------------------------------------------------------------------------------------------

    def _maybe(self, gpu: Gpu, what: str, call: Callable[[], T]) -> T | None:
        """The answer, or None when this GPU has none; what it does not have is asked for once. Raises Lost, or an
        NVMLError that concerns the whole driver."""
        if what in gpu.never:
            return None
        try:
            return call()
        except pynvml.NVMLError as e:
            if e.value in _AWAY:
                raise
            if e.value in _LOST:
                raise Lost(str(e)) from None
            if e.value in _NEVER:
                gpu.never.add(what)
            if e.value != pynvml.NVML_ERROR_NOT_SUPPORTED:
                self._say(gpu.whole.uuid, what, e)
            return None

    def _say(self, uuid: str, what: str, e: Any) -> None:
        """A trouble of one field, once."""
        if (uuid, what, e.value) not in self._said:
            self._said.add((uuid, what, e.value))
            log.warning("%s%s cannot be read: %s", f"GPU {uuid}: " if uuid else "", what, e)

    def _away(self, e: Any) -> None:
        if str(e) != self._why:
            log.warning("the GPU driver does not answer, it is looked for again and again: %s", e)
        self._why = str(e)
        self._close()

    def _close(self) -> None:
        for unit in (u for g in self._gpus for u in g.units):
            for sample in unit.samples:
                with contextlib.suppress(pynvml.NVMLError):
                    self._nvml.nvmlGpmSampleFree(sample)
        self._open = False
        self._gpus = []
        with contextlib.suppress(pynvml.NVMLError):
            if self._events is not None:
                self._nvml.nvmlEventSetFree(self._events)
        self._events = None
        with contextlib.suppress(pynvml.NVMLError):
            self._nvml.nvmlShutdown()

    # -- who holds what --------------------------------------------------------------------------------------------

    def hold(self, holders: Iterable[Holder], *, fresh: bool = True) -> None:
        """The replicas of this node; unless `fresh`, what they said of their requests is old and counts for nothing."""
        found: dict[str, list[Holder]] = {}
        for holder in sorted(holders):
            for uuid in self.resolve(holder.gpus):
                found.setdefault(uuid, []).append(holder)
        self._holders = {uuid: tuple(of) for uuid, of in found.items()}
        self._fresh = fresh

    def resolve(self, ids: Sequence[str]) -> list[str]:
        """UUIDs of the units that Ray calls so: by index in the order of the bus, or by (a part of) the UUID."""
        known, order = dict(self._known), list(self._order)  # a round may go on beside this
        by_index = order
        if any(k.mig for k in known.values()):  # a GPU that came back is known anew, at its old place
            by_index = sorted(known, key=lambda uuid: order.index(known[uuid].physical))
        found = []
        for i in ids:
            if i.isdigit():
                found += [uuid for uuid in by_index[int(i) : int(i) + 1] if uuid]
            else:
                found += [uuid for uuid in known if uuid.startswith(i)]
        return found

    def _count(self, now: float) -> None:
        """GPU-seconds since the last round, to whoever held what. A GPU that is lost is held all the same."""
        passed, self._round_at = now - self._round_at, now
        if passed == float("inf"):
            return
        up = {u.uuid: u for g in self._gpus if not g.lost for u in g.units}
        for uuid, known in self._known.items():
            seconds = passed * known.share
            holders = self._holders.get(uuid, ())
            if not holders:
                self._add("free", "", "", seconds)
            for holder in holders:
                for state in ("reserved", self._doing(holder, up.get(uuid))):
                    self._add(state, holder.model, holder.version, seconds / len(holders))

    def _doing(self, holder: Holder, unit: Unit | None) -> str:
        if holder.starting:
            return "loading"
        if unit is None:
            return "idle"
        active = unit.values.get(("steelyard_gpu_sm_active_ratio", ()))
        if self._fresh:
            return "busy" if holder.running and (active is None or active > WORKS) else "idle"
        return "busy" if (_work(unit.values) or 0.0) > WORKS else "idle"  # nobody says what runs: the GPU does

    def _add(self, state: str, model: str, version: str, seconds: float) -> None:
        key = (state, model, version)
        self._seconds[key] = self._seconds.get(key, 0.0) + seconds

    def busy(self) -> dict[str, float]:
        """Replica -> share of time that its GPUs worked, 0..1. Without those that share a GPU: it may be the other."""
        found: dict[str, list[float]] = {}
        for shown in self._current():
            holders, work = self._holders.get(shown.uuid, ()), _work(shown.values)
            if shown.up and len(holders) == 1 and work is not None:
                found.setdefault(holders[0].replica, []).append(work)
        return {replica: round(sum(values) / len(values), 2) for replica, values in found.items()}

    # -- what is shown ---------------------------------------------------------------------------------------------

    def _publish(self, now: float) -> None:
        shown = []
        for gpu in self._gpus:
            for unit in gpu.all:
                values = {} if gpu.lost else dict(unit.values)
                if unit is gpu.whole and not gpu.lost:
                    values["steelyard_gpu_info", (self._driver,)] = 1.0
                values |= self._xid_values(unit.uuid)
                shown.append(Shown(unit.uuid, unit.index, unit.mig, unit.name, not gpu.lost, values))
        seen = {s.uuid for s in shown}
        for uuid, known in self._known.items():
            if uuid not in seen:
                shown.append(Shown(uuid, known.index, known.mig, known.name, False, self._xid_values(uuid)))
        shown += [Shown("", str(i), "", "", False, {}) for i in self._gaps]
        self._page = Page(now, self._open, tuple(shown), dict(self._seconds))

    def _xid_values(self, uuid: str) -> Values:
        last: Values = {("steelyard_gpu_last_xid", ()): float(self._last_xid.get(uuid, 0))}
        return last | {
            ("steelyard_gpu_xid_errors_total", (str(xid),)): float(n) for (u, xid), n in self._xids.items() if u == uuid
        }

    def _current(self) -> tuple[Shown, ...]:
        """The last round, as far as it is not too old: a call that hangs is a GPU that does not answer."""
        page = self._page
        if self._clock() - page.at <= STALE_S:
            return page.units
        return tuple(replace(s, up=False, values={}) for s in page.units)

    def text(self) -> str:
        """The exposition of this node's GPUs and of this process."""
        return generate_latest(self.registry).decode()

    def families(self) -> Iterator[GaugeMetricFamily | CounterMetricFamily]:
        families: dict[str, GaugeMetricFamily | CounterMetricFamily] = {}
        for name, figure in FIGURES.items():
            kind = CounterMetricFamily if figure.kind == "counter" else GaugeMetricFamily
            families[name] = kind(name, figure.help, labels=[*UNIT, *(HOLDER if figure.held else ()), *figure.labels])
        for shown in self._current():
            holders = self._holders.get(shown.uuid, ())
            unit = [shown.uuid, shown.index, shown.mig, shown.name]
            holder = [
                ",".join(sorted({h.model for h in holders})),
                ",".join(sorted({h.version for h in holders})),
                ",".join(h.replica for h in holders),
            ]
            families["steelyard_gpu_up"].add_metric([*unit, *holder], float(shown.up))
            for (name, labels), value in shown.values.items():
                who = holder if FIGURES[name].held else []
                families[name].add_metric([*unit, *who, *labels], value)
        yield from (f for f in families.values() if f.samples)
        yield GaugeMetricFamily(
            "steelyard_gpu_driver_up", "1 while this node's GPU driver answers.", value=float(self._page.driver)
        )
        seconds = CounterMetricFamily(
            "steelyard_gpu_seconds_total",
            "GPU time by what it went into: reserved is all of a version's, and loading, idle and busy are its parts; "
            "free is what no replica holds.",
            labels=["state", "model", "version"],
        )
        for key, value in sorted(self._page.seconds.items()):
            seconds.add_metric(key, value)
        yield seconds


class _Families(Collector):
    def __init__(self, telemetry: GpuTelemetry) -> None:
        self._telemetry = telemetry

    def collect(self) -> Iterator[Any]:
        return self._telemetry.families()

    def describe(self) -> Iterator[Any]:
        return iter(())


def _work(values: Values) -> float | None:
    """Share of time that a GPU worked, as well as it can say."""
    figures = ("steelyard_gpu_sm_active_ratio", "steelyard_gpu_kernel_active_ratio")
    return next((values[name, ()] for name in figures if (name, ()) in values), None)


def _same(a: Handle, b: Handle) -> bool:
    """Handles are pointers, and each answer makes another object of one."""
    return bool(ctypes.cast(a, ctypes.c_void_p).value == ctypes.cast(b, ctypes.c_void_p).value)


def _process_name(pid: int) -> str:
    """Its name; empty inside a container, where NVML's numbers are the host's and mean nothing."""
    try:
        if os.readlink("/proc/self/ns/pid") == _HOST_PID_NAMESPACE:
            return Path(f"/proc/{pid}/comm").read_text().strip()
    except OSError:
        pass
    return ""
