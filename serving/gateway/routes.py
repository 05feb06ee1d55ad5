"""The allow-list: which method and path is served, and which body fields pass. Everything else is refused with a reason.

A path or field of a newer engine is refused until someone lists it here, so that nothing new crosses the boundary by
an upgrade. A test walks the installed vLLM's route table and request models against these tables.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

import msgspec

from serving.errors import BadRequest, Dialect, UnknownRoute, WrongMethod

_SAMPLING = """
    frequency_penalty presence_penalty repetition_penalty logit_bias n seed stop stream stream_options temperature top_p
    top_k min_p length_penalty stop_token_ids include_stop_str_in_output ignore_eos min_tokens skip_special_tokens
    spaces_between_special_tokens truncate_prompt_tokens truncation_side prompt_logprobs logprob_token_ids allowed_token_ids
    bad_words use_beam_search watermarking add_special_tokens structured_outputs repetition_detection
    thinking_token_budget return_tokens_as_token_ids return_token_ids return_token_offsets stream_interval
"""
_CHAT = """
    messages model logprobs top_logprobs max_tokens max_completion_tokens response_format tools tool_choice
    reasoning_effort include_reasoning parallel_tool_calls user echo add_generation_prompt continue_final_message
    documents chat_template_kwargs return_prompt_text metadata service_tier store prompt_cache_key safety_identifier
    verbosity
"""
_COMPLETION = "model prompt echo logprobs max_tokens suffix user response_format"
_RESPONSES = """
    background include input instructions max_output_tokens max_tool_calls metadata model logit_bias parallel_tool_calls
    previous_response_id prompt reasoning include_reasoning service_tier store stream stream_options temperature text
    tool_choice tools top_logprobs top_p top_k min_p truncation user skip_special_tokens include_stop_str_in_output
    presence_penalty frequency_penalty prompt_cache_key safety_identifier watermarking structured_outputs
    repetition_penalty seed stop stop_token_ids ignore_eos chat_template_kwargs enable_response_messages
"""
_MESSAGES = """
    model messages max_tokens metadata output_config thinking stop_sequences stream system temperature tool_choice tools
    top_k top_p watermarking chat_template_kwargs service_tier
"""
_POOLING = "model user input messages truncate_prompt_tokens truncation_side padding add_special_tokens use_activation"
_CLASSIFY = f"{_POOLING} add_generation_prompt continue_final_message chat_template_kwargs"
_EMBED = f"{_CLASSIFY} encoding_format embed_dtype endianness dimensions"
_PAIRS = """
    model user truncate_prompt_tokens truncation_side padding use_activation max_tokens_per_query max_tokens_per_doc
    instruction chat_template_kwargs
