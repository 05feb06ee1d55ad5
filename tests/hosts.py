"""Hosts on one machine: each has its own network, processes, mounts, host name and shared memory, on a common bridge.

    with hosts(3) as (head, one, two):
        head.run("steelyard", "--version")
        unit = one.start([sys.executable, "-m", "serving.cli.main", "node", "worker"], env=..., log=...)
        httpx.get(f"http://{two.address}:8000/healthz")     # the test itself is a machine outside, on the same bridge

A host sees the machine's files and writes none of them: `EMPTY` folders start empty and `COPIED` ones as the machine's are,
both are its own and gone with it. Its init is a process of ours that reaps orphans; when it ends, the kernel ends every process
of the host. Needs root.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import ipaddress
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from tests.stack import ROOT

EMPTY = ("/tmp", "/run", "/dev/shm")
COPIED = ("/etc", "/home", "/opt", "/root", "/var")

# Copies on write. Where the disk cannot hold them (a container's own root often cannot), memory does.
_MOUNTS = """
set -eu
folder=$1 repository=$2 copied=$3
mount --make-rprivate /
overlay() { mount -t overlay -o lowerdir=$1,upperdir=$folder/upper$1,workdir=$folder/work$1 overlay $1 2>/dev/null; }
for of in $copied; do
    test -d $of || continue
    mkdir -p $folder/upper$of $folder/work$of
    chmod --reference=$of $folder/upper$of
    overlay $of && continue
    mountpoint -q $folder || mount -t tmpfs -o size=8g memory $folder
    mkdir -p $folder/upper$of $folder/work$of
    overlay $of
