"""The one logging set-up of every process: lines for people, or one JSON object per line for machines.

Both go to standard error. Text:

    2026-11-30T12:00:00.123Z INFO engine service.engine.step_loop: message

JSON has the same parts under `time`, `level`, `process`, `logger` and `message`, and also `pid`; a traceback
under `exception`; the fields in `log_fields`: `request_id`, `tenant`, `job_id`; and those that a call passes
in `extra={"fields": {…}}`. An exception that nobody catches and a Python warning are written in the same
form. This module imports the standard library only.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import threading
import time
from collections.abc import Mapping
from contextvars import ContextVar
from types import MappingProxyType, TracebackType
from typing import Any, Literal

LogFormat = Literal["text", "json"]

#: Read before the settings are, so that an error in the settings is written in the right form too.
FORMAT_VARIABLE = "TESSERA_LOG_FORMAT"

#: Libraries that give their own logger a handler when they are imported.
_LIBRARIES_WITH_HANDLERS = ("transformers", "huggingface_hub")

#: Fields that are added to every JSON line which the current task (or thread) writes.
log_fields: ContextVar[Mapping[str, str]] = ContextVar("log_fields", default=MappingProxyType({}))

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


class _UtcFormatter(logging.Formatter):
    """Writes times in UTC, in the form of RFC 3339 with milliseconds."""

    converter = staticmethod(time.gmtime)
    default_time_format = "%Y-%m-%dT%H:%M:%S"
    default_msec_format = "%s.%03dZ"


class TextFormatter(_UtcFormatter):
    """One line per record, followed by its traceback if it has one."""

    def __init__(self, process: str) -> None:
        super().__init__(f"%(asctime)s %(levelname)s {process} %(name)s: %(message)s")


class JsonFormatter(_UtcFormatter):
    """One JSON object per record, on one line."""

    def __init__(self, process: str) -> None:
        super().__init__()
        self._process = process

    def format(self, record: logging.LogRecord) -> str:
        """Return the record as one line of JSON in ASCII."""
        line: dict[str, Any] = {
            "time": self.formatTime(record),
            "level": record.levelname,
            "process": self._process,
            "pid": record.process,
            "logger": record.name,
            "message": record.getMessage(),
            **log_fields.get(),
            **getattr(record, "fields", {}),
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        if record.stack_info:
            line["stack"] = self.formatStack(record.stack_info)
        # ASCII, so that no message can break the line or the encoding of standard error.
        return json.dumps(line)


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
