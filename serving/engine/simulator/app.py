"""The simulator's routes, and the life of one generation."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from urllib.parse import parse_qs

from prometheus_client import CollectorRegistry
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest

import serving
from serving.engine.simulator import tokens, wire
from serving.engine.simulator.asgi import Exchange, Receive, Scope, Send
from serving.engine.simulator.core import ClientGone, Core, EngineDead, Sequence, ShutDown
from serving.engine.simulator.models import Models
from serving.engine.simulator.sins import Sins

# Answers end by themselves after this many chat tokens ("stop"); completions without max_tokens get vLLM's 16.
DEFAULT_CHAT_TOKENS = 64
MAX_CHOICES = 16384  # vLLM's bound of `n`
DEFAULT_COMPLETION_TOKENS = 16

Handler = Callable[[Exchange], Awaitable[None]]


class App:
    """vLLM's HTTP surface, as far as this repository relies on it."""

    def __init__(
        self,
        models: Models,
        core: Core,
        sins: Sins,
        registry: CollectorRegistry,
        *,
        name_requests: bool = False,
        force_usage: bool = False,
        track_load: bool = False,
        prefix_block: int = 0,
        prompt_details: bool = False,
    ) -> None:
        """`prefix_block`: tokens of a block that prompts share; 0: they share nothing. `prompt_details`: usage tells how
        much was shared."""
        self._models = models
        self._core = core
        self._sins = sins
        self._registry = registry
        self._name_requests = name_requests
        self._force_usage = force_usage
        self._track_load = track_load
        self._prefix_block = prefix_block
        self._prompt_details = prompt_details
        self._load = 0
        self._routes: dict[str, dict[str, Handler]] = {
            "/v1/chat/completions": {"POST": self._chat},
            "/v1/completions": {"POST": self._completion},
            "/v1/models": {"GET": self._list_models},
            "/tokenize": {"POST": self._tokenize},
            "/detokenize": {"POST": self._detokenize},
            "/health": {"GET": self._health},
            "/ping": {"GET": self._health, "POST": self._health},
            "/metrics": {"GET": self._metrics},
            "/metrics/": {"GET": self._metrics},
            "/version": {"GET": self._version},
            "/load": {"GET": self._server_load},
            "/-/sins": {"POST": self._take_sins},
        }

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            raise NotImplementedError(f"the simulator speaks HTTP only, not {scope['type']}")
        exchange = Exchange(scope, receive, send, self._name_requests)
        methods = self._routes.get(exchange.path)
        if methods is None:
            await exchange.json(404, {"detail": "Not Found"})
        elif exchange.method not in methods:
            allow = (b"allow", ", ".join(methods).encode())
            await exchange.json(405, {"detail": "Method Not Allowed"}, allow)
        else:
            try:
                await methods[exchange.method](exchange)
            except wire.Refusal as refusal:
                await exchange.json(refusal.status, refusal.body)
            except ClientGone:
                pass

    async def _chat(self, exchange: Exchange) -> None:
        request = wire.parse(await _json_body(exchange), wire.ChatRequest)
        wanted = request.max_completion_tokens if request.max_completion_tokens is not None else request.max_tokens
        await self._generate(exchange, wire.CHAT, request, tokens.pieces(_chat_prompt(request.messages)), wanted)

    async def _completion(self, exchange: Exchange) -> None:
        request = wire.parse(await _json_body(exchange), wire.CompletionRequest)
        prompt = _completion_prompt(request.prompt)
        wanted = DEFAULT_COMPLETION_TOKENS if request.max_tokens is None else request.max_tokens
        await self._generate(exchange, wire.COMPLETION, request, prompt, wanted)

    async def _generate(
        self,
        exchange: Exchange,
        dialect: wire.Dialect,
        request: wire.Generation,
        pieces: list[bytes],
        wanted: int | None,
    ) -> None:
        """Validate, wait for a slot, answer token by token; leave at once when the client does."""
        if request.stream_options and not request.stream:
            message = "Stream options can only be defined when `stream=True`. (parameter=stream_options)"
            raise wire.Refusal(400, message, param="stream_options")
        choices = 1 if request.n is None else request.n
        if choices < 1:
            raise wire.bad_value(f"n must be at least 1, got {choices}.", "n", choices)
        if choices > MAX_CHOICES:
            raise wire.bad_value(f"n must be at most {MAX_CHOICES}, got {choices}.", "n", choices)
        model = self._models.resolve(request.model)
        if self._core.dead:
            raise wire.engine_dead()
        prompt, prompt_tokens = tokens.text(pieces), len(pieces)
        granted = wire.budget(prompt_tokens, wanted, DEFAULT_CHAT_TOKENS, self._models.max_model_len)
        reason = "stop" if wanted is None and granted == DEFAULT_CHAT_TOKENS else "length"
        self._sins.before_generation(prompt, self._core)

        identity = self._models.identity(model)
        blocks = tokens.blocks(pieces, self._prefix_block, (identity, request.cache_salt)) if self._prefix_block else []
        answers = [tokens.Answer(identity, prompt, choice) for choice in range(choices)]
        self._load += self._track_load
        try:
            with self._core.sequence(prompt_tokens, granted, blocks, choices) as sequence:
                reply = wire.Reply.new(
                    dialect,
                    exchange.header(b"x-request-id"),
                    model,
                    prompt_tokens,
                    (lambda: (sequence.cached, sequence.kept)) if self._prompt_details else None,
                )
                watch = asyncio.create_task(_fail_when_gone(exchange, sequence))
                try:
                    if request.stream:
                        events = wire.Events(reply, request.stream_options, self._force_usage)
                        await _stream(exchange, sequence, answers, events, reason)
                    else:
                        await _full(exchange, sequence, answers, reply, reason)
                finally:
                    watch.cancel()
        finally:
            self._load -= self._track_load

    async def _tokenize(self, exchange: Exchange) -> None:
        request = wire.parse(await _json_body(exchange), wire.TokenizeRequest)
        self._models.resolve(request.model)
        if request.messages is not None:
            text = _chat_prompt(request.messages)
        elif request.prompt is not None:
            text = request.prompt
        else:
            raise wire.invalid_body("missing", "body.prompt", "Field required")
        ids = tokens.encode(text)
        strings = tokens.strings(text) if request.return_token_strs else None
        await exchange.json(
            200,
            {"count": len(ids), "max_model_len": self._models.max_model_len, "tokens": ids, "token_strs": strings},
        )

    async def _detokenize(self, exchange: Exchange) -> None:
        request = wire.parse(await _json_body(exchange), wire.DetokenizeRequest)
        self._models.resolve(request.model)
        await exchange.json(200, {"prompt": tokens.decode(request.tokens)})

    async def _list_models(self, exchange: Exchange) -> None:
        await exchange.json(200, self._models.cards())

    async def _health(self, exchange: Exchange) -> None:
        await exchange.answer(200 if self._sins.healthy(self._core.dead) else 503, b"", b"")

    async def _metrics(self, exchange: Exchange) -> None:
        names = parse_qs(exchange.query).get("name[]")
        registry = self._registry.restricted_registry(names) if names else self._registry
        await exchange.answer(200, generate_latest(registry), CONTENT_TYPE_LATEST.encode())

    async def _version(self, exchange: Exchange) -> None:
        await exchange.json(200, {"version": f"{serving.__version__}+sim"})

    async def _server_load(self, exchange: Exchange) -> None:
        await exchange.json(200, {"server_load": self._load})

    async def _take_sins(self, exchange: Exchange) -> None:
        """From now on this engine sins as the body says: `bench.chaos` turns one engine of a running stack bad."""
        told = wire.parse(await _json_body(exchange), wire.SinsRequest)
        try:
            self._sins = self._core.sins = Sins(frozenset(told.names), told.after)
        except ValueError as error:
            raise wire.Refusal(400, str(error)) from None
        await exchange.json(200, {"sins": sorted(told.names)})