"""
_SCORED = "data_1 data_2 queries documents items text_1 text_2"
_RERANKED = "query documents"

# Refused fields: why, and the name in the model file's `allow:` list that lets them through (None: never).
_REFUSED: Mapping[str, tuple[str, str | None]] = {
    "priority": ("one client could push its requests before everybody's", "priority"),
    "cache_salt": ("it decides whose prefix cache is shared", "cache_salt"),
    "kv_transfer_params": ("it addresses other engines' KV memory", "kv_transfer_params"),
    "ec_transfer_params": ("it addresses other engines' encoder memory", "kv_transfer_params"),
    "vllm_xargs": ("it reaches engine plug-ins", "vllm_xargs"),
    "request_id": ("send the `x-request-id` header instead", None),
    "session_id": ("it is the engine's own session state", None),
    "chat_template": ("a template is code; it belongs to the model's weights", None),
    "prompt_embeds": ("it deserialises tensors inside the engine", None),
    "media_io_kwargs": ("it configures the engine's media loader", None),
    "mm_processor_kwargs": ("it configures the engine's media processor", None),
    "mm_payload": ("it deserialises tensors inside the engine", None),
    "return_mm_kwargs": ("it exposes the engine's internals", None),
    "routed_experts_prompt_start": ("it exposes the engine's internals", None),
    "previous_input_messages": ("responses are stateless here: send the whole input", None),
    "data": ("it reaches engine plug-ins", None),
    "task": ("the model's task is fixed by its catalog entry", None),
}
# Fields that pass only while they ask for nothing.
_STATEFUL: Mapping[str, str] = {
    "store": "nothing is stored here",
    "background": "responses are not kept, so a background response could not be fetched",
    "previous_response_id": "responses are stateless here: send the whole input",
}


class Route(msgspec.Struct, frozen=True):
    """A served POST route. `ends` are the byte patterns one of which ends a complete stream of it."""

    path: str
    dialect: Dialect
    fields: frozenset[str]
    ends: tuple[bytes, ...] = ()
    opening: int = 0  # events of a stream before its first token
    finish: re.Pattern[bytes] | None = None  # says why a stream ended, in one of its events
    usage_by_option: bool = False  # usage in a stream must be asked for by stream_options.include_usage
    content: tuple[str, ...] = ("messages", "input", "system")  # fields whose parts may hold media
    # Fields that bound the answer's tokens, the first that is given counts; empty: nothing is generated; None: the model
    # does not even run.
    answer: tuple[str, ...] | None = ()
    answer_default: int | None = None  # tokens, where the engine has a bound of its own


def _route(path: str, fields: str, dialect: Dialect = "openai", **more: Any) -> Route:
    return Route(path, dialect, frozenset(fields.split()), **more)


_DONE = (b"data: [DONE]",)
# OpenAI's events have a `stop_reason` beside it, which may be the client's own stop string.
_FINISH_REASON = re.compile(rb'"finish_reason":"(\w{1,40})"')
SERVED: Mapping[str, Route] = {
    r.path: r
    for r in (
        _route(
            "/v1/chat/completions",
            _CHAT + _SAMPLING,
            ends=_DONE,
            opening=1,
            finish=_FINISH_REASON,
            usage_by_option=True,
            answer=("max_completion_tokens", "max_tokens"),
        ),
        _route(
            "/v1/completions",
            _COMPLETION + _SAMPLING,
            ends=_DONE,
            finish=_FINISH_REASON,
            usage_by_option=True,
            answer=("max_tokens",),
            answer_default=16,
        ),
        _route(
            "/v1/responses",
            _RESPONSES,
            ends=(b"event: response.completed", b"event: response.failed", b"event: response.incomplete"),
            opening=4,
            finish=re.compile(rb"^event: response\.(completed|failed|incomplete)$", re.M),  # the answer's `status`
            answer=("max_output_tokens",),
        ),
        _route(
            "/v1/messages",
            _MESSAGES,
            "anthropic",
            ends=(b"event: message_stop",),
            opening=2,
            finish=re.compile(rb'"stop_reason":"(\w{1,40})"'),
            answer=("max_tokens",),
        ),
        _route("/v1/messages/count_tokens", _MESSAGES, "anthropic", answer=None),
        _route("/v1/embeddings", _EMBED),
        _route("/pooling", _EMBED),
        _route("/classify", _CLASSIFY),
        *(_route(p, f"{_PAIRS} {_SCORED}", content=tuple(_SCORED.split())) for p in ("/score", "/v1/score")),
        *(
            _route(p, f"{_PAIRS} {_RERANKED} top_n", content=tuple(_RERANKED.split()))
            for p in ("/rerank", "/v1/rerank", "/v2/rerank")
        ),
        _route("/tokenize", _CHAT + " prompt add_special_tokens return_token_strs", answer=None),
        _route("/detokenize", "model tokens", answer=None),
    )
}

# GET paths the gateway answers itself, with the scope each needs ("" open, None: any good key).
OWN: Mapping[str, str | None] = {
    "/healthz": "",
    "/-/healthz": "",
    "/readyz": "",
    "/v1/models": None,
    "/metrics": "metrics",
    "/metrics/targets": "metrics",
}

_ADMIN = "an engine's control route; nobody reaches it through a gateway"
_STATE = "responses are not kept here: every request is stateless"
_MULTIPART = "audio uploads are not served by this version"
_INTERNAL = "a route between engines, not for clients"
REFUSED: Mapping[str, str] = {
    **dict.fromkeys(
        [
            "/v1/load_lora_adapter",
            "/v1/unload_lora_adapter",
            "/load",
            "/version",
            "/server_info",
            "/reset_prefix_cache",
            "/reset_mm_cache",
            "/reset_encoder_cache",
            "/collective_rpc",
            "/sleep",
            "/wake_up",
            "/is_sleeping",
            "/release_kv_cache_memory",
            "/start_profile",
            "/stop_profile",
            "/scale_elastic_ep",
            "/is_scaling_elastic_ep",
            "/pause",
            "/resume",
            "/is_paused",
            "/init_weight_transfer_engine",
            "/shutdown_weight_transfer_engine",
            "/start_weight_update",
            "/update_weights",
            "/finish_weight_update",
            "/get_world_size",
            "/fault_tolerance/apply",
            "/fault_tolerance/status",
            "/kv_event_sources",
            "/tokenizer_info",
            "/update_weight_version",
            "/get_weight_version",
            "/start_draft_weight_update",
            "/finish_draft_weight_update",
            "/weight_info",
            "/weight_checker",
            "/adapters",
            "/adapters/{adapter_name}",
        ],
        _ADMIN,
    ),
    **dict.fromkeys(["/health", "/ping"], "engine health is the fleet's business: ask /healthz or /readyz"),
    "/invocations": "SageMaker's shape; use the OpenAI or Anthropic routes",
    **dict.fromkeys(
        ["/docs", "/redoc", "/openapi.json", "/docs/oauth2-redirect"], "the engine's own documentation pages"
    ),
    **dict.fromkeys(["/v1/audio/transcriptions", "/v1/audio/translations", "/v1/realtime"], _MULTIPART),
    **dict.fromkeys(["/v1/responses/{response_id}", "/v1/responses/{response_id}/cancel"], _STATE),
    **dict.fromkeys(
        [
            "/inference/v1/generate",
            "/inference/v1/abort_requests",
            "/abort_requests",
            "/v1/chat/completions/render",
            "/v1/chat/completions/derender",
            "/v1/completions/render",
            "/v1/completions/derender",
            "/v1/messages/render",
            "/v1/responses/render",
        ],
        _INTERNAL,
    ),
    **dict.fromkeys(
        ["/v2/embed", "/v2/chat", "/v1/systemone", "/generative_scoring", "/v1/chat/completions/batch"],
        "not an OpenAI or Anthropic route; not served by this version",
    ),
}


def dialect_of(path: str) -> Dialect:
    """Errors on Anthropic's paths are Anthropic's, on every other path OpenAI's."""
    return "anthropic" if path.startswith("/v1/messages") else "openai"


