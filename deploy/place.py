"""Lays everything down on one machine: user, folders, release, runtime, secrets, settings, units, catalog. Running processes
notice nothing of it; `roll` starts and restarts them."""

from __future__ import annotations

import hashlib
import io
import json
import re
import secrets
import shlex
from pathlib import Path

from pyinfra.operations import files, server, systemd

from deploy import layout
from deploy.inventory import Inventory
from deploy.release import ROOT, Release
from deploy.target import Failed, Target
from serving.catalog.spec import Catalog

_INSTALL_TIMEOUT_S = 3600
UNIT_FILES = ROOT / "deploy" / "systemd"
_EXCLUDED = ("*/__pycache__/*", "*.pyc", "*/.git/*", "*~")


def user_and_folders(target: Target) -> None:
    target.do(f"group {layout.USER}", server.group, layout.USER, system=True)
    target.do(
        f"user {layout.USER}",
        server.user,
        layout.USER,
        group=layout.USER,
        home=layout.STATE,
        shell="/usr/sbin/nologin",
        system=True,
        ensure_home=False,
    )
    for path, owner, mode in layout.FOLDERS:
        target.do(f"folder {path}", files.directory, path, user=owner, group=owner, mode=mode)


# -- release and runtime ------------------------------------------------------------------------------------------------


def runtime_path(inventory: Inventory, release: Release) -> str:
    return inventory.runtime.venv or f"{layout.RUNTIMES}/{release.lock_id}"


def source(target: Target, release: Release) -> None:
    """The source tree under its own name; complete or not there at all."""
    where = f"{layout.RELEASES}/{release.id}"
    if target.ask(f"test -d {where}").ok:
        return
    archive = f"{where}.tar.gz"
    if target.dry_run:
        target.tell(f"release {release.id}")
        return
    with_quiet = io.BytesIO(release.archive)
    target.do(f"release {release.id}: archive", files.put, with_quiet, archive, mode="0644")
    unpack = f"rm -rf {where}.part && mkdir {where}.part && tar -xzf {archive} -C {where}.part --no-same-owner"
    target.run(f"release {release.id}", f"{unpack} && mv {where}.part {where} && rm {archive}")


def runtime(target: Target, inventory: Inventory, release: Release) -> None:
    """The Python environment of the release's lock file, unless the inventory names one that is there."""
    if inventory.runtime.venv:
        return
    where = runtime_path(inventory, release)
    if target.ask(f"test -f {where}/.complete").ok:
        return
    if inventory.runtime.wheelhouse:
        wheels(target, inventory.runtime.wheelhouse, release)
    target.run(
        f"runtime {release.lock_id} from {release.lock}",
        f"mkdir -p {layout.RUNTIMES} && {install_command(inventory, release)} && touch {where}/.complete",
        timeout_s=_INSTALL_TIMEOUT_S,
    )


def install_command(inventory: Inventory, release: Release) -> str:
    """The deterministic installer of the release itself: names, versions, hashes, no resolver."""
    argv = [inventory.runtime.python, f"{layout.RELEASES}/{release.id}/tools/install.py"]
    argv += [
        "gpu" if release.lock == "gpu.lock" else "cpu",
        "--runtime-only",
        "--venv",
        runtime_path(inventory, release),
    ]
    if inventory.runtime.wheelhouse:
        argv += ["--wheelhouse", f"{layout.OPT}/wheelhouse"]
    return f"umask 022 && {shlex.join(argv)}"


def wheels(target: Target, folder: Path, release: Release) -> None:
    """Sends the wheels that the machine lacks. pip checks their hashes."""
    there = target.ask(f"cd {layout.OPT}/wheelhouse 2>/dev/null && stat -c '%s %n' -- *.whl").out
    have = {line.split(" ", 1)[1]: int(line.split(" ", 1)[0]) for line in there if " " in line}
    for wheel in sorted(folder.glob("*.whl")):
        if have.get(wheel.name) != wheel.stat().st_size:
            where = f"{layout.OPT}/wheelhouse/{wheel.name}"
            target.do(f"wheel {wheel.name}", files.put, str(wheel), where, mode="0644", force=True)


# -- secrets --------------------------------------------------------------------------------------------------------------


