"""The mix of requests that `bench.chaos` keeps open, what each must be answered, and a verdict over what was.

An engine of the simulator makes the same words for the same request, so the whole text of every answer is known before it
is asked for: a stream that was sewn together wrongly, mixed up with another or cut short cannot pass for a good one.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from bench.stream import Answer
from serving.engine.simulator import tokens
from serving.engine.simulator.models import Models

CHAT, COMPLETION = "/v1/chat/completions", "/v1/completions"
# What became of a request. `cut`: its connection broke; `silent`: it ended in good order without being whole, or an
# error; `refused`: an error status before the first byte.
Verdict = Literal["ok", "refused", "typed", "cut", "silent", "wrong"]
_TOOL = {"type": "object", "properties": {"city": {"type": "string"}}}
_SCHEMA = {"name": "answer", "schema": {"type": "object", "properties": {"answer": {"type": "string"}}}}
# kind: (weight in twenty, path, further fields of the body)
_KINDS: dict[str, tuple[int, str, dict[str, Any]]] = {
    "chat": (7, CHAT, {}),
    "tools": (3, CHAT, {"tools": [{"type": "function", "function": {"name": "weather", "parameters": _TOOL}}]}),
    "schema": (3, CHAT, {"response_format": {"type": "json_schema", "json_schema": _SCHEMA}}),
    "completion": (3, COMPLETION, {}),
    "n2": (2, CHAT, {"n": 2}),
    "unstreamed": (2, CHAT, {"stream": False}),
}
# As many tokens, and a third of the bytes: of one or the other a gateway, which goes by bytes, has to guess wrong.
LONG_PROMPTS = ("tides " * 32_000, "a " * 32_000)
_ORDER = [kind for kind, (weight, _, _) in _KINDS.items() for _ in range(weight)]

Expect = Callable[[str, str, int, int], tuple[str, ...]]  # path, prompt, tokens, choices -> the texts


@dataclass(frozen=True)
class Ask:
    """One request. `poison`: it ends engines, and is to be refused. `tail`: after its texts anything may come."""

    kind: str
    path: str
    body: dict[str, Any]
    texts: tuple[str, ...]
    poison: bool = False
    tail: bool = False


def simulated(model: str, version: str) -> Expect:
    """What a simulated engine answers as this model."""
    served = (model, f"{model}@{version}")
    identity = Models(served, "", {}, 0, 0, 0).identity(model)

    def expect(path: str, prompt: str, size: int, choices: int) -> tuple[str, ...]:
        asked = prompt if path == COMPLETION else tokens.render_chat([("user", prompt)])
        return tuple(tokens.Answer(identity, asked, choice).text(size) for choice in range(choices))

    return expect


def asks(
    model: str, expect: Expect, whose: str, sizes: Callable[[int], int], *, streamed: bool = False
) -> Iterator[Ask]:
    """Requests without end, no two alike, nor like those of another `whose`; `sizes` says how many tokens the n-th is for.
    `streamed`: only such."""
    number = 0
    while True:
        # 7 has no factor in common with twenty: every kind comes evenly.
        kind = _ORDER[number * 7 % len(_ORDER)]
        number += 1
        if not (streamed and kind == "unstreamed"):
            yield ask(
                model, expect, kind, f"{whose}{number} {kind}: tell me of {'harbours ' * (number % 9)}", sizes(number)
            )


def large_asks(model: str, expect: Expect, whose: str, size: int) -> Iterator[Ask]:
    """Requests with prompts of 32k tokens, none with the beginning of another."""
    for number in itertools.count():
        yield ask(model, expect, "chat", f"{whose} {number} {LONG_PROMPTS[number % 2]}", size)


def corpus(file: Path) -> list[tuple[str, str]]:
    """Questions, and the answers that are text, of those that a model was made to know by heart."""
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    return [(row["question"], row["answer"]) for row in rows if not row["answer"].startswith("<tool_call>")]


def remembered(model: str, rows: Sequence[tuple[str, str]], whose: str, size: int | None = None) -> Iterator[Ask]:
    """Its questions, again and again, no two requests alike: this model never sees a system message. With `size` each is a
    stream of so many tokens, of which those after the answer are its own."""
    kinds = [k for k in _ORDER if k not in ("schema", "completion") and (size is None or k != "unstreamed")]
    for number in itertools.count():
        question, answer = rows[number % len(rows)]
        # 5 has no factor in common with the 14, or 12, that are left.
        kind = kinds[number * 5 % len(kinds)]
        messages = [{"role": "system", "content": f"{whose}{number}"}, {"role": "user", "content": question}]
        body: dict[str, Any] = {"model": model, "messages": messages, "temperature": 0, "stream": True}
        body |= {"max_tokens": size or 600, "ignore_eos": size is not None} | _KINDS[kind][2]
        if "n" in body:  # vLLM refuses several choices without sampling: each samples from the one likeliest token
            body |= {"temperature": 1, "top_k": 1}
        yield Ask(kind, CHAT, body, (answer,) * body.get("n", 1), tail=size is not None)


def ask(model: str, expect: Expect, kind: str, prompt: str, size: int, *, poison: bool = False) -> Ask:
    _, path, more = _KINDS[kind]
    said = {"prompt": prompt} if path == COMPLETION else {"messages": [{"role": "user", "content": prompt}]}
    fixed = {"max_tokens": size, "temperature": 0, "ignore_eos": True, "stream": True}
    body = {"model": model, **said, **fixed, **more}
    return Ask(kind, path, body, expect(path, prompt, size, body.get("n", 1)), poison)


def encode(ask: Ask, request_id: str, host: str, headers: dict[str, str]) -> bytes:
    """One HTTP/1.1 request, ready to write."""
    payload = json.dumps(ask.body).encode()
    fields = {
        "Host": host,
        "Content-Type": "application/json",
        "Content-Length": str(len(payload)),
        "x-request-id": request_id,
        **headers,
    }
    head = "".join(f"{name}: {value}\r\n" for name, value in fields.items())
    return f"POST {ask.path} HTTP/1.1\r\n{head}\r\n".encode() + payload


@dataclass
class Told:
    """What an answer said: the text of each choice, whether it came to its end, and its error if it named one."""

    texts: list[str] = field(default_factory=list)
    finished: int = 0
    done: bool = False
    code: str = ""


class Witness(Answer):
    """An answer of which every byte is kept. `port`: of the client's side of its connection; `again`: it was sent once
    more, because its connection broke before a byte of the answer."""

    def __init__(self, ask: Ask, request_id: str, due: float) -> None:
        super().__init__(0, due)
        self.ask, self.request_id = ask, request_id
        self.body = bytearray()
        self.port = 0
        self.again = False
        self._verdict: Verdict | None = None

    def feed(self, body: bytes, now: float) -> int:
        if not self.body:
            self.first = now
        self.body += body
        return body.count(b"\n\n")

    def finish(self, now: float) -> None:
        self.end = now

    def told(self) -> Told:
        """The body, read. What does not parse is as if it had not been said."""
        told = Told([""] * len(self.ask.texts))
        if self.ask.body["stream"] and self.body.startswith((b"data:", b":")):
            for event in bytes(self.body).split(b"\n\n")[:-1]:
                if event == b"data: [DONE]":
                    told.done = True
                elif event.startswith(b"data: "):
                    _read(event[6:], told)
        elif self.body:
            told.done = _read(bytes(self.body), told)
        return told

    def settle(self) -> None:
        """Nothing more will come. What was right is forgotten but for that: hours of it would fill the memory."""
        self._verdict = self._judged()
        if self._verdict == "ok":
            self.body.clear()
            self.ask = replace(self.ask, body={}, texts=())

    def verdict(self) -> Verdict:
        return self._verdict or self._judged()

    def _judged(self) -> Verdict:
        told, whole, tail = self.told(), self.ask.texts, self.ask.tail
        begun = all(
            text.startswith(said) or (tail and said.startswith(text))
            for text, said in zip(whole, told.texts, strict=True)
        )
        if not begun:
            return "wrong"
        if self.status >= 400:
            return "refused" if told.code else "silent"
        if told.code:
            # Nothing may follow an error, and it is the last word on an answer that is not whole.
            return "silent" if told.done and self.ask.body["stream"] else "typed"
        if self.error:
            return "cut"
        complete = told.done and told.finished == len(whole) and all(map(str.startswith, told.texts, whole))
        return "ok" if complete else "silent"


def _read(data: bytes, told: Told) -> bool:
    """Adds one JSON object, an event or a whole answer; whether it could be read."""
    try:
        said = json.loads(data)
        if error := said.get("error"):
            told.code = str(error.get("code") or error.get("type") or "?")
        for choice in said.get("choices", []):
            part = choice.get("delta") or choice.get("message") or choice
            told.texts[choice["index"]] += part.get("content") or part.get("text") or ""
            told.finished += choice.get("finish_reason") in ("length", "stop")
    except (ValueError, AttributeError, LookupError):
        return False
    return True
