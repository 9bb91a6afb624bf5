"""This machine: the data folder, the ports, and how many files a process may open."""

from __future__ import annotations

import os
import resource
import shutil
import socket
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tessera.cli.doctor.findings import Finding, ok, problem, warning
from tessera.settings import CommonSettings

#: Free space for the cache of bases and the embedded store. A basis of an 8B model takes 0.1 to 1 GB.
_MIN_FREE_BYTES = 2 * 1024**3
#: Files that a process opens in addition to one per open request.
_OWN_FILES = 128
_GIB = 1024**3


def check(common: CommonSettings, service: Any, worker: Any) -> Iterator[Finding]:
    """Yield findings about this machine.

    service, worker: the settings of the applications; None if they are not installed.
    """
    yield data_folder(common.data_dir)
    if service is not None:
        yield service_port(service.host, service.port)
        yield open_files(resource.getrlimit(resource.RLIMIT_NOFILE)[0], service.max_concurrent_requests)
    if worker is not None and worker.metrics_port:
        is_chosen = "metrics_port" in worker.model_fields_set
        yield metrics_port(worker.metrics_host, worker.metrics_port, is_chosen=is_chosen)


def data_folder(path: Path) -> Finding:
    """Check that the folder can be written, or created, and has enough free space."""
    folder = path.absolute()
    existing = folder
    while not existing.exists() and existing != existing.parent:
        existing = existing.parent
    if not existing.is_dir():
        return problem(
            "data", f"{existing} is not a folder", "correct TESSERA_DATA_DIR, or remove what is there"
        )
    if not os.access(existing, os.W_OK | os.X_OK):
        return problem(
            "data",
            f"user {os.getuid()} may not write to {existing}",
            f"give the folder to that user (chown), or point TESSERA_DATA_DIR elsewhere than {folder}",
        )
    free = shutil.disk_usage(existing).free
    what = f"{folder}{'' if existing == folder else ' (not there yet)'}, {free / _GIB:.1f} GiB free"
    if free < _MIN_FREE_BYTES:
        return warning("data", what, "make room: the embedded store and the cache of bases are kept here")
    return ok("data", what)


def service_port(host: str, port: int) -> Finding:
    """Check that the service can listen, or that it listens already."""
    try:
        _try_to_listen(host, port)
    except OSError as error:
        if _is_tessera(host, port):
            return ok("ports", f"Tessera answers already at {host}, port {port}")
        return problem(
            "ports",
            f"the service cannot listen on {host}, port {port}: {_reason(error)}",
            "choose another port (`tessera serve --port N`, TESSERA_SERVICE_PORT), or end what uses it",
        )
    return ok("ports", f"{host}, port {port} is free for the service")


def metrics_port(host: str, port: int, *, is_chosen: bool) -> Finding:
    """Check that the worker can serve its metrics.

    is_chosen: the port was set explicitly, so the worker refuses to run without it.
    """
    try:
        _try_to_listen(host, port)
    except OSError as error:
        message = f"the worker cannot listen on {host}, port {port}: {_reason(error)}"
        advice = "set TESSERA_WORKER_METRICS_PORT to a free port, or to 0 for none"
        if is_chosen:
            return problem("ports", message, advice)
        return warning("ports", f"{message}; a further worker runs without metrics", advice)
    return ok("ports", f"{host}, port {port} is free for the worker's metrics")


def open_files(limit: int, max_requests: int) -> Finding:
    """Check that a process may open enough files for its requests.

    limit: the limit of this process, which its children inherit. max_requests: requests that the service
    admits at once.
    """
    if limit == resource.RLIM_INFINITY or limit >= max_requests + _OWN_FILES:
        return ok("limits", f"a process may open {limit} files")
    return warning(
        "limits",
        f"a process may open {limit} files, so about {max(limit - _OWN_FILES, 0)} requests can be open at "
        f"once and not the {max_requests} of TESSERA_SERVICE_MAX_CONCURRENT_REQUESTS",
        f"raise it first: `ulimit -n {max_requests + _OWN_FILES}`, or LimitNOFILE= in a unit file",
    )


def _try_to_listen(host: str, port: int) -> None:
    """Listen for a moment. Raises `OSError` if that is not possible."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    socket.create_server((host, port), family=family).close()


def _reason(error: OSError) -> str:
    """Return the error without the address that `socket` adds, because the message already contains it."""
    if isinstance(error, socket.gaierror) or error.errno is None:
        return str(error.strerror or error)
    return os.strerror(error.errno)


def _is_tessera(host: str, port: int) -> bool:
    name = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    url = f"http://{f'[{name}]' if ':' in name else name}:{port}/version"
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with direct.open(url, timeout=2) as reply:
            return b"tessera" in reply.read(4096)
    except (urllib.error.URLError, OSError, ValueError):
        return False
