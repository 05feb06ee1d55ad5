"""Scripted failures. Each sin is one line in one hook; an engine without sins is honest everywhere.

    slow_start         takes ten times as long before it listens
    never_ready        listens, but /health and every generation answer 503 for ever
    dies_mid_stream    the process is gone, without a word, after N tokens of a request
    dies_on_prompt     the process is gone when a prompt contains SIM_DIE
    core_dies_on_prompt  the same, as vLLM's engine core does: the server says so to everybody inside, and is gone soon
    hangs              after N tokens of a request no request gets another token; /health stays good
    returns_500        every generation answers 500
    lies_about_health  after N tokens of a request the engine core is dead: open streams end as vLLM ends them, every
                       later generation answers 500, and /health still says 200
    lingers            told to stop, it says nothing more to its open streams and stays until their clients leave: what
                       vLLM does when it kills its core before the core could abort them

N is `--sim-sin-after` (tokens); 0 strikes before the first token. `POST /-/sins {"names": [...], "after": N}` changes the
sins of an engine that runs; the door demands its secret there as everywhere.
"""

from __future__ import annotations

import asyncio
import os
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from serving.engine.simulator import wire

if TYPE_CHECKING:
    from serving.engine.simulator.core import Core

NAMES = (
    "slow_start",
    "never_ready",
    "dies_mid_stream",
    "dies_on_prompt",
    "core_dies_on_prompt",
    "hangs",
    "returns_500",
    "lies_about_health",
    "lingers",
)
SERVER_OUTLIVES_S = 0.5  # its core, as vLLM's does
_AT_TOKEN = frozenset({"dies_mid_stream", "hangs", "lies_about_health"})


@dataclass(frozen=True)
class Sins:
    """What this engine was told to do wrong. `strike_at` is None when no sin waits for a token."""

    names: frozenset[str] = frozenset()
    after: int = 8
    strike_at: int | None = field(init=False)

    def __post_init__(self) -> None:
        if unknown := sorted(self.names - set(NAMES)):
            raise ValueError(f"unknown sin {', '.join(unknown)}; known: {', '.join(NAMES)}")
        object.__setattr__(self, "strike_at", self.after if self.names & _AT_TOKEN else None)

    def start_s(self, honest: float) -> float:
        """Seconds between process start and listening."""
        return honest * 10 if "slow_start" in self.names else honest

    @property
    def stops_politely(self) -> bool:
        """Whether open answers are ended at SIGTERM."""
        return "lingers" not in self.names

    def healthy(self, core_dead: bool) -> bool:
        """What /health says."""
        return "never_ready" not in self.names and (not core_dead or "lies_about_health" in self.names)

    def before_generation(self, prompt: str, core: Core) -> None:
        """Called for each generation that passed validation."""
        if "never_ready" in self.names:
            raise wire.Refusal(503, "The engine is not ready.", "Service Unavailable")
        if "returns_500" in self.names:
            raise wire.Refusal(500, "Internal server error", "InternalServerError")
        if "dies_on_prompt" in self.names and "SIM_DIE" in prompt:
            os._exit(1)
        if "core_dies_on_prompt" in self.names and "SIM_DIE" in prompt:
            core.die()
            asyncio.get_running_loop().call_later(SERVER_OUTLIVES_S, os._exit, 1)
            raise wire.engine_dead()

    def at_token(self, core: Core) -> None:
        """Called when some request has been given `strike_at` tokens and is due the next."""
        if "dies_mid_stream" in self.names:
            os._exit(1)
        if "lies_about_health" in self.names:
            core.die()
        if "hangs" in self.names:
            core.frozen = True
