"""One tree of exceptions, and the one place where it meets gRPC codes and HTTP statuses.

A class is a kind of failure, told apart by type or by ``code``, never by its text. Whoever raises
names the field or part, the value and what is allowed. ``from_wire`` gives back on one side what
``code`` and ``str`` said on the other.
"""

from __future__ import annotations

from typing import ClassVar

import grpc


class PdserveError(Exception):
    """The root. ``retryable`` says whether another worker or a later moment may succeed."""

    code: ClassVar[str] = "internal"
    grpc_status: ClassVar[grpc.StatusCode] = grpc.StatusCode.INTERNAL
    http_status: ClassVar[int] = 500
    openai_type: ClassVar[str] = "server_error"
    retryable: ClassVar[bool] = False

    def __init__(
        self, message: str, *, param: str | None = None, retry_after_s: float | None = None
    ) -> None:
        super().__init__(message)
        self.param = param  # the request field at fault, if one is
        self.retry_after_s = retry_after_s


class InternalError(PdserveError):
    """A bug of ours, or a part that broke in a way that has no name of its own."""


class InvalidRequest(PdserveError):
    """The request can never succeed as it is."""

    code = "invalid_request"
    grpc_status = grpc.StatusCode.INVALID_ARGUMENT
    http_status = 400
    openai_type = "invalid_request_error"


class ContextTooLong(InvalidRequest):
    code = "context_length_exceeded"


class Unsupported(InvalidRequest):
    """A parameter whose meaning we cannot honour."""

    code = "unsupported_parameter"


class RequestTooLarge(InvalidRequest):
    code = "request_too_large"
    http_status = 413


class ModelNotFound(PdserveError):
    code = "model_not_found"
    grpc_status = grpc.StatusCode.NOT_FOUND
    http_status = 404
    openai_type = "invalid_request_error"


class RequestNotFound(PdserveError):
    """No request of this id, among those of this caller that are still known."""

    code = "request_not_found"
    grpc_status = grpc.StatusCode.NOT_FOUND
    http_status = 404
    openai_type = "invalid_request_error"


class WorkerNotFound(PdserveError):
    code = "worker_not_found"
    grpc_status = grpc.StatusCode.NOT_FOUND
    http_status = 404
    openai_type = "invalid_request_error"


class NotAllowed(PdserveError):
    """The cluster's state or its bounds forbid what was asked; the text says what is allowed."""

    code = "not_allowed"
    grpc_status = grpc.StatusCode.FAILED_PRECONDITION
    http_status = 409
    openai_type = "invalid_request_error"


class AdminBusy(PdserveError):
    """Another change of the pools is under way."""

    code = "admin_busy"
    grpc_status = grpc.StatusCode.ABORTED
    http_status = 409
    openai_type = "service_unavailable"
    retryable = True


class DuplicateRequest(PdserveError):
    code = "duplicate_request_id"
    grpc_status = grpc.StatusCode.ALREADY_EXISTS
    http_status = 409
    openai_type = "invalid_request_error"


class Unauthenticated(PdserveError):
    code = "invalid_api_key"
    grpc_status = grpc.StatusCode.UNAUTHENTICATED
    http_status = 401
    openai_type = "authentication_error"


class PermissionDenied(PdserveError):
    code = "permission_denied"
    grpc_status = grpc.StatusCode.PERMISSION_DENIED
    http_status = 403
    openai_type = "permission_error"


class Overloaded(PdserveError):
    """A queue or a limit is full; ``retry_after_s`` says when to come back."""

    code = "overloaded"
    grpc_status = grpc.StatusCode.RESOURCE_EXHAUSTED
    http_status = 429
    openai_type = "rate_limit_error"
    retryable = True


class NoWorker(PdserveError):
    """No live worker can take the request (in strict mode: no pair of them)."""

    code = "no_worker"
    grpc_status = grpc.StatusCode.UNAVAILABLE
    http_status = 503
    openai_type = "service_unavailable"
    retryable = True


class WorkerLost(PdserveError):
    """A worker died, was fenced, or cannot be reached."""

    code = "worker_lost"
    grpc_status = grpc.StatusCode.UNAVAILABLE
    http_status = 503
    openai_type = "service_unavailable"
    retryable = True


class StaleIncarnation(WorkerLost):
    """The peer is not the process that the caller meant."""

    code = "stale_incarnation"


class Draining(WorkerLost):
    code = "draining"


class DeadlineExceeded(PdserveError):
    code = "deadline_exceeded"
    grpc_status = grpc.StatusCode.DEADLINE_EXCEEDED
    http_status = 504
    openai_type = "timeout"


class Cancelled(PdserveError):
    code = "cancelled"
    grpc_status = grpc.StatusCode.CANCELLED
    http_status = 499
    openai_type = "cancelled"


class TransferError(PdserveError):
    """KV did not arrive as it was offered."""

    code = "kv_transfer_failed"
    grpc_status = grpc.StatusCode.UNAVAILABLE
    http_status = 503
    openai_type = "service_unavailable"
    retryable = True


class ChecksumMismatch(TransferError):
    code = "kv_checksum_mismatch"


class StaleBlock(TransferError):
    """The block was reused by its owner before or while it was read."""

    code = "kv_stale_block"


class LayoutMismatch(TransferError):
    """The two workers' pools do not hold the same kind of block."""

    code = "kv_layout_mismatch"
    retryable = False


class ProtocolError(TransferError):
    """A peer broke the order or the limits of a protocol."""

    code = "protocol_error"
    retryable = False


class TierError(PdserveError):
    """A cache tier failed; costs speed, never a request."""

    code = "tier_failed"


class ConfigError(PdserveError):
    """The configuration or the command line is wrong."""

    code = "invalid_config"
    grpc_status = grpc.StatusCode.FAILED_PRECONDITION


class ModelRefused(ConfigError):
    """The model cannot be served here; the text gives the reason."""

    code = "model_refused"


class BadWeights(ModelRefused):
    """The weight files are damaged, incomplete, or not those of the model."""

    code = "bad_weights"


class DoesNotFit(ModelRefused):
    """Weights and the smallest useful pool exceed the memory; the text gives the sum."""

    code = "does_not_fit"


class IllegalTransition(InternalError):
    """A state machine got an event that its table does not have."""

    code = "illegal_transition"


def _tree(cls: type[PdserveError]) -> list[type[PdserveError]]:
    return [cls, *(sub for child in cls.__subclasses__() for sub in _tree(child))]


BY_CODE: dict[str, type[PdserveError]] = {}
for _cls in _tree(PdserveError):
    BY_CODE.setdefault(_cls.code, _cls)
BY_CODE["internal"] = InternalError


def from_wire(code: str, message: str, retry_after_s: float | None = None) -> PdserveError:
    """The error that a peer reported; a code that we do not know becomes InternalError."""
    cls = BY_CODE.get(code, InternalError)
    return cls(message, retry_after_s=retry_after_s)