def match(method: str, path: str) -> Route | str:
    """The served route, or the own path; raises UnknownRoute (404) or WrongMethod (405)."""
    route = SERVED.get(path)
    if route is not None:
        if method != "POST":
            raise WrongMethod(f"{path} takes POST, not {method}", "POST")
        return route
    own = path if path in OWN else "/v1/models" if path.startswith("/v1/models/") else None
    if own is not None:
        if method not in ("GET", "HEAD"):
            raise WrongMethod(f"{path} takes GET, not {method}", "GET, HEAD")
        return own
    reason = REFUSED.get(path)
    if reason is None and path.startswith("/v1/responses/"):
        reason = _STATE
    if reason is not None:
        raise UnknownRoute(f"{_short(path)} is not served: {reason}")
    served = f"{', '.join(sorted(SERVED))} and {', '.join(sorted(OWN))}"
    raise UnknownRoute(f"{_short(path)} is not served; served are {served}")


def parse(body: bytes) -> dict[str, Any]:
    """The one JSON parse of a request. Raises BadRequest with what is wrong and where."""
    if not body:
        raise BadRequest("the body is empty: send a JSON object")
    try:
        fields = msgspec.json.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError) as e:
        raise BadRequest(f"the body is not valid JSON: {e}") from None
    except RecursionError:
        raise BadRequest("the body is nested too deeply") from None
    if not isinstance(fields, dict):
        raise BadRequest("the body is not a JSON object")
    model = fields.get("model")
    if not isinstance(model, str) or not model:
        wrong = "is missing" if not model else f"is {type(model).__name__}, not a string"
        raise BadRequest(f"`model` {wrong}: name a model, model@version or adapter", param="model")
    return fields


