"""Engines over small models. Each gives its model back after its test."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from service.engine.engine import Engine
from service.engine.settings import EngineConfig
from tests.service.engine.driver import Driver
from tests.service.engine.models import FAMILIES, Served, family

#: Small enough to be crowded, and large enough for every test that does not set less.
DEFAULTS: dict[str, Any] = {"num_blocks": 256, "block_size": 8, "num_slots": 8, "max_batch_seqs": 16}


@pytest.fixture(params=FAMILIES)
def served(request: pytest.FixtureRequest) -> Served:
    return family(request.param)


@pytest.fixture
def llama() -> Served:
    return family("llama")


@pytest.fixture
def start() -> Iterator[Callable[..., Driver]]:
    """start(served, **config): a driver of an engine that has the first basis and can fetch the others."""
    engines: list[Engine] = []

    def _start(served: Served, **config: Any) -> Driver:
        engine = Engine(served.base, EngineConfig(**{**DEFAULTS, **config}))
        engines.append(engine)
        engine.add_basis(served.basis)
        return Driver(engine, served.adapters, {served.other_basis.basis_id: served.other_basis})

    yield _start
    for engine in engines:
        engine.close()
