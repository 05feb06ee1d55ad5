"""What is sent to every machine: the source of this checkout under the hash of its content, and which runtime it needs."""

from __future__ import annotations

import hashlib
import io
import re
import tarfile
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
_FILES = ("pyproject.toml", "README.md", "LICENSE", "tools/install.py")


@dataclass(frozen=True)
class Release:
    id: str  # of the source
    archive: bytes  # tar.gz
    lock: str  # requirements/<lock>
    lock_id: str  # of the lock file: machines keep one runtime per lock file
    ray: str  # Ray's version in it: nodes of one cluster must agree on it


def build(profile: str, root: Path = ROOT) -> Release:
    lock = root / "requirements" / ("gpu.lock" if profile == "gpu" else "cpu.lock")
    files = sorted({*(root / f for f in _FILES), *_sources(root), lock})
    contents = [(str(f.relative_to(root)), f.read_bytes()) for f in files]
    digest = hashlib.sha256()
    for name, content in contents:
        digest.update(f"{name}\0{len(content)}\0".encode() + content)
    ray = re.search(r"^ray==(\S+)", lock.read_text().replace("ray[serve]==", "ray=="), re.MULTILINE)
    return Release(
        id=digest.hexdigest()[:16],
        archive=_archive(contents),
        lock=lock.name,
        lock_id=hashlib.sha256(lock.read_bytes()).hexdigest()[:16],
        ray=ray[1] if ray else "",
    )


def _sources(root: Path) -> list[Path]:
    return [f for f in (root / "serving").rglob("*") if f.is_file() and "__pycache__" not in f.parts]


def _archive(contents: list[tuple[str, bytes]]) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w:gz") as archive:
        for name, content in contents:
            entry = tarfile.TarInfo(name)
            entry.size, entry.mode = len(content), 0o644
            archive.addfile(entry, io.BytesIO(content))
    return out.getvalue()
