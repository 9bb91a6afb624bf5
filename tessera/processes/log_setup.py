"""The one logging set-up of every process: lines for people, or one JSON object per line for machines.

Both go to standard error. Text:

    2026-11-30T12:00:00.123Z INFO engine service.engine.step_loop: message

JSON has the same parts under `time`, `level`, `process`, `logger` and `message`, and also `pid`; a traceback
under `exception`; and whatever `log_context` has bound: `request_id`, `tenant`, `job_id`. An exception that
nobody catches and a Python warning are written in the same form. This module imports the standard library
only.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from types import TracebackType
from typing import Any, Literal

LogFormat = Literal["text", "json"]

#: Read before the settings are, so that an error in the settings is written in the right form too.
FORMAT_VARIABLE = "TESSERA_LOG_FORMAT"

#: Libraries that give their own logger a handler when they are imported.
_LIBRARIES_WITH_HANDLERS = ("transformers", "huggingface_hub")

_context: ContextVar[dict[str, str] | None] = ContextVar("log_context", default=None)

_handler = logging.StreamHandler()

logger = logging.getLogger(__name__)


def set_up_logging(process: str, *, level: str = "INFO", log_format: LogFormat | None = None) -> None:
    """Write the records of all loggers to standard error. A later call replaces the earlier one.

    process: the name of this process in each line, such as "engine". log_format: None means the format that
    `FORMAT_VARIABLE` names, text if it names none. Handlers and hooks that others have set stay.
    """
    if log_format is None:
        log_format = "json" if os.environ.get(FORMAT_VARIABLE, "").lower() == "json" else "text"
    _handler.setFormatter(JsonFormatter(process) if log_format == "json" else TextFormatter(process))
    _handler.setStream(sys.stderr)
    root = logging.getLogger()
    root.setLevel(level)
    root.addHandler(_handler)  # does nothing if it is there already
    logging.captureWarnings(True)
    if sys.excepthook is sys.__excepthook__:
        sys.excepthook = _log_uncaught
    if threading.excepthook is threading.__excepthook__:
        threading.excepthook = _log_uncaught_in_thread
    drop_library_handlers()


def drop_library_handlers() -> None:
    """Take away the handlers that imported libraries have given their own loggers.

    `set_up_logging` does this for libraries that are imported by then. Call it again after a later import.
    """
    for name in _LIBRARIES_WITH_HANDLERS:
        library_logger = logging.getLogger(name)
        library_logger.handlers.clear()
        library_logger.propagate = True


@contextmanager
def log_context(**fields: str) -> Iterator[None]:
    """Add these fields to every JSON line that the current task (or thread) writes inside the block."""
    token = _context.set({**(_context.get() or {}), **fields})
    try:
        yield
    finally:
        _context.reset(token)


def add_to_log_context(**fields: str) -> None:
    """Add fields to the enclosing `log_context`, until that ends. Without one, nothing happens."""
    context = _context.get()
    if context is not None:
        context.update(fields)


class TextFormatter(logging.Formatter):
    """One line per record, followed by its traceback if it has one."""

    def __init__(self, process: str) -> None:
        super().__init__(f"%(asctime)s %(levelname)s {process} %(name)s: %(message)s")

    def formatTime(self, record: logging.LogRecord, datefmt: str | None = None) -> str:
        return _timestamp(record)


class JsonFormatter(logging.Formatter):
    """One JSON object per record, on one line."""

    def __init__(self, process: str) -> None:
        super().__init__()
        self._process = process

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, Any] = {
            "time": _timestamp(record),
            "level": record.levelname,
            "process": self._process,
            "pid": record.process,
            "logger": record.name,
            "message": record.getMessage(),
            **(_context.get() or {}),
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        if record.stack_info:
            line["stack"] = self.formatStack(record.stack_info)
        # ASCII, so that no message can break the line or the encoding of standard error.
        return json.dumps(line)


def _timestamp(record: logging.LogRecord) -> str:
    """UTC, in the form of RFC 3339 with milliseconds."""
    return f"{time.strftime('%Y-%m-%dT%H:%M:%S', time.gmtime(record.created))}.{int(record.msecs):03d}Z"


def _log_uncaught(
    error_type: type[BaseException], error: BaseException, traceback: TracebackType | None
) -> None:
    if issubclass(error_type, KeyboardInterrupt):
        sys.__excepthook__(error_type, error, traceback)
        return
    logger.critical("uncaught exception", exc_info=(error_type, error, traceback))


def _log_uncaught_in_thread(arguments: threading.ExceptHookArgs) -> None:
    if arguments.exc_value is None or isinstance(arguments.exc_value, SystemExit):
        return
    name = "unknown" if arguments.thread is None else arguments.thread.name
    logger.critical(
        "uncaught exception in thread %s",
        name,
        exc_info=(arguments.exc_type, arguments.exc_value, arguments.exc_traceback),
    )
