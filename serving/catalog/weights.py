"""Weights on this machine: find or build them, and refuse what is half-written, changed or unsafe.

Every refusal is a WeightsError: the file, what is wrong with it, and what mends it.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

from filelock import FileLock, Timeout

from serving.errors import WeightsError

BUILD_TIMEOUT_S = 3600.0

# The safetensors library refuses longer headers too.
_MAX_HEADER_BYTES = 100_000_000
_MAX_JSON_BYTES = 64 * 1024 * 1024
_BUILD = re.compile(r"build:([A-Za-z0-9][A-Za-z0-9._-]*)/([A-Za-z0-9][A-Za-z0-9._-]*)")
_SCHEME = re.compile(r"([a-z][a-z0-9+.-]*):(//)?")
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "tekken.json", "vocab.json", "vocab.txt", "spiece.model")

# Runs the recipe as `python build.py ...` would, but ends with the process that asked for it, however that one ends.
_CHILD = """
import ctypes, os, runpy, signal, sys
if sys.platform == "linux":
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)
if os.getppid() != int(sys.argv[1]):
    sys.exit("the process that asked for this build is gone")
sys.argv = sys.argv[2:]
sys.path[0] = os.path.dirname(sys.argv[0])
runpy.run_path(sys.argv[0], run_name="__main__")
"""

Progress = Callable[[str], None]


def resolve(source: str, *, base: Path, cache: Path, on_progress: Progress = lambda line: None) -> Path:
    """The local folder of `source`, built first if it must be; not verified.

    `source` is an absolute path, a path relative to `base` (the folder of the model's file), or `build:NAME/ARTEFACT`:
    the recipe `base/NAME/build.py`, run once per content of its folder into `cache`, by one process at a time.
    """
    if source.startswith("build:"):
        found = _BUILD.fullmatch(source)
        if not found:
            raise WeightsError(f"{source!r} is no build source", "Write build:RECIPE/ARTEFACT")
        return _built(found[1], found[2], base, cache, on_progress)
    if scheme := _SCHEME.match(source):
        raise WeightsError(
            f"{source}: the scheme {scheme[1]}: is not supported yet by this version",
            "Use a local path or build:RECIPE/ARTEFACT, e.g. fetch the weights to a folder first",
        )
    path = base / Path(source).expanduser()
    if not path.is_dir():
        raise WeightsError(f"{path}: no such folder of weights", "Correct weights.source, or put the weights there")
    return path.resolve()


def locate(source: str, *, base: Path, cache: Path, here: bool = True) -> Path:
    """Where `resolve` would find or put it, without building anything. Unless `here`, the folder may be missing on this
    machine: other nodes run the engine, and each checks what it needs."""
    found = _BUILD.fullmatch(source)
    if found and (base / found[1] / "build.py").is_file():
        return cache.resolve() / f"{found[1]}-{_recipe_hash(base / found[1])}" / found[2]
    if not here and not source.startswith("build:") and not _SCHEME.match(source):
        return (base / Path(source).expanduser()).resolve()
    return resolve(source, base=base, cache=cache)


def verify(path: Path, kind: Literal["model", "adapter"], sha256: str | None = None) -> None:
    """Refuse the folder `path` unless an engine can load it whole and without running code from it.

    `sha256` names a sha256sum manifest inside the folder; every weight file must then be in it and match. Reads only
    headers otherwise, so it takes milliseconds whatever the size.
    """
    if not path.is_dir():
        raise WeightsError(f"{path}: no such folder of weights", "Correct the source, or put the weights there")
    config = path / ("config.json" if kind == "model" else "adapter_config.json")
    for file in (config, path / "tokenizer_config.json"):
        if (file == config or file.is_file()) and "auto_map" in _json(file):
            raise WeightsError(
                f"{file}: auto_map asks the engine to run code from this folder",
                "Remove auto_map and use an architecture the engine has",
            )
    shards = sorted(path.glob("*.safetensors"))
    if not shards:
        pickles = [file.name for pattern in _PICKLES for file in path.glob(pattern)]
        if pickles:
            raise WeightsError(
                f"{path}: only pickled weights ({pickles[0]}), which can run code", "Save as safetensors"
            )
        raise WeightsError(f"{path}: no *.safetensors", "Copy the weights there, or correct the source")
    tensors = {shard.name: _whole(shard) for shard in shards}
    for index in sorted(path.glob("*.safetensors.index.json")):
        _check_index(index, tensors)
    if kind == "model" and not any((path / name).is_file() for name in _TOKENIZERS):
        raise WeightsError(f"{path}: no tokenizer (tokenizer.json or tokenizer.model)", "Copy it beside the weights")
    if sha256 is not None:
        _check_manifest(path, sha256, shards)


def require_free_disk(path: Path, needed_bytes: int, what: str, setting: str) -> None:
    """Refuse before writing `needed_bytes` under `path` (which may not exist yet) would fill the disk."""
    existing = path.absolute()
    while not existing.exists():
        existing = existing.parent
    free = shutil.disk_usage(existing).free
    if free < needed_bytes:
        raise WeightsError(
            f"{what} needs {needed_bytes / 2**30:.1f} GiB and {existing} has {free / 2**30:.1f} GiB free",
            f"Free some space or set {setting} to another disk",
        )


def _built(name: str, artefact: str, base: Path, cache: Path, on_progress: Progress) -> Path:
    recipe = base / name
    script = recipe / "build.py"
    if not script.is_file():
        raise WeightsError(f"{script}: no such recipe", "Correct weights.source: build:RECIPE/ARTEFACT")
    home = cache / f"{name}-{_recipe_hash(recipe)}"
    if (home / artefact).exists():
        return (home / artefact).resolve()
    cache.mkdir(parents=True, exist_ok=True)
    lock = _held_lock(cache / f".{home.name}.lock", name, on_progress)
    try:
        if not (home / artefact).exists():
            _build(script, home, on_progress)
    finally:
        lock.release()
    if not (home / artefact).exists():
        made = ", ".join(sorted(entry.name for entry in home.iterdir())) or "nothing"
        raise WeightsError(f"{script} makes no {artefact!r} (it made: {made})", "Correct weights.source or the recipe")
    return (home / artefact).resolve()


def _held_lock(path: Path, name: str, on_progress: Progress) -> FileLock:
    lock = FileLock(path)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        on_progress(f"waiting: another process builds {name}")
        try:
            lock.acquire(timeout=BUILD_TIMEOUT_S)
        except Timeout:
            raise WeightsError(f"{path}: held for an hour by another build", "End that process") from None
    return lock


def _build(script: Path, home: Path, on_progress: Progress) -> None:
    """Run the recipe into a draft folder that takes its name only when whole. The caller holds the lock."""
    draft = home.with_name(f".{home.name}.draft")
    shutil.rmtree(draft, ignore_errors=True)
    command = [sys.executable, "-u", "-c", _CHILD, str(os.getpid()), str(script.resolve()), "--out", str(draft)]
    last: deque[str] = deque(maxlen=1)
    with subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    ) as child:
        bound = threading.Timer(BUILD_TIMEOUT_S, child.kill)
        bound.start()
        try:
            assert child.stdout is not None
            for line in child.stdout:
                if line.strip():
                    last.append(line.strip())
                    on_progress(line.rstrip())
            code = child.wait()
        finally:
            bound.cancel()
            child.kill()
    if code != 0 or not draft.is_dir():
        shutil.rmtree(draft, ignore_errors=True)
        said = last[0] if last else "it said nothing"
        how = f"failed (exit {code})" if code else "made no output folder"
        raise WeightsError(
            f"{script} {how}: {said}", f"Run it by hand to see more: {sys.executable} {script} --out DIR"
        )
    shutil.rmtree(home, ignore_errors=True)
    draft.replace(home)


def _recipe_hash(recipe: Path) -> str:
    """12 hex digits over names and bytes of the recipe's files, without its README and compiled files."""
    digest = hashlib.sha256()
    for file in sorted(recipe.rglob("*")):
        if not file.is_file() or file.name.startswith("README") or file.suffix == ".pyc":
            continue
        content = file.read_bytes()
        digest.update(f"{file.relative_to(recipe).as_posix()}\0{len(content)}\0".encode())
        digest.update(content)
    return digest.hexdigest()[:12]


def _json(file: Path) -> dict[str, Any]:
    try:
        if file.stat().st_size > _MAX_JSON_BYTES:
            raise ValueError("too large")
        data = json.loads(file.read_bytes())
    except FileNotFoundError:
        raise WeightsError(f"{file}: missing", "Copy it beside the weights") from None
    except (OSError, ValueError, RecursionError) as cause:
        raise WeightsError(f"{file}: not readable as JSON ({cause})", "Copy it again") from None
    if not isinstance(data, dict):
        raise WeightsError(f"{file}: not a JSON object", "Copy it again")
    return data


def _whole(file: Path) -> set[str]:
    """The tensor names of a safetensors file; refuses one whose size is not what its header says.

    Format: 8 bytes header length (little endian), that many bytes of JSON, then tensor data without gaps; see
    https://huggingface.co/docs/safetensors/index#format.
    """
    again = "Copy it again"
    try:
        size = file.stat().st_size
        with file.open("rb") as stream:
            prefix = stream.read(8)
            length = int.from_bytes(prefix, "little")
            if len(prefix) < 8:
                raise WeightsError(f"{file}: half-written: expected at least 8 bytes, found {size}", again)
            if length > _MAX_HEADER_BYTES:
                raise WeightsError(f"{file}: no safetensors file (header of {length} bytes)", again)
            if size < 8 + length:
                raise WeightsError(f"{file}: half-written: expected at least {8 + length} bytes, found {size}", again)
            header = json.loads(stream.read(length))
        tensors = {name: entry["data_offsets"] for name, entry in header.items() if name != "__metadata__"}
        end = 0
        for begin, stop in sorted(tensors.values()):
            if not (isinstance(begin, int) and isinstance(stop, int) and begin == end <= stop):
                raise ValueError("tensor offsets overlap or leave gaps")
            end = stop
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as cause:
        raise WeightsError(f"{file}: the safetensors header is not readable ({cause})", again) from None
    expected = 8 + length + end
    if size != expected:
        state = "half-written" if size < expected else "has trailing bytes"
        raise WeightsError(f"{file}: {state}: expected {expected} bytes, found {size}", again)
    return set(tensors)


def _check_index(index: Path, tensors: dict[str, set[str]]) -> None:
    weight_map = _json(index).get("weight_map")
    if not isinstance(weight_map, dict):
        raise WeightsError(f"{index}: no weight_map", "Copy it again")
    for tensor, shard in weight_map.items():
        if shard not in tensors:
            raise WeightsError(f"{index}: the shard {shard} is missing", "Copy it beside the others")
        if tensor not in tensors[shard]:
            raise WeightsError(f"{index.parent / shard}: holds no tensor {tensor}", "Copy index and shards of one save")


def _check_manifest(path: Path, name: str, shards: list[Path]) -> None:
    manifest = path / name
    listed: set[str] = set()
    for file, wanted in _manifest_lines(manifest):
        target = path / file
        if not target.resolve().is_relative_to(path.resolve()) and not target.is_symlink():
            raise WeightsError(f"{manifest}: {file} lies outside the folder", "List only files of this folder")
        try:
            with target.open("rb") as stream:
                found = hashlib.file_digest(stream, "sha256").hexdigest()
        except OSError as cause:
            raise WeightsError(f"{target}: in {name} and not readable ({cause.strerror})", "Copy it again") from None
        if found != wanted:
            raise WeightsError(
                f"{target}: changed: sha256 {found[:12]}..., {name} has {wanted[:12]}...", "Copy it again"
            )
        listed.add(os.path.normpath(file))
    for needed in (*shards, path / "config.json"):
        if needed.is_file() and needed.name not in listed:
            raise WeightsError(
                f"{manifest}: {needed.name} is not listed", "Make it again with sha256sum over all files"
            )


def _manifest_lines(manifest: Path) -> Iterator[tuple[str, str]]:
    try:
        text = manifest.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as cause:
        raise WeightsError(f"{manifest}: not readable ({cause})", "Make it with sha256sum, or drop sha256") from None
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        found = re.fullmatch(r"([0-9a-fA-F]{64}) [ *](.+)", line)
        if not found or Path(found[2]).is_absolute():
            raise WeightsError(f"{manifest}:{number}: not a line of sha256sum", "Make it again with sha256sum")
        yield found[2], found[1].lower()
