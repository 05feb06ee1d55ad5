"""What the policy decided: a bounded memory per version, for an operator who asks why. And the file that outlives the
directory, with that, with how long starts take, and with what gateways told of engines that died."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import msgspec

from serving import files
from serving.fleet.endpoint import Deaths
from serving.fleet.scaling import Load

log = logging.getLogger(__name__)

Cause = Literal["load", "from_zero", "to_zero", "bounds"]

KEPT = 50  # changes of one version
VERSIONS = 1024


class Change(msgspec.Struct, frozen=True, kw_only=True):
    """One change of a version's replica count. `reason` is the policy's sentence, `cause` its kind, for counting."""

    version_id: str
    at: float  # epoch seconds
    before: int
    after: int
    cause: Cause
    reason: str
    load: Load | None = None  # what it was decided on; None: somebody set other bounds

    @property
    def direction(self) -> str:
        return "up" if self.after > self.before else "down"


class History:
    """The last changes of each version."""

    def __init__(self, changes: Mapping[str, list[Change]] | None = None) -> None:
        self._changes = {version_id: deque(kept, maxlen=KEPT) for version_id, kept in (changes or {}).items()}

    def add(self, change: Change) -> None:
        kept = self._changes.pop(change.version_id, None) or deque(maxlen=KEPT)
        kept.append(change)
        self._changes[change.version_id] = kept
        if len(self._changes) > VERSIONS:  # the one that changed longest ago
            del self._changes[next(iter(self._changes))]

    def of(self, version_id: str) -> list[Change]:
        return list(self._changes.get(version_id, ()))

    def all(self) -> dict[str, list[Change]]:
        return {version_id: list(kept) for version_id, kept in self._changes.items()}


class Kept(msgspec.Struct, frozen=True, kw_only=True):
    """What a directory that starts knows of those before it. Not which starts failed: it finds that out soon enough."""

    ready_after_s: dict[str, float] = {}  # version id -> of its last start
    changes: dict[str, list[Change]] = {}
    deaths: dict[str, Deaths] = {}  # by gateway; fingerprints, no texts
    died: dict[str, float] = {}  # engine -> epoch seconds of its death


def read(path: Path) -> Kept:
    """Nothing without a file, or with one that cannot be read: all of it is found out again in time."""
    try:
        return msgspec.json.decode(path.read_bytes(), type=Kept)
    except FileNotFoundError:
        return Kept()
    except (OSError, ValueError, msgspec.MsgspecError) as e:  # no UTF-8 is a ValueError
        log.warning("%s cannot be read, start times, changes of counts and deaths are forgotten: %s", path, e)
        return Kept()


def write(path: Path, kept: Kept) -> None:
    """Atomically, mode 0600. Raises OSError."""
    files.replace(path, msgspec.json.encode(kept))