# The folder is the service's own: root there would follow whatever link a service that was broken into has left.
_AS_USER = f"runuser -u {layout.USER} --"


def read_secrets(target: Target) -> dict[str, str]:
    """The secrets that lie on this machine. They pass through this process's memory only."""
    found = {}
    for name in layout.SECRETS:
        answer = target.ask(f"{_AS_USER} cat {layout.STATE}/{name} 2>/dev/null")
        if answer.ok and answer.text:
            found[name] = answer.text
    return found


def agreed(found: list[dict[str, str]]) -> dict[str, str]:
    """One value for each secret: the first machine's that has one (the head comes first), else a new one."""
    return {name: next((f[name] for f in found if f.get(name)), "") or secrets.token_hex(32) for name in layout.SECRETS}


def write_secrets(target: Target, wanted: dict[str, str], have: dict[str, str]) -> None:
    """Over stdin, never in argv or a log; mode 0600 from the first byte on."""
    for name, value in wanted.items():
        path = f"{layout.STATE}/{name}"
        if have.get(name) == value:
            target.do(f"{name}: owner and mode", files.file, path, user=layout.USER, group=layout.USER, mode="0600")
            continue
        write = f"{_AS_USER} sh -c 'umask 077 && cat > {path}.part && mv {path}.part {path}'"
        target.run(f"secret {name}", write, stdin=value)


def redis_password(target: Target, inventory: Inventory) -> None:
    """Of an external Redis, for the head alone."""
    source = inventory.serve.redis_password
    if source is None or target.role != "head":
        return
    value = source.read_text().strip()
    have = target.ask(f"{_AS_USER} cat {layout.STATE}/redis-password 2>/dev/null").text
    write_secrets(target, {"redis-password": value}, {"redis-password": have})


def otlp_headers(target: Target, inventory: Inventory) -> None:
    """What the collector of the traces asks for, on every machine."""
    source = inventory.serve.otlp_headers
    if source is None:
        return
    value = source.read_text().strip()
    have = target.ask(f"{_AS_USER} cat {layout.STATE}/otlp-headers 2>/dev/null").text
    write_secrets(target, {"otlp-headers": value}, {"otlp-headers": have})


# -- settings, units, catalog ---------------------------------------------------------------------------------------------


def environment(target: Target, inventory: Inventory) -> str:
    """`steelyard.env`: read by systemd and by the `steelyard` command. No secret is in it."""
    serve, machine = inventory.serve, target.machine
    values = {
        "STEELYARD_NODE_ADDRESS": machine.address,
        "STEELYARD_RAY_PORT": str(serve.ray_port),
        **({"STEELYARD_HEAD": at(inventory.head.address, serve.ray_port)} if target.role == "worker" else {}),
        "STEELYARD_STATE_DIR": layout.STATE,
        "STEELYARD_CACHE_DIR": layout.CACHE,
        "STEELYARD_MODELS": layout.MODELS,
        "STEELYARD_PROFILE": serve.profile,
        "STEELYARD_HOST": machine.address if serve.listen == "node" else serve.listen,
        "STEELYARD_PORT": str(serve.port),
        "STEELYARD_GATEWAYS": str(serve.gateways),
        "STEELYARD_NODE_DRAIN_S": str(serve.drain_s),
        "STEELYARD_READY_TIMEOUT_S": str(serve.ready_timeout_s),
    }
    if machine.labels:
        values["STEELYARD_NODE_LABELS"] = ",".join(f"{k}={v}" for k, v in sorted(machine.labels.items()))
    if serve.redis and target.role == "head":
        values |= {"STEELYARD_REDIS": serve.redis, "STEELYARD_REDIS_USERNAME": serve.redis_username}
        if serve.cluster_name:
            values["STEELYARD_CLUSTER_NAME"] = serve.cluster_name
        if serve.redis_password:
            values["STEELYARD_REDIS_PASSWORD_FILE"] = f"{layout.STATE}/redis-password"
    if serve.otlp_endpoint:
        values |= {"STEELYARD_OTLP_ENDPOINT": serve.otlp_endpoint, "STEELYARD_TRACE_RATIO": str(serve.trace_ratio)}
        if serve.otlp_headers:
            values["STEELYARD_OTLP_HEADERS_FILE"] = f"{layout.STATE}/otlp-headers"
    # In quotes, so that systemd and sh read the same.
    return "".join(f'{k}="{v}"\n' for k, v in (values | dict(sorted(serve.environment.items()))).items())


