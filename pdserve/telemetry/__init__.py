"""Logs and metrics. Metrics are imported from pdserve.telemetry.metrics by those who serve them."""

from pdserve.telemetry.logs import request_context, setup_logging

__all__ = ["request_context", "setup_logging"]
