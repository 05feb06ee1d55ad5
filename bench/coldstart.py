"""Where an engine's start goes: when each milestone's line appeared in a log, by this process's clock.

Not from the log's own stamps: they have whole seconds, and their format moves between versions. Lines change too, so a
milestone that never shows is left out rather than guessed.
"""

from __future__ import annotations

import contextlib
import re
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

MILESTONES = {
    "imported_s": re.compile(rb"non-default args|vLLM API server version"),
    "engine_core_s": re.compile(rb"Initializing a V1 LLM engine"),
    "weights_loaded_s": re.compile(rb"Model loading took|Loading weights took"),
    "compiled_s": re.compile(rb"torch\.compile took|torch\.compile and initial profiling"),
    "graphs_captured_s": re.compile(rb"Graph capturing finished"),
    "engine_ready_s": re.compile(rb"init engine \(profile"),
}


@dataclass
class ColdStart:
    """Seconds since `began` (monotonic) at which each milestone was seen; call `look` a few times a second."""

    logs: Callable[[], Iterable[Path]]
    began: float = field(default_factory=time.monotonic)
    seen_s: dict[str, float] = field(default_factory=dict)

    def look(self) -> None:
        missing = MILESTONES.keys() - self.seen_s.keys()
        for path in self.logs() if missing else ():
            with contextlib.suppress(OSError):
                text = path.read_bytes()
                for name in missing:
                    if name not in self.seen_s and MILESTONES[name].search(text):
                        self.mark(name)

    def mark(self, name: str) -> None:
        """Note a milestone that shows elsewhere than in the log."""
        self.seen_s[name] = round(time.monotonic() - self.began, 2)
