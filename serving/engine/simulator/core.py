"""The simulated engine core: slots, KV room, a FIFO of the waiting, and the clock that makes tokens fall due."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Sequence as Seq
from types import TracebackType

from serving.engine.simulator.kv import Held, KvCache
from serving.engine.simulator.metrics import Metrics
from serving.engine.simulator.sins import Sins

# Long enough that bytes written before a sin strikes have left the process.
_FLUSH_S = 0.005
# Tokens fall due on a grid of at most this, and never coarser than a hundredth of the ITL: streams that share a wake-up
# cost a third less CPU. The schedule itself stays exact, so lateness does not add up.
_GRID_S = 0.010


class EngineDead(Exception):
    """The core died under this request; the client sees vLLM's dead-engine error."""


class ShutDown(Exception):
    """The server was told to stop: open answers end where they are, with finish reason "abort"."""


class ClientGone(Exception):
    """The client hung up; nothing is left to answer."""


class Core:
    """Admits requests first come, first served, while a slot and their KV room are free.

    A request holds prompt + max_tokens tokens of `kv` from admission to its end, so that a test can count on who waits; with
    `preempts` its answer takes them as they come, as vLLM's do: when there is no more, who was admitted last gives up what it
    holds, waits before all others, and what it had is computed again.

    Prompts are computed one after the other, `prefill_s` a token, but for what is in the cache; then the first token takes
    `ttft_s`.
    """

    def __init__(
        self,
        *,
        slots: int,
        kv: KvCache,
        ttft_s: float,
        itl_s: float,
        sins: Sins,
        metrics: Metrics,
        prefill_s: float = 0.0,
        preempts: bool = False,
    ) -> None:
        self.slots = slots
        self.kv = kv
        self.ttft_s = ttft_s
        self.prefill_s = prefill_s
        self.preempts = preempts
        self.itl_s = itl_s
        self.grid_s = min(_GRID_S, itl_s / 100)
        self.sins = sins
        self.metrics = metrics
        self.running: dict[Sequence, None] = {}  # in the order of admission
        self.waiting: dict[Sequence, None] = {}  # a FIFO that forgets a member in O(1)
        self._prefilling_until = 0.0  # loop time
        self.frozen = False
        self.dead = False
        self._told = (0, 0, 0.0)
        metrics.watch(
            running=lambda: self._load()[0], waiting=lambda: self._load()[1], kv_usage=lambda: self._load()[2]
        )

    def sequence(self, prompt_tokens: int, max_tokens: int, blocks: Seq[int] = (), choices: int = 1) -> Sequence:
        """A generation to be used as a context manager: inside it counts as waiting or running. `blocks`: its prompt's
        whole blocks, for the cache. Its choices run in step and count as one request, where vLLM schedules each by itself."""
        return Sequence(self, prompt_tokens, max_tokens, blocks, choices)

    def prefill(self, tokens: int) -> float:
        """Computes so much of a prompt after all that were admitted before; the loop time at which that is done."""
        now = asyncio.get_running_loop().time()
        self._prefilling_until = max(now, self._prefilling_until) + tokens * self.prefill_s
        return self._prefilling_until

    def _load(self) -> tuple[int, int, float]:
        """Running, waiting, share of the KV room: as the core said last, so a core that stands still says no more. Prompts take
        their room little by little, as those do that vLLM computes in chunks."""
        if not self.frozen:
            still = sum(seq.prompt_left() for seq in self.running)
            self._told = len(self.running), len(self.waiting), (self.kv.used - still) / self.kv.tokens
        return self._told

    def die(self) -> None:
        """The core is dead for good: everyone inside fails now, everyone later is refused."""
        self.dead = True
        self._fail_all(EngineDead())

    @property
    def errored(self) -> bool:
        """What vLLM's engine client calls it, and our door asks."""
        return self.dead

    def shut_down(self) -> None:
        """End every open answer and refuse later ones."""
        self.dead = self.frozen = True
        if self.sins.stops_politely:
            self._fail_all(ShutDown())

    def _fail_all(self, error: Exception) -> None:
        for seq in [*self.running, *self.waiting]:
            seq.fail(error)

    def _enter(self, seq: Sequence) -> None:
        self.waiting[seq] = None
        self._admit()

    def _leave(self, seq: Sequence) -> None:
        self.waiting.pop(seq, None)
        if seq in self.running:
            self._let_go(seq)
        self._admit()

    def _let_go(self, seq: Sequence) -> None:
        del self.running[seq]
        assert seq.held is not None
        self.kv.free(seq.held)
        seq.held = None

    def grow(self, seq: Sequence, tokens: int) -> bool:
        """Room for so many tokens more of a running answer, made by whoever was admitted last; False when that was this one."""
        while self.preempts and seq.held is not None and not self.kv.grow(seq.held, tokens):
            last = next(reversed(self.running))
            self._let_go(last)
            self.waiting = {last: None, **self.waiting}
            last.pause()
            self.metrics.preempted()
        return seq.held is not None

    def _admit(self) -> None:
        while self.waiting and len(self.running) < self.slots:
            seq = next(iter(self.waiting))
            answer = seq.sent if self.preempts else seq.max_tokens
            seq.held = self.kv.take(seq.blocks, seq.prompt_tokens, seq.choices * answer)
            if seq.held is None:
                return
            del self.waiting[seq]
            self.running[seq] = None
            seq.begin()


