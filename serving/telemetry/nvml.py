"""NVML as the exporter uses it: one protocol, held by NVIDIA's `pynvml` module and by the scripted node of `nvml_scripted`.

Names, arguments, units and errors are `pynvml`'s own, so that the module itself is an implementation. Each call may raise
`pynvml.NVMLError`; what a GPU does not have raises `NVMLError_NotSupported`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol, cast

Handle = Any  # opaque: a GPU, a MIG instance, an event set or a GPM sample


class Nvml(Protocol):
    """The functions that are called, and no others."""

    def nvmlInit(self) -> None: ...
    def nvmlShutdown(self) -> None: ...
    def nvmlSystemGetDriverVersion(self) -> str: ...

    def nvmlDeviceGetCount(self) -> int: ...
    def nvmlDeviceGetHandleByIndex(self, index: int) -> Handle: ...
    def nvmlDeviceGetUUID(self, handle: Handle) -> str: ...
    def nvmlDeviceGetMinorNumber(self, handle: Handle) -> int: ...  # N of /dev/nvidiaN
    def nvmlDeviceGetName(self, handle: Handle) -> str: ...

    def nvmlDeviceGetMigMode(self, device: Handle) -> Sequence[int]: ...  # now, and after the next reset
    def nvmlDeviceGetMaxMigDeviceCount(self, device: Handle) -> int: ...
    def nvmlDeviceGetMigDeviceHandleByIndex(self, device: Handle, index: int) -> Handle: ...
    def nvmlDeviceGetGpuInstanceId(self, device: Handle) -> int: ...
    def nvmlDeviceGetAttributes(self, device: Handle) -> Any: ...  # .gpuInstanceSliceCount

    def nvmlDeviceGetMemoryInfo(self, handle: Handle, version: int | None = None) -> Any: ...  # bytes
    def nvmlDeviceGetUtilizationRates(self, handle: Handle) -> Any: ...  # .gpu in percent
    def nvmlDeviceGetPowerUsage(self, handle: Handle) -> int: ...  # mW
    def nvmlDeviceGetEnforcedPowerLimit(self, handle: Handle) -> int: ...  # mW
    def nvmlDeviceGetTotalEnergyConsumption(self, handle: Handle) -> int: ...  # mJ since the driver was loaded
    def nvmlDeviceGetTemperature(self, handle: Handle, sensor: int) -> int: ...  # Celsius
    def nvmlDeviceGetClockInfo(self, handle: Handle, type: int) -> int: ...  # MHz
    def nvmlDeviceGetMaxClockInfo(self, handle: Handle, type: int) -> int: ...  # MHz
    def nvmlDeviceGetCurrentClocksEventReasons(self, handle: Handle) -> int: ...  # bits
    def nvmlDeviceGetPcieThroughput(self, device: Handle, counter: int) -> int: ...  # KiB/s over 20 ms, which it waits
    def nvmlDeviceGetComputeRunningProcesses(self, handle: Handle) -> Sequence[Any]: ...
    def nvmlDeviceGetFieldValues(self, handle: Handle, fieldIds: Sequence[Any]) -> Sequence[Any]: ...

    def nvmlGpmQueryDeviceSupport(self, device: Handle) -> Any: ...  # .isSupportedDevice
    def nvmlGpmSampleAlloc(self) -> Handle: ...
    def nvmlGpmSampleFree(self, gpmSample: Handle) -> None: ...
    def nvmlGpmSampleGet(self, device: Handle, gpmSample: Handle) -> Handle: ...
    def nvmlGpmMigSampleGet(self, device: Handle, gpuInstanceId: int, gpmSample: Handle) -> Handle: ...
    def nvmlGpmMetricsGet(self, metricsGet: Any) -> Any: ...  # a c_nvmlGpmMetricsGet_t, filled in

    def nvmlEventSetCreate(self) -> Handle: ...
    def nvmlEventSetFree(self, eventSet: Handle) -> None: ...
    def nvmlDeviceRegisterEvents(self, handle: Handle, eventTypes: int, eventSet: Handle) -> None: ...
    def nvmlEventSetWait_v2(self, eventSet: Handle, timeoutms: int) -> Any: ...


def driver() -> Nvml:
    """This machine's own. Importing it needs no driver; `nvmlInit` does."""
    import pynvml

    return cast(Nvml, pynvml)


def from_settings(script: str | None) -> Nvml:
    """This machine's own, or the scripted node that `STEELYARD_NVML_SCRIPT` names."""
    if script is None:
        return driver()
    from serving.telemetry.nvml_scripted import load

    return load(script)
