"""A collector of traces: takes OTLP over HTTP and keeps the spans."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

OK, ERROR = 0, 2  # of `Span.status`, whose 0 says that nobody said
INTERNAL, SERVER, CLIENT = 1, 2, 3


@dataclass(frozen=True)
class Span:
    name: str
    trace: str
    id: str
    parent: str  # "" of a root
    kind: int
    status: int
    began: int  # Unix ns
    ended: int
    about: dict[str, Any]
    resource: dict[str, Any]

    @property
    def service(self) -> str:
        return str(self.resource["service.name"])


@dataclass
class Collector:
    """What came so far. `status` is what it answers with; `wait` holds every answer until it is set."""

    port: int = 0
    status: int = 200
    wait: threading.Event | None = None
    bodies: list[bytes] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)
    asked: int = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def spans(self) -> list[Span]:
        return [span for body in self.bodies for span in _read(body)]

    def of(self, trace: str) -> list[Span]:
        return [span for span in self.spans if span.trace == trace]


@contextlib.contextmanager
def collector() -> Iterator[Collector]:
    """On a free port, in threads."""
    found = Collector()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["content-length"]))
            found.asked += 1
            if found.wait is not None:
                found.wait.wait(30)
            taken = found.status == 200 and self.path == "/v1/traces"
            if taken:
                found.headers.append({k.lower(): v for k, v in self.headers.items()})
                found.bodies.append(body)
            self.send_response(found.status if self.path == "/v1/traces" else 404)
            self.send_header("content-length", "0")
            self.end_headers()

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    found.port = server.server_address[1]
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield found
    finally:
        if found.wait is not None:
            found.wait.set()
        server.shutdown()
        server.server_close()
        thread.join()


def _read(body: bytes) -> Iterator[Span]:
    for of_resource in ExportTraceServiceRequest.FromString(body).resource_spans:
        resource = _attributes(of_resource.resource.attributes)
        for scope in of_resource.scope_spans:
            for s in scope.spans:
                yield Span(
                    name=s.name,
                    trace=s.trace_id.hex(),
                    id=s.span_id.hex(),
                    parent=s.parent_span_id.hex(),
                    kind=s.kind,
                    status=s.status.code,
                    began=s.start_time_unix_nano,
                    ended=s.end_time_unix_nano,
                    about=_attributes(s.attributes),
                    resource=resource,
                )


def _attributes(pairs: Any) -> dict[str, Any]:
    return {pair.key: _value(pair.value) for pair in pairs}


def _value(value: Any) -> Any:
    kind = value.WhichOneof("value")
    return [_value(v) for v in value.array_value.values] if kind == "array_value" else getattr(value, kind)
