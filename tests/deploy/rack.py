"""A rack on one machine: hosts of `tests/hosts.py` made into machines as a provider hands them over: sshd with a key, an init,
a Python that others than root may run, and nothing of ours."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from tests.hosts import Host, Network
from tests.hosts import missing as hosts_missing
from tests.stack import ROOT, until

WEIGHTS = "/opt/weights"
VENV = "/usr/local/runtime"
INIT = Path(__file__).parent / "init.py"

_SSHD = """
Port 22
ListenAddress {address}
HostKey /run/ssh_host_key
AuthorizedKeysFile /run/authorized_keys
PidFile none
UsePAM no
PermitRootLogin prohibit-password
PasswordAuthentication no
StrictModes no
Subsystem sftp internal-sftp
"""


def missing() -> str:
    """Why no rack can be made here, for a skip; empty when one can."""
    if why := hosts_missing():
        return why
    for tool, package in (("sshd", "openssh-server"), ("ssh-keygen", "openssh-client"), ("make", "make")):
        if shutil.which(tool, path=f"{os.environ.get('PATH', '')}:/usr/sbin") is None:
            return f"machines are reached by ssh: there is no `{tool}` (apt-get install {package})"
    return ""


class Rack:
    """Machines, and one that deploys to them."""

    def __init__(self, net: Network) -> None:
        self.net = net
        self.machines: list[Host] = []
        self.told = ""  # all that was ever printed by it
        self.control = net.add()
        self.folder = self.control.inside("/tmp/rack")  # /tmp/rack for the deploying machine
        self.folder.mkdir()
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(self.folder / "key")], check=True)
        (self.folder / "known_hosts").touch()
        (self.folder / "models").mkdir()

    def add(self, *, weights: Path | None = None) -> Host:
        """A machine that was just unpacked; `weights` is its `WEIGHTS`."""
        host = self.net.add()
        # The only folder of a machine besides a test host's own that the deploy writes to, and that the test prepares.
        own = "mount -t tmpfs own /mnt && mkdir /mnt/upper /mnt/work"
        options = "lowerdir=/usr/local,upperdir=/mnt/upper,workdir=/mnt/work"
        host.run("sh", "-c", f"{own} && mount -t overlay -o {options} overlay /usr/local")
        self._python(host)
        if weights is not None:
            host.run("sh", "-c", f"mkdir -p {WEIGHTS} && mount --bind {weights} {WEIGHTS}")
        host.run("sh", "-c", f"echo '{host.address} {host.name}' >> /etc/hosts")
        for tool in ("systemctl", "journalctl"):
            shim = f'#!/bin/sh\nexec /usr/local/python/bin/python3.11 /usr/local/init.py {tool} "$@"\n'
            host.run("sh", "-c", f"cat > /usr/local/bin/{tool} <<'EOF'\n{shim}EOF\nchmod +x /usr/local/bin/{tool}")
        host.run("cp", str(INIT), "/usr/local/init.py")
        host.run("mkdir", "-p", "/run/systemd/system", "/run/sshd", "/etc/systemd/system")
        self.boot(host)
        self._ssh(host)
        self.machines.append(host)
        return host

    def boot(self, host: Host) -> None:
        log = self.net.root / f"{host.name}.init"
        log.unlink(missing_ok=True)
        daemon = ["/usr/local/python/bin/python3.11", "/usr/local/init.py", "daemon"]
        host.start(daemon, env={"PATH": os.environ["PATH"]}, log=log)
        until(lambda: log.exists() and b"up" in log.read_bytes(), "the stand-in for systemd is up", 10)

    def _python(self, host: Host) -> None:
        """This test run's interpreter and packages, where everybody may read them: as an image's ready environment."""
        packages = next(p for p in map(Path, sys.path) if p.name == "site-packages" and p.is_relative_to(sys.prefix))
        inner = f"{VENV}/lib/{packages.parent.name}/site-packages"
        steps = [
            f"mkdir -p /usr/local/python {VENV}/bin {inner}",
            f"mount --bind {sys.base_prefix} /usr/local/python",
            "chmod a+x /root",  # a shared libpython is found by its absolute path
            f"mount --bind {packages.resolve()} {inner}",
            f"ln -s /usr/local/python/bin/python3.11 {VENV}/bin/python",
            f"printf 'home = /usr/local/python/bin\\ninclude-system-site-packages = false\\n' > {VENV}/pyvenv.cfg",
        ]
        host.run("sh", "-c", " && ".join(steps))

    def _ssh(self, host: Host) -> None:
        public = (self.folder / "key.pub").read_text()
        host.inside("/run/authorized_keys").write_text(public)
        host.inside("/run/sshd_config").write_text(_SSHD.format(address=host.address))
        host.run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", "/run/ssh_host_key")
        log = self.net.root / f"{host.name}.sshd"
        host.start(["/usr/sbin/sshd", "-D", "-e", "-f", "/run/sshd_config"], env={"PATH": os.environ["PATH"]}, log=log)
        until(lambda: log.exists() and b"listening" in log.read_bytes(), f"sshd of {host.name}", 10)
        key = host.inside("/run/ssh_host_key.pub").read_text().split()[:2]
        with open(self.folder / "known_hosts", "a") as known:
            known.write(f"{host.address} {' '.join(key)}\n")

    def inventory(self, name: str = "inventory.py", *, workers: int | None = None, extra: str = "") -> str:
        """Writes one with the first machine as head; its path for the deploying machine."""
        head, *others = self.machines
        chosen = others if workers is None else others[:workers]
        text = f"""
head = "{head.address}"
workers = {[{"host": w.address, "labels": {"rack": "one"}} for w in chosen]!r}
ssh = {{"key": "key", "known_hosts": "known_hosts"}}
runtime = {{"venv": "{VENV}"}}
serve = {{"profile": "cpu", "drain_s": 5, "ready_timeout_s": 240}}
{extra}
"""
        (self.folder / name).write_text(text)
        return f"/tmp/rack/{name}"

    def make(
        self, target: str, *variables: str, check: bool = True, cwd: Path | str = ROOT, timeout_s: float = 280
    ) -> subprocess.CompletedProcess[str]:
        """Runs a target of the checkout `cwd` on the machine that deploys."""
        env = {k: v for k, v in os.environ.items() if not k.startswith("STEELYARD_")} | {"PYTHONPATH": str(cwd)}
        command = ["make", "--no-print-directory", target, *variables]
        done = self.control.run(*command, env=env, cwd=cwd, check=check, timeout_s=timeout_s)
        self.told += done.stdout + done.stderr
        return done


def changes(told: str) -> int:
    found = re.findall(r"^(\d+) changes", told, re.MULTILINE)
    assert found, told
    return int(found[-1])
