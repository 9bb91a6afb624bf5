"""The engine process with a model that hangs in a step that contains a certain token.

python hanging_engine.py --socket PATH --parent PID --restarts N
"""

from __future__ import annotations

import argparse
import asyncio
import os
import threading
from pathlib import Path

from torch import Tensor, nn

from service.engine.engine import Engine
from service.engine.process.engine_process import EngineProcess, build_engine
from service.engine.settings import EngineConfig, EngineSettings
from tessera.formats.basis import Basis
from tessera.model.base_model import BaseModel
from tessera.settings import CommonSettings

HANGING_TOKEN = 666


def hang(_: nn.Module, arguments: tuple[Tensor, ...]) -> None:
    if bool((arguments[0] == HANGING_TOKEN).any()):
        threading.Event().wait()


def build(base: BaseModel, basis: Basis, config: EngineConfig) -> Engine:
    engine = build_engine(base, basis, config)
    base.model.get_input_embeddings().register_forward_pre_hook(hang)
    return engine


async def run(arguments: argparse.Namespace) -> int:
    process = EngineProcess(CommonSettings(), EngineSettings(), restarts=arguments.restarts, build=build)
    return await process.run(arguments.socket, parent=arguments.parent)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--socket", type=Path)
    parser.add_argument("--parent", type=int)
    parser.add_argument("--restarts", type=int)
    os._exit(asyncio.run(run(parser.parse_args())))
