"""The store of a deployment: a real server under the deployed configuration, users and secrets."""

from __future__ import annotations

import stat
from collections.abc import Iterator
from pathlib import Path

import pytest
import redis

from deploy.make_secrets import main as make_secrets_main
from deploy.make_secrets import make_secrets, sha256
from service.http.auth import ApiKeys
from tessera.errors import InvalidInput
from tessera.redis.client import connect
from tessera.redis.embedded import store_url
from tessera.settings import CommonSettings
from tests.deploy.deployed_store import DeployedStore, deployed_store


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DeployedStore]:
    with deployed_store(tmp_path_factory.mktemp("store")) as running:
        yield running


def test_the_health_check_needs_no_password_and_gives_no_access(store):
    with redis.Redis.from_url(store.url.replace("tessera@", "")) as anyone:
        assert anyone.ping()
        for command in ("GET tessera:{a:1}", "INFO", "CONFIG GET *", "KEYS *", "FLUSHALL"):
            with pytest.raises(redis.exceptions.NoPermissionError):
                anyone.execute_command(*command.split())


def test_a_wrong_password_is_refused(store):
    with (
        redis.Redis.from_url(store.url, password="guess") as intruder,
        pytest.raises(redis.exceptions.AuthenticationError),
    ):
        intruder.ping()


def test_tessera_may_use_its_own_keys_and_nothing_dangerous(store):
    with store.client() as client:
        assert client.set("tessera:{a:1}:adapter:x", b"1")
        assert client.eval("return redis.call('GET', KEYS[1])", 1, "tessera:{a:1}:adapter:x") == b"1"
        assert client.info("memory")["maxmemory"] == 256 * 1024 * 1024
        for command in (
            ["SET", "foreign", "1"],
            ["EVAL", "return redis.call('SET', KEYS[1], 1)", 1, "foreign"],
            ["CONFIG", "SET", "appendonly", "no"],
            ["FLUSHALL"],
            ["SHUTDOWN"],
            ["ACL", "SETUSER", "default", "+@all"],
        ):
            with pytest.raises(redis.exceptions.ResponseError):
                client.execute_command(*command)


def test_the_server_is_a_system_of_record(store):
    with store.client() as client:
        persistence, memory = client.info("persistence"), client.info("memory")
        assert persistence["aof_enabled"] == 1
        assert memory["maxmemory_policy"] == "noeviction"


def test_data_survive_a_restart(tmp_path: Path):
    with deployed_store(tmp_path) as first, first.client() as client:
        client.set("tessera:{a:1}:adapter:x", b"R")
    assert not list((tmp_path / "data").glob("*.rdb"))
    with deployed_store(tmp_path) as second, second.client() as client:
        assert client.get("tessera:{a:1}:adapter:x") == b"R"


async def test_the_settings_join_url_and_password_file(store):
    settings = CommonSettings(store_url=store.url, store_password_file=store.password_file)

    url, embedded = store_url(settings)

    assert embedded is None
    client = connect(url)
    assert await client.set("tessera:{a:1}:adapter:y", b"1")
    await client.aclose()


@pytest.mark.parametrize(
    ("url", "joined"),
    [
        ("redis://tessera@valkey:6379/0", "redis://tessera:p%2F%40%3Aw@valkey:6379/0"),
        ("redis://valkey:6379", "redis://:p%2F%40%3Aw@valkey:6379"),
        ("unix:///run/valkey.sock?db=1", "unix://:p%2F%40%3Aw@/run/valkey.sock?db=1"),
        ("rediss://:own@valkey:6379/0", "rediss://:own@valkey:6379/0"),
    ],
)
def test_the_password_is_quoted_and_never_replaces_another(tmp_path, url, joined):
    file = tmp_path / "password"
    file.write_text("p/@:w\n")
    assert CommonSettings(store_url=url, store_password_file=file).store_url_with_password() == joined


def test_a_missing_or_empty_password_file_is_an_error(tmp_path):
    for name in ("missing", "empty"):
        file = tmp_path / name
        if name == "empty":
            file.touch()
        with pytest.raises(InvalidInput) as caught:
            CommonSettings(store_url="redis://valkey", store_password_file=file).store_url_with_password()
        assert caught.value.param == "TESSERA_STORE_PASSWORD_FILE"


def test_secrets_are_made_once_and_readable_only_through_the_folder(tmp_path):
    folder = tmp_path / "secrets"
    written = make_secrets(folder, tenant="acme")

    assert {path.name for path in written} == {
        "store_users", "store_password", "api_key", "api_keys", "grafana_admin_password", "hf_token"
    }  # fmt: skip
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert stat.S_IMODE((folder / "api_key").stat().st_mode) == 0o600
    assert stat.S_IMODE((folder / "store_password").stat().st_mode) == 0o644
    before = {path.name: path.read_text() for path in folder.iterdir()}
    assert make_secrets(folder, tenant="other") == []
    assert {path.name: path.read_text() for path in folder.iterdir()} == before
    assert before["store_password"].strip() not in before["store_users"]
    assert sha256(before["store_password"].strip()) in before["store_users"]

    (folder / "store_password").unlink()
    renewed = make_secrets(folder, tenant="acme")
    assert {path.name for path in renewed} == {"store_password", "store_users"}
    assert (folder / "store_users").read_text() != before["store_users"]


def test_the_service_knows_the_key_that_was_made(tmp_path, capsys):
    assert make_secrets_main(["--directory", str(tmp_path), "--tenant", "acme"]) == 0
    assert "api_keys" in capsys.readouterr().out

    keys = ApiKeys.load(tmp_path / "api_keys")

    assert keys.tenant_of(f"Bearer {(tmp_path / 'api_key').read_text().strip()}") == "acme"
