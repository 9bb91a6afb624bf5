"""The checks of `tessera doctor`, one subject per file. The `check` function of each file yields findings.

    settings.py   TESSERA_ variables: unknown, unusable
    store.py      reachable, version, persistence, eviction
    model.py      found, complete, not quantised, chat template, target modules
    device.py     torch's build, CUDA, memory, Triton
    machine.py    the data folder, ports, open files

A check reads files and queries servers; it starts nothing and changes nothing. A separate function evaluates
what a check has found, so that tests can describe machines other than the one they run on.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping

from tessera.cli.doctor.findings import Finding, problem


def diagnose(options: Mapping[str, str]) -> Iterator[Finding]:
    """Run all checks, the fastest first. options: variables that were set on the command line."""
    os.environ.update(options)  # settings are read from the environment, here and wherever they are used
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # its warnings would appear among the findings

    from tessera.cli.doctor import device, machine, model, settings, store

    found = settings.read()
    yield from found.findings
    common = found.common
    if common is None:
        yield problem(
            "settings",
            "store, machine, device and model were not checked, because these settings describe them",
            "correct the settings and run `tessera doctor` again",
        )
        return
    yield from _guarded("store", store.check(common))
    yield from _guarded("machine", machine.check(common, found.service, found.worker))
    yield from _guarded("device", device.check(common.device))
    yield from _guarded("model", model.check(common))


def _guarded(name: str, findings: Iterator[Finding]) -> Iterator[Finding]:
    """Yield the same findings. A check that fails unexpectedly adds one and does not stop the others."""
    try:
        yield from findings
    except Exception as error:
        yield problem(
            name,
            f"the check itself failed: {type(error).__name__}: {error}",
            "please report this, with the whole output of `tessera doctor`",
        )
