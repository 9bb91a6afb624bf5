"""A real server under deploy/valkey/valkey.conf and freshly made secrets, on a loopback port."""

from __future__ import annotations

import signal
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import redis

from deploy.make_secrets import STORE_USER, make_secrets
from tessera.processes.child_process import start_child
from tessera.redis.binary import find_binary
from tests.waiting import HANG_S, wait_until_sync

ROOT = Path(__file__).parent.parent.parent
CONFIGURATION = ROOT / "deploy" / "valkey" / "valkey.conf"


@dataclass(frozen=True)
class DeployedStore:
    """url: as in docker-compose.yml, without the password, which stands in `secrets`/store_password."""

    url: str
    secrets: Path

    @property
    def password_file(self) -> Path:
        return self.secrets / "store_password"

    def client(self) -> redis.Redis:
        """A client with the rights that the service and the trainer have."""
        return redis.Redis.from_url(self.url, password=self.password_file.read_text().strip())


def free_port() -> int:
    """A loopback port that nobody listens on at the moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def deployed_store(folder: Path, *, max_memory: str = "256mb") -> Iterator[DeployedStore]:
    """Run the server in `folder` until the block ends. Of its configuration only a container's paths and the
    address are changed."""
    secrets, data = folder / "secrets", folder / "data"
    make_secrets(secrets, tenant="default")
    data.mkdir(exist_ok=True)
    text = CONFIGURATION.read_text().replace("/run/secrets", str(secrets)).replace("/data", str(data))
    configuration = folder / "valkey.conf"
    configuration.write_text(text)
    port = free_port()
    address = ["--bind", "127.0.0.1", "--port", str(port), "--maxmemory", max_memory]
    with (folder / "valkey.log").open("ab") as log:
        server = start_child([str(find_binary()), str(configuration), *address], output=log)
    probe = redis.Redis(port=port)

    def answers() -> bool:
        assert server.poll() is None, (folder / "valkey.log").read_text()[-2000:]
        try:
            return bool(probe.ping())
        except redis.ConnectionError:
            return False

    try:
        wait_until_sync(answers)
        yield DeployedStore(f"redis://{STORE_USER}@127.0.0.1:{port}/0", secrets)
    finally:
        probe.close()
        server.send_signal(signal.SIGTERM)
        server.wait(HANG_S)
