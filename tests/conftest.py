"""What all tests share: a real Valkey per test process, a fresh client per test, the tiny model once."""

# ruff: noqa: E402 (the environment is set before what reads it is imported)

from __future__ import annotations

import os

# Before torch is imported: several test processes share the cores, and nothing may reach for the network.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ["HF_HUB_OFFLINE"] = "1"
for _name in [name for name in os.environ if name.startswith("TESSERA_")]:
    del os.environ[_name]  # a developer's settings must not change what is tested
if not os.path.exists("/dev/nvidiactl"):
    # Triton reads this once, when it is first imported, and many packages import it: kernels are interpreted.
    os.environ.setdefault("TRITON_INTERPRET", "1")

import asyncio
import contextlib
import re
import socket
import tempfile
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import pytest_asyncio
from hypothesis import HealthCheck, settings
from redis.asyncio import Redis
from redis.asyncio.cluster import RedisCluster
from redis.exceptions import RedisError

from tessera.redis.client import connect
from tests.servers import run_server
from tests.waiting import HANG_S, wait_until

if TYPE_CHECKING:
    from tessera.formats.basis import Basis
    from tessera.model.base_model import BaseModel

settings.register_profile(
    "tessera",
    deadline=None,  # the machines are shared
    max_examples=50,
    print_blob=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
settings.load_profile("tessera")

#: Every key comes from `keys.py`: the prefix, then exactly one hash tag.
#: Of one call, for a test machine on which other things run. Tests of time-outs have clients of their own.
TIMEOUT_S = HANG_S
OWN_KEY = re.compile(rb"tessera:\{[^{}]+\}")


@pytest.fixture(scope="session")
def redis_url() -> Iterator[str]:
    """The URL of a real server, one per test process (xdist worker), without persistence."""
    with tempfile.TemporaryDirectory(prefix="tessera-test-") as folder:
        path = Path(folder) / "redis.sock"
        with run_server(Path(folder), "--port", "0", "--unixsocket", str(path)):
            yield f"unix://{path}"


@pytest_asyncio.fixture
async def redis(redis_url: str) -> AsyncIterator[Redis]:
    """A client of an empty server; afterwards every key left must be one of ours, and all are dropped."""
    client = connect(redis_url, timeout_s=TIMEOUT_S)
    await wait_until(client.ping)
    await client.flushall()
    yield client
    foreign = [key async for key in client.scan_iter(count=1000) if not OWN_KEY.match(key)]
    await client.flushall()
    await client.aclose()
    assert not foreign, f"keys that keys.py does not name: {foreign}"


@pytest.fixture(scope="session")
def cluster_port() -> Iterator[int]:
    """The port of a cluster of one node: it owns all slots, yet refuses keys of two slots in one command."""
    with tempfile.TemporaryDirectory(prefix="tessera-test-") as folder:
        port, bus_port = free_ports(2)
        options = ["--bind", "127.0.0.1", "--port", str(port), "--cluster-port", str(bus_port)]
        with run_server(Path(folder), *options, "--cluster-enabled", "yes"):
            yield port


@pytest_asyncio.fixture
async def cluster(cluster_port: int) -> AsyncIterator[RedisCluster]:
    """A client of an empty cluster."""
    async with connect(f"redis://127.0.0.1:{cluster_port}") as node:
        await wait_until(lambda: owns_all_slots(node))
        await node.flushall()
    async with RedisCluster(host="127.0.0.1", port=cluster_port) as client:
        yield client
    for _ in range(5):
        await asyncio.sleep(0)  # connections are closed in a turn of their own; else they warn later


async def owns_all_slots(node: Redis) -> bool:
    try:
        if (await node.cluster("INFO"))["cluster_state"] == "ok":
            return True
        await node.cluster("ADDSLOTSRANGE", 0, 16383)
    except RedisError:  # not up yet, or the slots are taken already and the state is about to be ok
        pass
    return False


def free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


@pytest.fixture(scope="session")
def tiny() -> BaseModel:
    """The bundled model, loaded once, float32 on the CPU. Do not modify it: deepcopy `tiny.model`."""
    from tessera.defaults import BUNDLED_MODEL
    from tessera.model.base_model import load_base_model

    return load_base_model(BUNDLED_MODEL, device="cpu", dtype="float32")


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """The directory of SmolLM2-135M-Instruct, a real chat model, which is not in the repository.

    Skips the test unless the environment names the directory: `python -m examples.base_models smollm2`
    prints what SMOLLM2 has to be.
    """
    folder = os.environ.get("SMOLLM2")
    if not folder:
        pytest.skip("SMOLLM2 does not name the directory of the converted model")
    return Path(folder)


@pytest.fixture(scope="session")
def tiny_basis(tiny: BaseModel) -> Basis:
    """The LoRA-XS basis of rank 8 of the bundled model."""
    from tessera.methods.bases import build_basis

    return build_basis(tiny, rank=8)