class Sequence:
    """One generation. `next()` hands out its tokens as they fall due on a schedule fixed at admission, so that a late
    wake-up does not push later tokens back."""

    def __init__(self, core: Core, prompt_tokens: int, max_tokens: int, blocks: Seq[int], choices: int) -> None:
        self._core = core
        self.choices = choices
        self.prompt_tokens = prompt_tokens
        self.max_tokens = max_tokens
        self.blocks = blocks
        self.held: Held | None = None
        self.sent = 0
        self.cached = 0  # tokens of its prompt that were in the cache when it was first admitted
        self._uncomputed = 0
        self._arrived = self._last = asyncio.get_running_loop().time()
        self._started: float | None = None
        self._ready = 0.0  # when the first token after its admission falls due
        self._first_due = 0.0  # and when the first of all, had it never been preempted
        self._failed: Exception | None = None
        self._wake: asyncio.Future[None] | None = None

    def __enter__(self) -> Sequence:
        self._core._enter(self)
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None) -> None:
        self._core._leave(self)
        self._failed = None  # raised, its traceback holds this object: a ring, which only the collector would find

    def begin(self) -> None:
        """Called by the core at admission, and at that after a `pause`: then all that it had said is computed too."""
        core = self._core
        assert self.held is not None
        if not self.sent:
            self.cached = self.held.cached
        self._started = asyncio.get_running_loop().time()
        self._uncomputed = self.prompt_tokens + self.sent * self.choices - self.held.cached
        self._ready = core.prefill(self._uncomputed) + core.ttft_s
        self._first_due = self._ready - self.sent * core.itl_s
        self._settle()

    def pause(self) -> None:
        """Called by the core when it is preempted: no token falls due until it is admitted again."""
        self._started = None

    @property
    def kept(self) -> int:
        """Tokens of its prompt that are in the cache now and were not before; 0 before it is admitted."""
        return 0 if self.held is None else max(0, len(self.blocks) * self._core.kv.block_tokens - self.cached)

    def fail(self, error: Exception) -> None:
        """End the generation: the pending or the next `next()` raises `error`."""
        self._failed = self._failed or error
        self._settle()

    def prompt_left(self) -> float:
        """Tokens of the prompt that are not computed yet."""
        if not self._uncomputed or self._started is None or self._ready <= self._started:
            return 0.0
        done = (asyncio.get_running_loop().time() - self._started) / (self._ready - self._started)
        return self._uncomputed * max(0.0, 1.0 - done)

    async def next(self) -> range:
        """Indexes of the tokens due, one at least, all that are due when the caller comes late; empty at the end."""
        if self.sent == self.max_tokens:
            return range(0)
        while True:
            if self._started is None:
                await self._until(None)
            since = self._started
            await self._sin_or_wait(self._first_due + self.sent * self._core.itl_s)
            if self._started != since:  # preempted meanwhile
                continue
            now = asyncio.get_running_loop().time()
            tokens = range(self.sent, self._due_by(now))
            if self._core.grow(self, len(tokens) * self.choices):
                self._count(tokens, now)
                return tokens

    async def _sin_or_wait(self, due: float) -> None:
        core = self._core
        if self.sent == core.sins.strike_at:
            await self._until(max(due, asyncio.get_running_loop().time() + _FLUSH_S))
            core.sins.at_token(core)
        await self._until(due)
        if core.frozen:
            await self._until(None)

    def _due_by(self, now: float) -> int:
        """Tokens due until `now`, one more than `sent` at least: a timer may fire a little early."""
        core = self._core
        due = int((now - self._first_due) / core.itl_s) + 1 if core.itl_s else self.max_tokens
        strike_at = core.sins.strike_at
        bound = strike_at if strike_at is not None and self.sent < strike_at else self.max_tokens
        return max(self.sent + 1, min(due, bound, self.max_tokens))

    def _count(self, tokens: range, now: float) -> None:
        metrics, self.sent = self._core.metrics, tokens.stop
        if tokens.start == 0:
            metrics.first_token(self.prompt_tokens, self.cached, now - self._arrived)
        else:
            metrics.inter_token.observe(now - self._last)
        self._last = now
        computed, self._uncomputed = self._uncomputed, 0
        made = len(tokens) * self.choices
        metrics.tokens(made + computed, made)

    def finish(self, reason: str) -> None:
        """Count the request as answered. One whose client left is not counted, as in vLLM."""
        now = asyncio.get_running_loop().time()
        started = now if self._started is None else self._started
        self._core.metrics.finished(
            reason,
            prompt_tokens=self.prompt_tokens,
            tokens=self.sent * self.choices,
            waited_s=started - self._arrived,
            ran_s=now - started,
        )

    async def _until(self, when: float | None) -> None:
        """Sleep until loop time `when` (None: until settled), or raise at once what `fail` was given."""
        if self._failed is not None:
            raise self._failed
        loop = asyncio.get_running_loop()
        if when is not None and when <= loop.time():
            return
        self._wake = loop.create_future()
        if when is not None and (grid := self._core.grid_s):
            when = math.ceil(when / grid) * grid
        timer = None if when is None else loop.call_at(when, self._settle)
        try:
            await self._wake
        finally:
            if timer is not None:
                timer.cancel()
        if self._failed is not None:
            raise self._failed

    def _settle(self) -> None:
        if self._wake is not None and not self._wake.done():
            self._wake.set_result(None)
