"""Every error that Tessera raises on purpose.

    TesseraError
      InvalidInput               the caller sent something wrong; `param` names it
        InvalidTrainingData      a training file has problems; lists them by line
        UnsupportedModel         a base model or a layer that cannot carry adapters
      NotFound                   no such adapter, version, basis, file, job or model of this tenant
      Conflict                   the request and the stored state disagree
        BasisMismatch            the adapter belongs to another basis than the one named
        AdapterDeleted           the adapter was deleted after the work on it began
        BasisDeleted             a private basis was deleted while something was made in it
        StaleLease               another worker holds the job now
        QuotaExceeded            the private bases of the tenant would exceed its quota
      CorruptRecord              stored bytes do not match their checksum or shape
      Unavailable                try again later
        AdapterReplaced          the requested version holds other weights by now
        StoreUnavailable         Redis does not answer
        StoreFull                Redis is at `maxmemory`
        EngineUnavailable        the engine process is starting, restarting or gone
        EngineOverloaded         the engine's waiting queue is full
        TenantOverloaded         this tenant has reached its limit of waiting requests
      RequestFailed              the engine gave up on this one request

Raise one of these for what others can cause, and `assert` for what only our own code can cause. The only
table from errors to HTTP status codes is in `service/http/errors.py`.
"""

from __future__ import annotations

from dataclasses import dataclass


class TesseraError(Exception):
    """Base class of all of them."""

    #: Machine-readable and stable. `param` names the offending field, if there is one.
    code = "internal_error"

    def __init__(self, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        if code is not None:
            self.code = code


class InvalidInput(TesseraError):
    """The caller sent something wrong."""

    code = "invalid_value"


@dataclass(frozen=True)
class LineError:
    """One problem in a training file."""

    line: int  # counted from 1
    code: str  # stable
    message: str  # a sentence that says what to do

    def __str__(self) -> str:
        return f"line {self.line}: {self.message}"


class InvalidTrainingData(InvalidInput):
    """A training file with problems.

    `errors` lists them up to the limit of the validator; `num_problems` counts all of them.
    """

    code = "invalid_training_file"

    def __init__(
        self,
        errors: list[LineError],
        *,
        param: str = "file",
        code: str | None = None,
        num_problems: int | None = None,
    ) -> None:
        shown = "; ".join(str(error) for error in errors)
        self.num_problems = len(errors) if num_problems is None else num_problems
        message = f"{self.num_problems} problem(s) in the training file: {shown}"
        super().__init__(message, param=param, code=code)
        self.errors = errors


class UnsupportedModel(InvalidInput):
    """A base model, or a layer of it, that cannot carry adapters."""

    code = "unsupported_model"


class NotFound(TesseraError):
    """No such object, or it belongs to another tenant. The two look alike on purpose."""

    code = "not_found"


class Conflict(TesseraError):
    """The request and the stored state disagree."""

    code = "conflict"


class BasisMismatch(Conflict):
    """The adapter was trained in another basis."""

    code = "basis_mismatch"


class AdapterDeleted(Conflict):
    """The adapter was deleted after the work on it began; a late writer must not resurrect it."""

    code = "adapter_deleted"


class BasisDeleted(Conflict):
    """A private basis was deleted while something was made in it."""

    code = "basis_deleted"


class StaleLease(Conflict):
    """The job's fencing epoch has moved on: another worker holds the job, or it has ended."""

    code = "stale_lease"


class QuotaExceeded(Conflict):
    """The private bases of a tenant would exceed its quota in bytes."""

    code = "basis_quota_exceeded"


class CorruptRecord(TesseraError):
    """Stored bytes that do not match their checksum, their shape or their limits."""

    code = "corrupt_record"


class Unavailable(TesseraError):
    """A part of the system is not available at the moment; the same call may succeed later."""

    code = "unavailable"


class AdapterReplaced(Unavailable):
    """The version holds other weights than when the request was resolved; the same request may succeed."""

    code = "adapter_replaced"


class StoreUnavailable(Unavailable):
    """Redis does not answer within its time-out."""

    code = "store_unavailable"


class StoreFull(Unavailable):
    """Redis refused a write because it is at `maxmemory`."""

    code = "store_full"


class EngineUnavailable(Unavailable):
    """The engine process is starting, restarting or gone."""

    code = "engine_unavailable"


class EngineOverloaded(Unavailable):
    """The engine's waiting queue is full."""

    code = "engine_overloaded"


class TenantOverloaded(Unavailable):
    """This tenant has reached its limit of waiting requests; the engine still accepts those of others."""

    code = "tenant_overloaded"


class RequestFailed(TesseraError):
    """The engine gave up on this one request; the others of its batch went on."""

    code = "request_failed"
