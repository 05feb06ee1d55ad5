"""Small files that others read while they are replaced: keys, secrets, what the next directory should know."""

from __future__ import annotations

import os
import secrets
from pathlib import Path


def replace(path: Path, content: bytes) -> None:
    """Readers see the old file or the new one, whole, also after a power failure; nobody but its owner may read it. Raises
    OSError, and leaves the old one as it was."""
    draft = path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}")
    try:
        with open(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        draft.replace(path)
        folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(folder)  # a key that was revoked stays so
        finally:
            os.close(folder)
    finally:
        draft.unlink(missing_ok=True)
