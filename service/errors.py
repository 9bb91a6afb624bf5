"""The errors that only the HTTP side knows; the tree of all others stands in `tessera/errors.py`.

TesseraError
  Unauthenticated      no API key, or one that is not known
  BodyTooLarge         more bytes than the limit, counted as they come
  BodyTimeout          the body did not arrive in time
  Unavailable
    ServiceOverloaded  as many requests as allowed are being answered
    ShuttingDown       this process is being stopped
  RequestFailed
    DeadlineExceeded   the engine did not finish in the time that a request has
"""

from __future__ import annotations

from tessera.errors import RequestFailed, TesseraError, Unavailable


class Unauthenticated(TesseraError):
    """The request carries no API key, or one that is not known."""

    code = "invalid_api_key"


class BodyTooLarge(TesseraError):
    """The request's body has more bytes than the limit; counted, not believed from a header."""

    code = "body_too_large"


class BodyTimeout(TesseraError):
    """The request's body did not arrive in time."""

    code = "body_timeout"


class ServiceOverloaded(Unavailable):
    """As many requests as allowed are being answered already."""

    code = "service_overloaded"


class ShuttingDown(Unavailable):
    """This process is being stopped; another one will answer."""

    code = "shutting_down"


class DeadlineExceeded(RequestFailed):
    """The engine did not finish in the time that a request has."""

    code = "deadline_exceeded"