async def _stream(
    exchange: Exchange, sequence: Sequence, answers: list[tokens.Answer], events: wire.Events, reason: str
) -> None:
    """The 200 goes out before the wait for a slot, like vLLM's; after it, failure can only be said in an event."""
    await exchange.start_stream()
    last = sequence.max_tokens - 1
    choices = range(len(answers))
    try:
        while due := await sequence.next():
            if due.start == 0 and (opening := b"".join([events.opening(c) for c in choices])):
                await exchange.write(opening)
            chunk = b"".join([events.token(answers[c].token(i), i + 1, c) for i in due if i != last for c in choices])
            if due.stop > last:
                chunk += b"".join([events.last(answers[c].token(last), last + 1, reason, c) for c in choices])
            await exchange.write(chunk)
    except EngineDead:
        await exchange.write(wire.dead_event())
        await exchange.write(wire.DONE)
        await exchange.write(b"", more=False)
        return
    except ShutDown:
        # What a stopped vLLM does, and looks like a good end to whoever does not read the finish reason.
        reason = "abort"
        for c in choices:
            await exchange.write(
                (b"" if sequence.sent else events.opening(c)) + events.last(b"", sequence.sent, reason, c)
            )
    sequence.finish(reason)
    if events.usage_wanted:
        await exchange.write(events.usage(sequence.sent * len(answers)))
    await exchange.write(wire.DONE)
    await exchange.write(b"", more=False)


async def _full(
    exchange: Exchange, sequence: Sequence, answers: list[tokens.Answer], reply: wire.Reply, reason: str
) -> None:
    try:
        while await sequence.next():
            pass
    except EngineDead:
        raise wire.engine_dead() from None
    except ShutDown:
        reason = "abort"
    sequence.finish(reason)
    texts = [answer.text(sequence.sent) for answer in answers]
    await exchange.json(200, reply.full(texts, sequence.sent * len(answers), reason))


async def _fail_when_gone(exchange: Exchange, sequence: Sequence) -> None:
    await exchange.hung_up()
    sequence.fail(ClientGone())


async def _json_body(exchange: Exchange) -> bytes:
    media_type = (exchange.header(b"content-type") or "").lower().split(";", 1)[0]
    if media_type != "application/json":
        message = "1 validation error:\n  Unsupported Media Type: Only 'application/json' is allowed"
        raise wire.Refusal(400, message, "Bad Request")
    return await exchange.body()


def _chat_prompt(messages: list[wire.Message]) -> str:
    if not messages:
        message = "Cannot apply chat template to an empty conversation. Provide at least one message."
        raise wire.Refusal(400, message)
    return tokens.render_chat([(m.role, m.text()) for m in messages])


def _completion_prompt(prompt: str | list[str | int] | None) -> list[bytes]:
    """The tokens of a request's one prompt; it comes as text, as [text] or as token ids."""
    if isinstance(prompt, list) and len(prompt) == 1 and isinstance(prompt[0], str):
        prompt = prompt[0]
    if not prompt:
        message = "Either prompt or prompt_embeds must be provided and non-empty. (parameter=prompt)"
        raise wire.Refusal(400, message, param="prompt")
    if isinstance(prompt, str):
        return tokens.pieces(prompt)
    ids = [p for p in prompt if isinstance(p, int)]
    if len(ids) < len(prompt):
        raise wire.Refusal(400, "the simulator answers one prompt a request.", param="prompt")
    return [tokens.piece(i) for i in ids]
