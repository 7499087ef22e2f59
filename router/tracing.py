"""Whether traces are exported. Where they are not, no part of OpenTelemetry is imported."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from pdserve.config import TracesConfig
from pdserve.errors import ConfigError
from router.timelines import Timeline


class Exporter(Protocol):
    """router/trace_export.py's TraceExporter, without importing it."""

    def offer(self, timeline: Timeline) -> None: ...

    def counts(self) -> Mapping[str, int]: ...

    def close(self) -> None: ...


def open_exporter(config: TracesConfig) -> Exporter | None:
    """None: off. Raises ConfigError where OpenTelemetry is not installed."""
    if not config.endpoint:
        return None
    try:
        from router.trace_export import TraceExporter  # noqa: PLC0415
    except ImportError as error:
        raise ConfigError(
            f"telemetry.traces.endpoint = {config.endpoint!r} needs OpenTelemetry, which is not "
            f"installed ({error}): pip install '.[otel]' in the checkout, or leave the endpoint "
            "empty"
        ) from error
    return TraceExporter(config)
