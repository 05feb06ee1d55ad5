"""Stands in for systemd in a test host: starts the same ExecStart with the same Environment as the real one would.

`init.py daemon` is the supervisor, `init.py systemctl ...` and `init.py journalctl ...` talk to it (shims on the host's PATH run
them). It knows what the units use: Type=notify, Restart, KillMode=mixed with a whole-unit kill, RuntimeDirectory, User, UMask,
limits, drop-ins, enabled units at boot. A process belongs to a unit by the INVOCATION_ID that systemd sets as well.
Standard library only; it runs with the host's own python3.
"""

from __future__ import annotations

import contextlib
import json
import os
import pwd
import resource
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import uuid
from pathlib import Path

SOCKET = "/run/init.sock"
UNITS = Path("/etc/systemd/system")
WANTS = UNITS / "multi-user.target.wants"
LOGS = Path("/run/init-logs")
_SHOWN = {"active": "running", "inactive": "dead", "failed": "failed", "activating": "start", "deactivating": "stop"}


def parse(name: str) -> dict[str, list[str]]:
    """Keys of [Service] and [Unit] with all their values, in order; drop-ins after the file."""
    found: dict[str, list[str]] = {}
    for file in [UNITS / name, *sorted((UNITS / f"{name}.d").glob("*.conf"))]:
        for line in file.read_text().splitlines():
            line = line.strip()
            if line and line[0] not in "#;[":
                key, _, value = line.partition("=")
                found.setdefault(key.strip(), []).append(value.strip())
    return found


