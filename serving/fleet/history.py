"""What the policy decided: a bounded memory per version, for an operator who asks why."""

from __future__ import annotations

from collections import deque
from typing import Literal

import msgspec

from serving.fleet.scaling import Load

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

    def __init__(self) -> None:
        self._changes: dict[str, deque[Change]] = {}

    def add(self, change: Change) -> None:
        kept = self._changes.pop(change.version_id, None) or deque(maxlen=KEPT)
        kept.append(change)
        self._changes[change.version_id] = kept
        if len(self._changes) > VERSIONS:  # the one that changed longest ago
            del self._changes[next(iter(self._changes))]

    def of(self, version_id: str) -> list[Change]:
        return list(self._changes.get(version_id, ()))
