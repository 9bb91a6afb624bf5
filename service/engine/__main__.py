"""`python -m service.engine --socket PATH --parent PID`: the process that `EngineClient` starts.

It reads its settings from the environment, to which the client has added its own.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import os
import sys
from pathlib import Path

from tessera.processes.log_setup import set_up_logging
from tessera.processes.tasks import new_event_loop


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m service.engine", description="The engine process of Tessera."
    )
    parser.add_argument("--socket", type=Path, required=True, help="unix socket to listen at")
    parser.add_argument("--parent", type=int, required=True, help="process with which this one ends")
    parser.add_argument("--restarts", type=int, default=0, help="engine processes before this one")
    arguments = parser.parse_args()
    set_up_logging("engine")
    if os.getppid() != arguments.parent:
        sys.exit(f"process {arguments.parent} did not start this one, or is gone")
    with asyncio.Runner(loop_factory=new_event_loop) as runner:
        runner.run(run(arguments.socket, arguments.parent, arguments.restarts))


async def run(socket: Path, parent: int, restarts: int) -> None:
    # Imported here because torch and transformers take seconds.
    from service.engine.process.engine_process import EngineProcess
    from service.engine.settings import PREFIX, EngineSettings
    from tessera.settings import CommonSettings, refuse_unknown_variables

    refuse_unknown_variables(CommonSettings, EngineSettings, sections=(PREFIX,))
    settings = CommonSettings()
    set_up_logging("engine", level=settings.log_level, log_format=settings.log_format)
    status = await EngineProcess(settings, EngineSettings(), restarts=restarts).run(socket, parent=parent)
    logging.shutdown()
    # Not sys.exit, which waits for the threads: one may be loading a model or be stuck in a CUDA call.
    os._exit(status)


if __name__ == "__main__":
    main()
