"""Records which functions of our own code a process enters. Python imports this file at its start.

It is on the PYTHONPATH of the processes that `benchmarks.walks` starts, and of no others. A profile function
sees every call of every thread. While the control file, which all processes map into their memory, holds a
number for this kind of process, it counts calls under that number. When the number changes, at the next call
of anything, it writes what it has: one line of JSON for each function.

Standard library only: this runs before anything else is imported.
"""

import contextlib
import json
import mmap
import os
import sys
import threading
import time
from types import CodeType, FrameType
from typing import Any

#: Modules as they are named on the command line, and what runs there. The longest name counts.
ROLES = {
    "service": "api",
    "service.api_worker": "api",
    "service.engine": "engine",
    "trainer_worker": "trainer",
}
#: The byte of each kind of process in the control file.
ROLE_NAMES = ("api", "engine", "trainer")
#: A supervisor, not an API process.
NOT_RECORDED = ("service.local",)
PACKAGES = ("tessera", "adapter_core", "service", "trainer_worker")


class Recorder:
    """The profile function, and what it has seen in the present recording."""

    def __init__(self, control: str, folder: str, root: str, role: str) -> None:
        self._role = role
        self._byte = ROLE_NAMES.index(role)
        self._folder = folder
        self._root = root
        self._prefixes = tuple(os.path.join(root, name) + os.sep for name in PACKAGES)
        self._paths: dict[CodeType, str | None] = {}
        self._lock = threading.Lock()
        #: 0 for none.
        self._recording = 0
        self._entries: dict[CodeType, dict[str, Any]] = {}
        with open(control, "r+b") as file:
            self._control = mmap.mmap(file.fileno(), len(ROLE_NAMES))

    def __call__(self, frame: FrameType, event: str, argument: Any) -> None:
        recording = self._control[self._byte]
        if recording != self._recording:
            self._change_recording(recording)
        if not recording or event != "call":
            return
        code = frame.f_code
        if (entry := self._entries.get(code)) is not None:
            entry["count"] += 1
        elif (path := self._own_path(code)) is not None:
            self._entries[code] = self._describe(frame, path)

    def _change_recording(self, recording: int) -> None:
        with self._lock:
            finished, self._entries = self._entries, {}
            self._recording = recording
        if finished:
            with open(os.path.join(self._folder, f"{os.getpid()}.jsonl"), "a", encoding="utf-8") as file:
                file.writelines(json.dumps(entry) + "\n" for entry in finished.values())

    def _describe(self, frame: FrameType, path: str) -> dict[str, Any]:
        """The fields of `benchmarks.walks.counting.Entry`."""
        code = frame.f_code
        callers = self._callers(frame)
        return {
            "recording": self._recording,
            "time_ns": time.monotonic_ns(),
            "role": self._role,
            "thread": threading.current_thread().name,
            "file": path,
            "function": code.co_qualname,
            "line": code.co_firstlineno,
            "depth": len(callers),
            "caller": callers[0] if callers else None,
            "count": 1,
        }

    def _own_path(self, code: CodeType) -> str | None:
        """The file of `code` below the root; None for the code of libraries and for generated code."""
        if code not in self._paths:
            name = code.co_filename
            self._paths[code] = os.path.relpath(name, self._root) if name.startswith(self._prefixes) else None
        return self._paths[code]

    def _callers(self, frame: FrameType) -> list[str]:
        """Our own functions below `frame` on the stack, the nearest first."""
        names = []
        below = frame.f_back
        while below is not None:
            if (path := self._own_path(below.f_code)) is not None:
                names.append(f"{path}:{below.f_code.co_qualname}")
            below = below.f_back
        return names


def role_of(arguments: list[str]) -> str | None:
    """What a process is, by the module that it runs (`python -m MODULE`); None if it is not recorded."""
    if "-m" not in arguments[:-1]:
        return None
    module = arguments[arguments.index("-m") + 1]
    names = [name for name in ROLES if module == name or module.startswith(name + ".")]
    return None if module in NOT_RECORDED or not names else ROLES[max(names, key=len)]


def install() -> None:
    """Record this process and its threads, if it is one of the service's and was told where to write."""
    role = role_of(sys.orig_argv)
    if role is not None:
        recorder = Recorder(
            os.environ["WALKS_CONTROL"], os.environ["WALKS_FOLDER"], os.environ["WALKS_ROOT"], role
        )
        threading.setprofile(recorder)
        sys.setprofile(recorder)


with contextlib.suppress(KeyError):
    install()
