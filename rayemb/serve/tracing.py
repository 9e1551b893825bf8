"""Spans of a request for OpenTelemetry, where asked for (extra `tracing`); nothing is imported or done otherwise."""

from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

from rayemb.serve.errors import ServeError

Headers = Iterable[tuple[bytes, bytes]]
_NOTHING: AbstractContextManager[None] = nullcontext()


class Tracer(Protocol):
    """Opens spans; one inside another is its child."""

    def span(self, name: str, attributes: Mapping[str, Any] | None = None) -> AbstractContextManager[Any]:
        """A span from entering to leaving."""
        ...

    def request(self, name: str, headers: Headers) -> AbstractContextManager[Any]:
        """The span of a whole request; the child of the caller's, if `headers` have a `traceparent`."""
        ...


class NoTracer:
    """Opens none."""

    def span(self, name: str, attributes: Mapping[str, Any] | None = None) -> AbstractContextManager[Any]:
        """Nothing."""
        return _NOTHING

    def request(self, name: str, headers: Headers) -> AbstractContextManager[Any]:
        """Nothing."""
        return _NOTHING


class OpenTelemetry:
    """Spans to an exporter of the OpenTelemetry SDK, in batches from a thread of their own."""

    def __init__(self, exporter: Any) -> None:
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
        from opentelemetry.trace import SpanKind
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        # Not the global provider: Ray and the user's own code may have theirs.
        self.provider = TracerProvider(resource=Resource.create({"service.name": "rayemb"}))
        self.provider.add_span_processor(BatchSpanProcessor(exporter))
        self._tracer = self.provider.get_tracer("rayemb.serve")
        self._propagator, self._server = TraceContextTextMapPropagator(), SpanKind.SERVER

    def span(self, name: str, attributes: Mapping[str, Any] | None = None) -> AbstractContextManager[Any]:
        """A span from entering to leaving."""
        return self._tracer.start_as_current_span(name, attributes=dict(attributes or {}))

    def request(self, name: str, headers: Headers) -> AbstractContextManager[Any]:
        """The span of a whole request."""
        parent = self._propagator.extract({key.decode("latin-1"): value.decode("latin-1") for key, value in headers})
        return self._tracer.start_as_current_span(name, parent, self._server)


def open_tracer(endpoint: str | None) -> Tracer:
    """Spans to an OTLP collector at `endpoint` (HTTP), or none. Raises ServeError if the extra is not installed."""
    if endpoint is None:
        return NoTracer()
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    except ImportError as error:
        raise ServeError(
            f"{error.name} is not installed", where="serve.tracing", fix="pip install 'rayemb[tracing]'"
        ) from error
    return OpenTelemetry(OTLPSpanExporter(endpoint=endpoint))