def check(route: Route, fields: Mapping[str, Any], allow: Iterable[str]) -> None:
    """Raises BadRequest for the first field that may not pass. `allow` is the model file's list."""
    allowed = frozenset(allow)
    if not isinstance(
        fields.get("stream"), bool | None
    ):  # the engine would guess what it stands for, and we another thing
        raise BadRequest("`stream` is true or false", param="stream")
    for name, value in fields.items():
        if name in route.fields:
            if name in _STATEFUL and value:
                raise BadRequest(f"`{name}` is refused: {_STATEFUL[name]}", param=name)
        elif name in _REFUSED:
            why, switch = _REFUSED[name]
            if value is not None and switch not in allowed:
                can = f"; the model's `allow: [{switch}]` would let it pass" if switch else ""
                raise BadRequest(f"`{name}` is refused: {why}{can}", param=name)
        else:
            raise BadRequest(f"`{_short(name)}` is not a field of {route.path} here", param=_short(name))
    for name in route.content:
        if isinstance(fields.get(name), list | dict):
            _check_parts(fields[name], name, urls="media_urls" in allowed)


_MEDIA = frozenset(
    ["image_url", "video_url", "audio_url", "file_url", "input_audio", "image", "video", "audio", "source", "url"]
)
_TENSORS = frozenset(["image_embeds", "audio_embeds", "video_embeds", "prompt_embeds"])
# A client's own data, never fetched: tool definitions, arguments and the sources of earlier answers.
_OPAQUE = frozenset(["arguments", "parameters", "input_schema", "annotations", "citations"])
_CALL = _OPAQUE | {"input"}


_Where = tuple[Any, str | int]  # (the same of what holds it, or None; key or index): spelt out for an error only


def _check_parts(value: Any, field: str, *, urls: bool) -> None:
    """Media must come inside the request (`data:` URLs): an engine that fetches a client's URL or path reaches what
    the client could not. `urls`: the model's file allows it. Tensors never pass, as in `prompt_embeds`."""
    todo: list[tuple[Any, _Where]] = [(value, (None, field))]
    while todo:
        item, at = todo.pop()
        if isinstance(item, list):
            todo += [(v, (at, i)) for i, v in enumerate(item) if isinstance(v, dict | list)]
            continue
        kind = item.get("type")
        if not _TENSORS.isdisjoint(item) or (isinstance(kind, str) and kind in _TENSORS):
            raise BadRequest(f"{_spelt(at)}: embeddings are refused: {_REFUSED['prompt_embeds'][0]}", param=field)
        opaque = _CALL if kind == "tool_use" else _OPAQUE
        for name, v in item.items():
            if isinstance(v, str):
                if name in _MEDIA and not urls and not v.startswith("data:") and _is_reference(name, v):
                    raise BadRequest(
                        f"{_spelt((at, name))}: media by URL or path is refused (the model's `allow: [media_urls]` "
                        "would let it pass); send a data: URL",
                        param=field,
                    )
            elif isinstance(v, dict | list) and name not in opaque:
                todo.append((v, (at, name)))


def _spelt(at: _Where) -> str:
    parts: list[str] = []
    where: Any = at
    while where is not None:
        where, key = where
        parts.append(f"[{key}]" if isinstance(key, int) else f".{_short(key)}")
    return "".join(reversed(parts)).lstrip(".")


def _short(name: str) -> str:
    return name if len(name) <= 100 else name[:100] + "..."


def _is_reference(name: str, value: str) -> bool:
    """Base64 payloads (input_audio.data, source.data) carry other key names; under a URL key anything is one."""
    return name.endswith("url") or "://" in value or value.startswith(("/", "file:"))


def splice(body: bytes, extra: bytes) -> bytes:
    """`body` (a non-empty JSON object) with the members `extra` added at its end, where the last of two equal keys
    wins: changes a field of a request without encoding it again."""
    return body.rstrip()[:-1] + b"," + extra + b"}"
