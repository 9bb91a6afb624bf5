"""Helpers for tests of the engine process: a running client, adapters, requests."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import torch

from service.engine.client.connection import merge_outputs
from service.engine.client.engine_client import EngineClient
from service.engine.wire.messages import GenerationRequest, SamplingParams, TokenOutput
from tessera.formats.adapter import Adapter
from tessera.formats.adapter_ref import AdapterRef
from tessera.formats.basis import Basis
from tessera.model.base_model import BaseModel
from tessera.settings import CommonSettings
from tessera.store.adapters import AdapterStore
from tessera.store.bases import BasisStore, recipe_key

RANK = 8
PROMPT = [1, 17, 300, 45, 1200, 77, 9, 2048, 31]


async def store_basis(store: BasisStore, settings: CommonSettings, tiny: BaseModel, basis: Basis) -> None:
    """Store the basis, to save the engine process the seconds that building it takes."""
    name = recipe_key(
        tiny.model_id, method=settings.method, rank=RANK, target_modules=settings.target_modules
    )
    await store.put(basis, recipe_key=name)


@asynccontextmanager
async def running(client: EngineClient) -> AsyncIterator[EngineClient]:
    await client.start()
    try:
        yield client
    finally:
        await client.close()


def make_adapter(basis: Basis, seed: int) -> Adapter:
    """A random adapter, strong enough that its tokens differ from the base model's."""
    generator = torch.Generator().manual_seed(seed)
    return Adapter(basis.basis_id, 2.0 * torch.randn(basis.num_modules, RANK, RANK, generator=generator))


async def publish(store: AdapterStore, adapter_id: str, adapter: Adapter) -> AdapterRef:
    await store.publish("default", adapter_id, adapter, dtype=torch.float32)
    return await store.resolve("default", adapter_id)


def make_request(request_id: str, adapter: AdapterRef | None = None, **sampling: Any) -> GenerationRequest:
    options = {"max_tokens": 8, "temperature": 0.0, "logprobs": 1, **sampling}
    return GenerationRequest(request_id, "default", PROMPT, SamplingParams(**options), adapter=adapter)


async def complete(engine: EngineClient, request: GenerationRequest) -> TokenOutput:
    """All outputs of a request as one."""
    return merge_outputs([output async for output in engine.generate(request)])
