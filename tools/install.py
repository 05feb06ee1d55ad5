"""Makes `.venv/` from lock files: names, versions and hashes, no resolver. Standard library only.

`cpu.lock` and `gpu.lock` hold what serving needs, `dev.lock` what tests and checks need beside either. Resumable: what is
installed at its locked version is skipped, and pip keeps finished downloads. A stamp makes the next call return at once.
`python3 tools/install.py [cpu|gpu|sim|deploy]`; without an argument, gpu when the driver's device file exists. `deploy` makes
the small `.venv-deploy/` of a machine that only deploys. On the machines of a cluster the deploy calls it with
`--runtime-only` (what serving needs; the source comes with each release), and with `--wheelhouse` where there is no index.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import re
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
VENV = ROOT / ".venv"
PYTHON = VENV / "bin" / "python"
LOCKS = {"cpu": "cpu.lock", "sim": "cpu.lock", "gpu": "gpu.lock", "deploy": "deploy.lock"}
DEV_LOCK = "dev.lock"
WHEELHOUSE: Path | None = None
BATCH = 40
# The one package whose CPU build is not on PyPI: where the configured sources lack it, PyTorch's own index has it.
TORCH_CPU_INDEX = "https://download.pytorch.org/whl/cpu"


def main() -> int:
    global VENV, PYTHON, WHEELHOUSE
    parser = argparse.ArgumentParser(description="Makes the environment from a lock file.")
    parser.add_argument("profile", nargs="?", help="cpu, gpu, sim or deploy")
    parser.add_argument("--venv", type=Path, help="where; default .venv")
    parser.add_argument(
        "--runtime-only",
        action="store_true",
        help="what serving needs, without the source and without what tests and checks need",
    )
    parser.add_argument("--wheelhouse", type=Path, help="take wheels from this folder, never from an index")
    parser.add_argument(
        "--download", type=Path, metavar="DIR", help="fill DIR with the lock file's wheels; install nothing"
    )
    given = parser.parse_args()
    profile = given.profile or ("gpu" if Path("/dev/nvidiactl").exists() else "cpu")
    if profile not in LOCKS:
        print(f"error: unknown profile {profile!r}; use {', '.join(LOCKS)}", file=sys.stderr)
        return 2
    if sys.version_info[:2] != (3, 11):
        have = ".".join(map(str, sys.version_info[:2]))
        print(
            f"error: the lock files are for Python 3.11, this is {have}; run `make PYTHON=python3.11 ...`",
            file=sys.stderr,
        )
        return 2
    if given.wheelhouse is not None and not given.wheelhouse.is_dir():
        print(f"error: {given.wheelhouse}: no such folder of wheels", file=sys.stderr)
        return 2
    VENV = (given.venv or ROOT / (".venv-deploy" if profile == "deploy" else ".venv")).absolute()
    PYTHON, WHEELHOUSE = VENV / "bin" / "python", given.wheelhouse and given.wheelhouse.absolute()
    lock = ROOT / "requirements" / LOCKS[profile]
    if given.download is not None:
        return download(lock, given.download)
    alone = given.runtime_only or profile == "deploy"
    dev_lock = ROOT / "requirements" / DEV_LOCK
    sources = [lock] if alone else [lock, dev_lock, ROOT / "pyproject.toml"]
    wanted = hashlib.sha256(b"".join(f.read_bytes() for f in sources)).hexdigest()
    stamp = VENV / ".steelyard-install"
    if stamp.exists() and stamp.read_text() == wanted:
        return 0
    entries = read_lock(lock)
    if not alone:
        runtime = {name for name, _, _ in entries}
        entries += [e for e in read_lock(dev_lock) if e[0] not in runtime]
    if not PYTHON.exists():
        say(f"creating {VENV.name}")
        venv.create(VENV, with_pip=True)
    have = installed()
    missing = [e for e in entries if have.get(e[0]) != e[1]]
    named = lock.name if alone else f"{lock.name} and {DEV_LOCK}"
    say(f"{len(entries)} packages in {named}, {len(entries) - len(missing)} already there")
    for start in range(0, len(missing), BATCH):
        batch = missing[start : start + BATCH]
        say(f"installing {start + 1}-{start + len(batch)} of {len(missing)}: {batch[0][0]} ... {batch[-1][0]}")
        install(batch)
    if not alone:
        say("installing steelyard itself")
        pip("install", "-q", "--no-deps", "--no-build-isolation", "-e", str(ROOT))
        if profile != "sim":
            say("reading vLLM's argument list")
            subprocess.run([str(PYTHON), "-m", "serving.engine.probe"], check=False, cwd=ROOT)
    stamp.write_text(wanted)
    say("installed")
    return 0


def download(lock: Path, folder: Path) -> int:
    """For machines without a package index. Hashes are checked here, and again where the wheels are installed."""
    global PYTHON
    PYTHON = Path(sys.executable)
    entries = read_lock(lock)
    folder.mkdir(parents=True, exist_ok=True)
    # Wheels only: a source package would be built here, and its hash would be another one there.
    for batch in batches(entries):
        fetch = ["download", "-q", "--no-deps", "--require-hashes", "--only-binary=:all:", "-d", str(folder)]
        requirement(batch, fetch, fallback=TORCH_CPU_INDEX if cpu_torch(batch[0]) else None)
    say(f"{len(list(folder.glob('*.whl')))} wheels in {folder}")
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


def cpu_torch(entry: tuple[str, str, str]) -> bool:
    return entry[0] == "torch" and entry[1].endswith("+cpu")


def batches(entries: list[tuple[str, str, str]]) -> list[list[tuple[str, str, str]]]:
    """CPU torch by itself, since it may come from another index; then the others."""
    others = [e for e in entries if not cpu_torch(e)]
    return [[e] for e in entries if cpu_torch(e)] + ([others] if others else [])


def install(entries: list[tuple[str, str, str]]) -> None:
    options = ["install", "-qq", "--no-deps", "--require-hashes"]
    if WHEELHOUSE is not None:
        options += ["--no-index", "--find-links", str(WHEELHOUSE)]
    for batch in batches(entries):
        requirement(batch, options, fallback=TORCH_CPU_INDEX if cpu_torch(batch[0]) and WHEELHOUSE is None else None)


def requirement(entries: list[tuple[str, str, str]], options: list[str], fallback: str | None = None) -> None:
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as part:
        part.write("\n".join(e[2] for e in entries) + "\n")
        part.flush()
        try:
            pip(*options, "-r", part.name, quiet=fallback is not None)
        except subprocess.CalledProcessError:
            if fallback is None:
                raise SystemExit(
                    "error: pip failed (above); mend the cause and run the same command: it goes on from here"
                ) from None
            say(f"{entries[0][0]}=={entries[0][1]} is not in the configured package sources: trying {fallback}")
            pip(*options, "-r", part.name, "--index-url", fallback)


def pip(*args: str, quiet: bool = False) -> None:
    env = {**os.environ, "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
    subprocess.run([str(PYTHON), "-m", "pip", *args], check=True, env=env, stderr=subprocess.DEVNULL if quiet else None)


def say(line: str) -> None:
    print(f"install: {line}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