def at(address: str, port: int) -> str:
    return f"[{address}]:{port}" if ":" in address else f"{address}:{port}"


def unit_text(target: Target) -> str:
    return (UNIT_FILES / target.unit).read_text()


def drop_in(catalog: Catalog, inventory: Inventory, systemd_version: int) -> str:
    """What the unit of this fleet adds to the file of the product."""
    mounts = sorted(
        {
            w
            for _, v in catalog.versions()
            for w in ([v.weights.source] if v.weights else []) + [a.source for a in v.adapters]
            if w.startswith("/")
        }
    )
    lines = ["[Unit]", *(f"RequiresMountsFor={m}" for m in mounts)] if mounts else []
    lines += ["[Service]", f"TimeoutStopSec={inventory.serve.drain_s + 60}"]
    if systemd_version >= 254:  # older ones know a constant RestartSec only
        lines += ["RestartSteps=5", "RestartMaxDelaySec=60"]
    return "\n".join(["# Made by the deploy.", *lines, ""])


def settings(target: Target, inventory: Inventory, catalog: Catalog) -> str:
    """Environment, unit, command. Returns the digest of what a restart would bring into force."""
    version = re.match(r"systemd (\d+)", target.ask("systemctl --version").text)
    texts = {
        layout.ENVIRONMENT: environment(target, inventory),
        f"{layout.UNITS}/{target.unit}": unit_text(target),
        f"{layout.UNITS}/{target.unit}.d/deploy.conf": drop_in(catalog, inventory, int(version[1]) if version else 0),
        f"{layout.UNITS}/{layout.UVM}": (UNIT_FILES / layout.UVM).read_text(),
        layout.COMMAND: (ROOT / "deploy" / "steelyard.sh").read_text(),
    }
    modes = {layout.ENVIRONMENT: "0640", layout.COMMAND: "0755"}
    changed = set()
    for path, text in texts.items():
        group = layout.USER if path == layout.ENVIRONMENT else "root"
        put = io.StringIO(text)
        if target.do(path, files.put, put, path, user="root", group=group, mode=modes.get(path, "0644")):
            changed.add(path)
    stale = (
        target.ask(f"systemctl show --property NeedDaemonReload --value {target.unit}").text == "yes"
    )  # of a run cut short
    if stale or any(path.startswith(layout.UNITS) for path in changed):
        target.do("systemd reads its units", systemd.daemon_reload)
    # Where weights are mounted is for the next boot; it restarts nothing.
    return hashlib.sha256(
        json.dumps([texts[layout.ENVIRONMENT], texts[f"{layout.UNITS}/{target.unit}"]]).encode()
    ).hexdigest()


def models(target: Target, folder: Path) -> None:
    """The catalog folder, file by file; what was taken out of it here goes there too."""
    target.do(
        f"catalog {layout.MODELS}",
        files.sync,
        str(folder),
        layout.MODELS,
        user="root",
        group="root",
        mode="0644",
        dir_mode="0755",
        delete=True,
        exclude=_EXCLUDED,
        exclude_dir=("__pycache__", "*/__pycache__", ".git"),
    )


def catalog_digest(folder: Path) -> str:
    digest = hashlib.sha256()
    for f in sorted(p for p in folder.rglob("*") if p.is_file() and "__pycache__" not in p.parts):
        digest.update(f"{f.relative_to(folder)}\0".encode() + hashlib.sha256(f.read_bytes()).digest())
    return digest.hexdigest()


def running_release(target: Target) -> str:
    """The release whose code the machine's unit runs; empty on a new machine."""
    return Path(target.ask(f"readlink {layout.CURRENT}").text).name


def require_no_leftover_role(target: Target) -> None:
    other = "worker" if target.role == "head" else "head"
    if target.ask(f"test -e {layout.UNITS}/steelyard-{other}.service").ok:
        raise Failed(f"it is a {other} now: `make deploy-remove LIMIT={target.name}` with the old inventory first")
