"""Makes `.venv/` from a lock file: names, versions and hashes, no resolver. Standard library only.

Resumable: what is installed at its locked version is skipped, and pip keeps finished downloads. A stamp makes the next call
return at once. `python3 tools/install.py [cpu|gpu]`; without an argument, gpu when the driver's device file exists.
"""

from __future__ import annotations

import hashlib
import os
import re
import subprocess
import sys
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
VENV = ROOT / ".venv"
PYTHON = VENV / "bin" / "python"
STAMP = VENV / ".steelyard-install"
BATCH = 40
# The one package whose CPU build is not on PyPI: where the configured sources lack it, PyTorch's own index has it.
TORCH_CPU_INDEX = "https://download.pytorch.org/whl/cpu"


def main() -> int:
    profile = sys.argv[1] if len(sys.argv) > 1 else "gpu" if Path("/dev/nvidiactl").exists() else "cpu"
    if profile not in ("cpu", "gpu", "sim"):
        print(f"error: unknown profile {profile!r}; use cpu, gpu or sim", file=sys.stderr)
        return 2
    if sys.version_info[:2] != (3, 11):
        have = ".".join(map(str, sys.version_info[:2]))
        print(
            f"error: the lock files are for Python 3.11, this is {have}; run `make PYTHON=python3.11 ...`",
            file=sys.stderr,
        )
        return 2
    lock = ROOT / "requirements" / ("gpu.lock" if profile == "gpu" else "cpu.lock")
    wanted = hashlib.sha256(lock.read_bytes() + (ROOT / "pyproject.toml").read_bytes()).hexdigest()
    if STAMP.exists() and STAMP.read_text() == wanted:
        return 0
    entries = read_lock(lock)
    if not PYTHON.exists():
        say("creating .venv")
        venv.create(VENV, with_pip=True)
    have = installed()
    missing = [e for e in entries if have.get(e[0]) != e[1]]
    say(f"{len(entries)} packages in {lock.name}, {len(entries) - len(missing)} already there")
    for start in range(0, len(missing), BATCH):
        batch = missing[start : start + BATCH]
        say(f"installing {start + 1}-{start + len(batch)} of {len(missing)}: {batch[0][0]} ... {batch[-1][0]}")
        install(batch)
    say("installing steelyard itself")
    pip("install", "-q", "--no-deps", "--no-build-isolation", "-e", str(ROOT))
    if profile != "sim":
        say("reading vLLM's argument list")
        subprocess.run([str(PYTHON), "-m", "serving.engine.probe"], check=False, cwd=ROOT)
    STAMP.write_text(wanted)
    say("installed")
    return 0


def read_lock(lock: Path) -> list[tuple[str, str, str]]:
    """(normalised name, version, the requirement with its hashes) of each entry."""
    entries = []
    for block in re.split(r"\n(?=\S)", lock.read_text()):
        found = re.match(r"([A-Za-z0-9._-]+)==([^\s;\\]+)", block)
        if found:
            entries.append((normal(found[1]), found[2], block))
    return entries


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def installed() -> dict[str, str]:
    code = "from importlib.metadata import distributions as d; [print(x.name, x.version) for x in d()]"
    done = subprocess.run([str(PYTHON), "-c", code], capture_output=True, text=True, check=True)
    pairs = (line.split() for line in done.stdout.splitlines())
    return {normal(pair[0]): pair[1] for pair in pairs if len(pair) == 2}


def install(batch: list[tuple[str, str, str]]) -> None:
    others = [e for e in batch if not (e[0] == "torch" and e[1].endswith("+cpu"))]
    torch = [e for e in batch if e not in others]
    if torch:
        requirement(torch, fallback=TORCH_CPU_INDEX)
    if others:
        requirement(others)


def requirement(entries: list[tuple[str, str, str]], fallback: str | None = None) -> None:
    part = VENV / "lock.part"
    part.write_text("\n".join(e[2] for e in entries) + "\n")
    options = ["install", "-qq", "--no-deps", "--require-hashes", "-r", str(part)]
    try:
        pip(*options, quiet=fallback is not None)
    except subprocess.CalledProcessError:
        if fallback is None:
            raise SystemExit(
                "error: pip failed (above); mend the cause and run the same command: it goes on from here"
            ) from None
        say(f"{entries[0][0]}=={entries[0][1]} is not in the configured package sources: trying {fallback}")
        pip(*options, "--index-url", fallback)
    part.unlink()


def pip(*args: str, quiet: bool = False) -> None:
    env = {**os.environ, "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
    subprocess.run([str(PYTHON), "-m", "pip", *args], check=True, env=env, stderr=subprocess.DEVNULL if quiet else None)


def say(line: str) -> None:
    print(f"install: {line}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
