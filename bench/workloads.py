"""What clients ask: seeded lists of calls, the same for the raw engine and for the stack.

Lengths of prompts are in characters: the tiny model's byte-level tokenizer makes at most one token of an ASCII
character, so a character budget is a safe token budget whatever the tokenizer was trained on.
"""

from __future__ import annotations

import random
from dataclasses import asdict, dataclass
from typing import Any

_TEXT = (
    "order invoice parcel return refund address customer delivery payment account password warranty battery screen "
    "charger blue small heavy late early broken new old second first please tell explain why how when where what which "
    "number date name city street week month day hour the a an of for with without from to and or but not is was are"
)
_WORDS = _TEXT.split()


@dataclass(frozen=True)
class Call:
    """One request: `at_s` seconds after the phase began (open loop only), answered with exactly `max_tokens` tokens."""

    at_s: float
    prompt: str
    max_tokens: int


@dataclass(frozen=True)
class Uniform:
    """`n` short, distinct prompts of about `chars` characters, `max_tokens` tokens out each, or evenly drawn from so many
    by `spread` more or less."""

    seed: int
    n: int = 2000
    chars: int = 60
    max_tokens: int = 64
    spread: int = 0

    def calls(self) -> list[Call]:
        rng, lengths = random.Random(self.seed), random.Random(f"lengths {self.seed}")
        shortest, longest = self.max_tokens - self.spread, self.max_tokens + self.spread
        return [Call(0.0, f"{i} {_text(rng, self.chars)}", lengths.randint(shortest, longest)) for i in range(self.n)]


@dataclass(frozen=True)
class Production:
    """Bursty arrivals (gamma gaps, `burstiness` = squared coefficient of variation), lognormal prompts and outputs,
    and every third prompt (`shared`) opening with one of a few long common prefixes.

    `rate_per_s` is the mean arrival rate in requests per second over `duration_s`. A prompt and its output together
    stay under `context` tokens (chat template included), whatever is drawn.
    """

    seed: int
    duration_s: float
    rate_per_s: float
    prompt_median: float = 300.0
    output_median: float = 48.0
    context: int = 2048
    shared: float = 0.3
    burstiness: float = 3.0

    def calls(self) -> list[Call]:
        rng = random.Random(self.seed)
        prefixes = [_text(random.Random(f"prefix {i}"), int(1.5 * self.prompt_median)) for i in range(6)]
        template, longest_output = 64, self.context // 4
        longest_prompt = self.context - longest_output - template
        calls: list[Call] = []
        shape = 1.0 / self.burstiness
        at_s = rng.gammavariate(shape, 1.0 / (self.rate_per_s * shape))
        while at_s < self.duration_s:
            chars = int(rng.lognormvariate(0.0, 0.8) * self.prompt_median)
            tokens = int(rng.lognormvariate(0.0, 0.7) * self.output_median)
            opening = rng.choice(prefixes) if rng.random() < self.shared else ""
            prompt = f"{opening} {len(calls)} {_text(rng, chars)}".strip()[:longest_prompt]
            calls.append(Call(at_s, prompt, max(4, min(tokens, longest_output))))
            at_s += rng.gammavariate(shape, 1.0 / (self.rate_per_s * shape))
        return calls


@dataclass(frozen=True)
class Steady:
    """`n` long streams whose starts are spread evenly over `ramp_s` seconds, `max_tokens` tokens each."""

    seed: int
    n: int
    ramp_s: float
    max_tokens: int

    def calls(self) -> list[Call]:
        rng = random.Random(self.seed)
        return [Call(self.ramp_s * i / self.n, f"{i} {_text(rng, 40)}", self.max_tokens) for i in range(self.n)]


@dataclass(frozen=True)
class Listed:
    """Calls one by one: `(at_s, prompt, max_tokens)`."""

    entries: tuple[tuple[float, str, int], ...]

    def calls(self) -> list[Call]:
        return [Call(*entry) for entry in self.entries]


Workload = Uniform | Production | Steady | Listed
_KINDS: dict[str, type[Workload]] = {kind.__name__.lower(): kind for kind in (Uniform, Production, Steady, Listed)}


def together(*workloads: Workload) -> Listed:
    """All of them at once, for an open loop."""
    calls = sorted((call for w in workloads for call in w.calls()), key=lambda call: call.at_s)
    return Listed(tuple((call.at_s, call.prompt, call.max_tokens) for call in calls))


def dump(workload: Workload) -> dict[str, Any]:
    """A workload as JSON; `load` is its inverse."""
    return {"kind": type(workload).__name__.lower(), **asdict(workload)}


def load(data: dict[str, Any]) -> Workload:
    """The workload that `dump` wrote. Raises KeyError for an unknown kind."""
    fields = dict(data)
    return _KINDS[fields.pop("kind")](**fields)


def _text(rng: random.Random, chars: int) -> str:
    words = rng.choices(_WORDS, k=max(1, chars // 5))
    return " ".join(words)[:chars]