class Unit:
    def __init__(self, name: str) -> None:
        self.name = name
        self.state = "inactive"
        self.settings: dict[str, list[str]] = {}
        self.main: subprocess.Popen[bytes] | None = None
        self.invocation = ""
        self.wanted = False
        self.changed = threading.Condition()

    def one(self, key: str, default: str = "") -> str:
        return self.settings.get(key, [default])[-1]

    def start(self) -> bool:
        with self.changed:
            if self.state in ("active", "activating"):
                return self.changed.wait_for(lambda: self.state != "activating", 900) and self.state == "active"
            self.wanted = True
        self._spawn()
        with self.changed:
            self.changed.wait_for(lambda: self.state not in ("activating",), float(self.one("TimeoutStartSec", "90")))
            return self.state == "active"

    def stop(self) -> None:
        with self.changed:
            self.wanted = False
            main = self.main
            if self.state in ("active", "activating"):
                self._set("deactivating")
        if main is not None and main.poll() is None:
            main.send_signal(signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                main.wait(float(self.one("TimeoutStopSec", "90")))
        self.kill_all()
        with self.changed:
            self.changed.wait_for(lambda: self.state in ("inactive", "failed"), 10)
            self._set("inactive")

    def kill_all(self) -> None:
        """What the kernel does with a control group."""
        for pid in members(self.invocation):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def _spawn(self) -> None:
        self.settings = parse(self.name)
        user = pwd.getpwnam(self.one("User", "root"))
        self.invocation = uuid.uuid4().hex
        run = Path("/run") / self.one("RuntimeDirectory", "nothing")
        run.mkdir(exist_ok=True)
        run.chmod(int(self.one("RuntimeDirectoryMode", "0755"), 8))
        os.chown(run, user.pw_uid, user.pw_gid)
        notify = f"/run/notify-{self.invocation}"
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        listener.bind(notify)
        os.chmod(notify, 0o777)
        env = {"PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "LANG": "C.UTF-8"}
        env |= {"HOME": user.pw_dir, "USER": user.pw_name, "LOGNAME": user.pw_name, "SHELL": user.pw_shell}
        env |= {"INVOCATION_ID": self.invocation, "NOTIFY_SOCKET": notify}
        for line in self.settings.get("Environment", []):
            env |= dict(word.partition("=")[::2] for word in shlex.split(line))
        for file in self.settings.get("EnvironmentFile", []):
            for line in Path(file).read_text().splitlines():
                if line.strip() and not line.startswith("#"):
                    env |= dict([shlex.split(line)[0].partition("=")[::2]])

        def become() -> None:
            os.umask(int(self.one("UMask", "0022"), 8))
            files = int(self.one("LimitNOFILE", "1024"))
            with contextlib.suppress(ValueError, PermissionError):  # a container's ceiling may be lower
                resource.setrlimit(resource.RLIMIT_NOFILE, (files, files))
            os.initgroups(user.pw_name, user.pw_gid)
            os.setgid(user.pw_gid)
            os.setuid(user.pw_uid)

        LOGS.mkdir(exist_ok=True)
        with self.changed:
            self._set("activating")
            with open(LOGS / self.name, "ab") as log:
                self.main = subprocess.Popen(
                    shlex.split(self.one("ExecStart")),
                    env=env,
                    cwd=self.one("WorkingDirectory", "/"),
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    start_new_session=True,
                    preexec_fn=become,
                )
        threading.Thread(target=self._notified, args=(listener, notify), daemon=True).start()
        threading.Thread(target=self._reap, args=(self.main, run), daemon=True).start()

    def _notified(self, listener: socket.socket, path: str) -> None:
        main = self.main
        listener.settimeout(1)
        while main is not None and main.poll() is None:
            with contextlib.suppress(TimeoutError):
                if b"READY=1" in listener.recv(4096):
                    with self.changed:
                        if self.state == "activating":
                            self._set("active")
        listener.close()
        Path(path).unlink(missing_ok=True)

    def _reap(self, main: subprocess.Popen[bytes], run: Path) -> None:
        main.wait()
        self.kill_all()
        shutil.rmtree(run, ignore_errors=True)
        with self.changed:
            again = self.wanted and self.one("Restart") == "always"
            never_up = self.state == "activating"  # the start job fails; the unit is tried again all the same
            self._set("failed" if never_up else "activating" if again else "inactive")
        if again:
            time.sleep(float(self.one("RestartSec", "0.1")))
            if self.wanted:
                self._spawn()

    def _set(self, state: str) -> None:
        self.state = state
        self.changed.notify_all()


def members(invocation: str) -> list[int]:
    found = []
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            with contextlib.suppress(OSError):
                if f"INVOCATION_ID={invocation}".encode() in Path(f"/proc/{entry}/environ").read_bytes():
                    found.append(int(entry))
    return found


class Daemon:
    def __init__(self) -> None:
        self.units: dict[str, Unit] = {}

    def unit(self, name: str) -> Unit:
        return self.units.setdefault(name, Unit(name))

    def answer(self, args: list[str]) -> tuple[int, str]:
        now = "--now" in args
        words = [a for a in args if not a.startswith("--")]
        verb, names = words[0], words[1:]
        if verb == "show":
            wanted = [args[i + 1] for i, a in enumerate(args) if a == "--property"]
            blocks = [self._show(n, wanted, "--value" in args) for n in names if n not in wanted]
            return 0, "\n\n".join(blocks)
        if verb == "is-active":
            state = self.unit(names[0]).state
            return (0 if state == "active" else 3), state
        if verb in ("start", "restart", "stop"):
            for name in names:
                if verb != "start":
                    self.unit(name).stop()
                if verb != "stop":
                    if not (UNITS / name).exists():
                        return 5, f"Unit {name} not found."
                    if not self.unit(name).start():
                        return 1, f"Job for {name} failed."
            return 0, ""
        if verb in ("enable", "disable"):
            for name in names:
                link = WANTS / name
                link.parent.mkdir(exist_ok=True)
                link.unlink(missing_ok=True)
                if verb == "enable":
                    link.symlink_to(UNITS / name)
                if now:
                    self.answer(["start" if verb == "enable" else "stop", name])
            return 0, ""
        if verb in ("daemon-reload", "reset-failed"):
            return 0, ""
        return 1, f"this stand-in does not know {verb}"

    def _show(self, name: str, wanted: list[str], bare: bool) -> str:
        state = self.unit(name).state
        values = {
            "Id": name,
            "NeedDaemonReload": "no",  # units are read when they start
            "ActiveState": state,
            "SubState": _SHOWN[state],
            "UnitFileState": "enabled" if (WANTS / name).exists() else "disabled" if (UNITS / name).exists() else "",
            "MainPID": str(self.unit(name).main.pid if self.unit(name).main else 0),  # type: ignore[union-attr]
        }
        return "\n".join(values[k] if bare else f"{k}={values[k]}" for k in wanted)

    def serve(self) -> None:
        listener = socket.socket(socket.AF_UNIX)
        Path(SOCKET).unlink(missing_ok=True)
        listener.bind(SOCKET)
        listener.listen()
        for link in sorted(WANTS.glob("*.service")) if WANTS.exists() else []:
            threading.Thread(target=self.unit(link.name).start, daemon=True).start()
        print("up", flush=True)
        while True:
            client, _ = listener.accept()
            threading.Thread(target=self._one, args=(client,), daemon=True).start()

    def _one(self, client: socket.socket) -> None:
        with client, client.makefile("rw") as stream:
            try:
                told = self.answer(json.loads(stream.readline()))
            except Exception as e:
                told = (1, f"{type(e).__name__}: {e}")
            with contextlib.suppress(OSError):
                stream.write(json.dumps(told) + "\n")
                stream.flush()


def systemctl(args: list[str]) -> int:
    if args == ["--version"]:
        print("systemd 252 (stand-in)")
        return 0
    with socket.socket(socket.AF_UNIX) as s:
        s.connect(SOCKET)
        with s.makefile("rw") as stream:
            stream.write(json.dumps(args) + "\n")
            stream.flush()
            code, text = json.loads(stream.readline())
    if text:
        print(text)
    return int(code)


def journalctl(args: list[str]) -> int:
    if "-u" not in args:
        return 1
    log = LOGS / args[args.index("-u") + 1]
    lines = log.read_text(errors="replace").splitlines() if log.exists() else []
    print("\n".join(lines[-int(args[args.index("-n") + 1]) :] if "-n" in args else lines))
    return 0


if __name__ == "__main__":
    if sys.argv[1] == "daemon":
        Daemon().serve()
    sys.exit({"systemctl": systemctl, "journalctl": journalctl}[sys.argv[1]](sys.argv[2:]))
