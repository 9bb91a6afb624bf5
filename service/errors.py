"""The errors that only API processes raise. `tessera/errors.py` has the tree of all others.

TesseraError
  Unauthenticated      no API key, or an unknown one
  BodyTooLarge         the body has more bytes than the limit
  BodyTimeout          the body did not arrive in time
  Unavailable
    ServiceOverloaded  the limit of concurrent requests is reached
    ShuttingDown       this process is being stopped
  RequestFailed
    DeadlineExceeded   the engine did not finish within the time limit of a request
"""

from __future__ import annotations

from tessera.errors import RequestFailed, TesseraError, Unavailable


class Unauthenticated(TesseraError):
    """The request carries no API key, or an unknown one."""

    code = "invalid_api_key"


class BodyTooLarge(TesseraError):
    """The request's body has more bytes than the limit. They are counted; the header is not trusted."""

    code = "body_too_large"


class BodyTimeout(TesseraError):
    """The request's body did not arrive in time."""

    code = "body_timeout"


class ServiceOverloaded(Unavailable):
    """The limit of requests that are answered at the same time is reached."""

    code = "service_overloaded"


class ShuttingDown(Unavailable):
    """This process is being stopped; another one will answer."""

    code = "shutting_down"


class DeadlineExceeded(RequestFailed):
    """The engine did not finish within the time limit of a request."""

    code = "deadline_exceeded"