done
mkdir -p -m 1777 $folder/tmp
case $repository in /tmp/*) mkdir -p $folder$repository; mount --bind $repository $folder$repository;; esac
mount -t tmpfs -o mode=755 run /run
mount -t tmpfs -o mode=1777,size=512m shm /dev/shm
mount --rbind $folder/tmp /tmp
"""

# Pid 1 of a host. It dies with the test run, and with it everything in the host.
_INIT = """
import ctypes, os, signal
ctypes.CDLL(None).prctl(1, signal.SIGKILL)
print("up", flush=True)
while True:
    try:
        os.wait()
    except ChildProcessError:
        signal.sigtimedwait({signal.SIGCHLD}, 0.2)
"""


@functools.cache
def missing() -> str:
    """Why hosts cannot be made here, for a skip; empty when they can."""
    if sys.platform != "linux":
        return "hosts are Linux namespaces"
    if os.geteuid() != 0:
        return "hosts are namespaces: they need root"
    for tool in ("ip", "unshare", "nsenter", "mount", "setpriv"):
        if shutil.which(tool) is None:
            return f"hosts are namespaces: there is no `{tool}`"
    name = f"sy{secrets.token_hex(4)}"
    made = _ip("netns", "add", name, check=False)
    if made.returncode != 0:
        return f"hosts are namespaces, which are refused here: {made.stderr.strip()}"
    _ip("netns", "del", name)
    bridge = _ip("link", "add", name, "type", "bridge", check=False)
    if bridge.returncode != 0:
        return f"hosts need a bridge, which is refused here: {bridge.stderr.strip()}"
    _ip("link", "del", name)
    return ""


@dataclasses.dataclass
class Host:
    """One host, as seen from the machine."""

    name: str
    address: str
    init: int  # its pid 1, as the machine counts

    def inside(self, path: str | Path) -> Path:
        """Where the machine sees the host's own `path`, while the host is up."""
        return Path(f"/proc/{self.init}/root") / Path(path).relative_to("/")

    def argv(self, command: Sequence[str], cwd: Path | str = "/") -> list[str]:
        """`command` as the machine must run it so that it runs in this host, in its folder `cwd`."""
        spaces = ["--net", "--mount", "--pid", "--uts", "--ipc", f"--wdns={cwd}"]
        return ["nsenter", "--target", str(self.init), *spaces, "--", *command]

    def run(
        self,
        *command: str,
        env: Mapping[str, str] | None = None,
        cwd: Path | str = "/",
        check: bool = True,
        timeout_s: float = 120,
    ) -> subprocess.CompletedProcess[str]:
        """Runs a command to its end."""
        done = subprocess.run(
            self.argv(command, cwd), env=env, capture_output=True, text=True, timeout=timeout_s, check=False
        )
        if check:
            assert done.returncode == 0, f"{self.name}: {' '.join(command)}\n{done.stdout}{done.stderr}"
        return done

    def start(
        self,
        command: Sequence[str],
        *,
        env: Mapping[str, str] | None = None,
        cwd: Path | str = "/",
        log: Path | None = None,
    ) -> Process:
        """Starts a command in a process group of its own; it ends with the host at the latest."""
        with open(log or os.devnull, "ab") as out:
            entry = subprocess.Popen(
                self.argv(command, cwd),
                env=env,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=out,
                start_new_session=True,
            )
        return Process(self, entry, log)

    def pids(self) -> list[int]:
        """Every process of this host but its init, as the machine counts them."""
        mine = os.stat(f"/proc/{self.init}/ns/pid").st_ino
        found = []
        for entry in os.listdir("/proc"):
            if entry.isdigit() and int(entry) != self.init:
                with contextlib.suppress(OSError):
                    if os.stat(f"/proc/{entry}/ns/pid").st_ino == mine and not _zombie(int(entry)):
                        found.append(int(entry))
        return found

    def halt(self) -> None:
        """As if its power failed: every process ends at once, nothing is told to anyone."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.init, signal.SIGKILL)

    def unplug(self) -> None:
        """Its network cable is pulled; processes run on."""
        _ip("link", "set", _cable(self.name), "down")

    def plug(self) -> None:
        _ip("link", "set", _cable(self.name), "up")


@dataclasses.dataclass
class Process:
    """A command started in a host. The machine's own child is `nsenter`, which passes no signals on: `pid` is the
    command itself."""

    host: Host
    entry: subprocess.Popen[bytes]
    log: Path | None = None

    @functools.cached_property
    def pid(self) -> int:
        """The command's pid as the machine counts."""
        children = Path(f"/proc/{self.entry.pid}/task/{self.entry.pid}/children")
        deadline = time.monotonic() + 10
        while time.monotonic() < deadline:
            if found := children.read_text().split():
                return int(found[0])
            if self.entry.poll() is not None:
                break
            time.sleep(0.01)
        raise AssertionError(f"{self.host.name}: the command ended at once:\n{self.output()}")

    def poll(self) -> int | None:
        """Its exit code (a negative signal number when killed), None while it runs."""
        code = self.entry.poll()
        return code if code is None or code < 128 else 128 - code

    def wait(self, timeout_s: float = 60) -> int:
        self.entry.wait(timeout_s)
        code = self.poll()
        assert code is not None
        return code

    def signal(self, sig: signal.Signals) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, sig)

    def output(self) -> str:
        return self.log.read_text(errors="replace") if self.log and self.log.exists() else ""


class Network:
    """A bridge with hosts on it; `add` plugs in another one while the others run."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.bridge = f"sy{secrets.token_hex(3)}"
        self.subnet = _free_subnet()
        self.gateway = str(next(self.subnet.hosts()))  # the machine's own address: tests are a host outside
        self.hosts: list[Host] = []
        self._names: list[str] = []
        self._inits: list[subprocess.Popen[bytes]] = []
        _ip("link", "add", self.bridge, "type", "bridge")
        _ip("addr", "add", f"{self.gateway}/{self.subnet.prefixlen}", "dev", self.bridge)
        _ip("link", "set", self.bridge, "up")

    def add(self) -> Host:
        number = len(self.hosts)
        name = f"{self.bridge}-{number}"
        address = str(self.subnet[10 + number])
        folder = self.root / name
        folder.mkdir()
        self._names.append(name)
        _ip("netns", "add", name)
        enter = ["unshare", "--mount", "--uts", "--ipc", "--pid", "--fork", "--mount-proc", "--kill-child"]
        script = f'{_MOUNTS}\nhostname {name}\nexec "$4" -c "$5"'
        init = subprocess.Popen(
            [
                *("setpriv", "--pdeathsig", "KILL"),  # a test run that is killed leaves no host behind either
                *("ip", "netns", "exec", name),
                *enter,
                *("sh", "-c", script, "sh", folder, ROOT, " ".join(COPIED), sys.executable, _INIT),
            ],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
        )
        self._inits.append(init)
        assert init.stdout is not None
        if init.stdout.readline().strip() != b"up":
            init.kill()
            raise AssertionError(f"{name} did not come up: {init.communicate()[1].decode()}")
        children = Path(f"/proc/{init.pid}/task/{init.pid}/children").read_text().split()
        host = Host(name, address, int(children[0]))
        self.hosts.append(host)
        inner, outer = f"{self.bridge}p", _cable(name)
        _ip("link", "add", outer, "type", "veth", "peer", "name", inner)
        _ip("link", "set", outer, "master", self.bridge, "up")
        _ip("link", "set", inner, "netns", name)
        for words in (
            ["link", "set", "lo", "up"],
            ["link", "set", inner, "name", "eth0"],
            ["addr", "add", f"{address}/{self.subnet.prefixlen}", "dev", "eth0"],
            ["link", "set", "eth0", "up"],
            ["route", "add", "default", "via", self.gateway],
        ):
            _ip("-n", name, *words)
        return host

    def close(self) -> None:
        for host in self.hosts:
            host.halt()
        for init in self._inits:
            with contextlib.suppress(subprocess.TimeoutExpired):
                init.wait(10)
            init.kill()
            init.wait()
            for pipe in filter(None, (init.stdout, init.stderr)):
                pipe.close()
        for name in self._names:
            _ip("link", "del", _cable(name), check=False)  # both its ends, at once
            _ip("netns", "del", name, check=False)
        _ip("link", "del", self.bridge, check=False)
        shutil.rmtree(self.root, ignore_errors=True)


@contextlib.contextmanager
def network() -> Iterator[Network]:
    """An empty bridge; hosts are added to it. Everything is gone at the end, whatever happened."""
    made = Network(Path(tempfile.mkdtemp(prefix="hosts-")))
    try:
        yield made
    finally:
        made.close()


@contextlib.contextmanager
def hosts(count: int) -> Iterator[list[Host]]:
    """`count` hosts on one bridge."""
    with network() as made:
        yield [made.add() for _ in range(count)]


def _cable(name: str) -> str:
    """The bridge's end of a host's cable; an interface's name has at most 15 characters."""
    return name.replace("-", "c")


def _free_subnet() -> ipaddress.IPv4Network:
    """One of 250 /24 networks in a range kept for tests of network devices (RFC 2544) that nothing here routes to."""
    routed = [line.split()[0] for line in _ip("route", "show", "table", "all").stdout.splitlines() if line]
    taken = []
    for route in routed:
        with contextlib.suppress(ValueError):
            taken.append(ipaddress.ip_network(route, strict=False))
    for _ in range(50):
        wanted = ipaddress.IPv4Network(f"198.18.{secrets.randbelow(250)}.0/24")
        if not any(wanted.overlaps(t) for t in taken if isinstance(t, ipaddress.IPv4Network)):
            return wanted
    raise AssertionError("no free subnet for hosts")


def _zombie(pid: int) -> bool:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"


def _ip(*words: str, check: bool = True) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(["ip", *words], capture_output=True, text=True, check=False)
    if check and done.returncode != 0:
        raise AssertionError(f"ip {' '.join(words)}: {done.stderr.strip()}")
    return done
