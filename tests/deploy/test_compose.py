"""docker-compose.yml and its GPU override: valid, hardened, and closed to the outside."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from service.engine.settings import EngineSettings
from service.settings import ServiceSettings
from tessera.settings import CommonSettings
from tests.waiting import HANG_S
from trainer_worker.settings import WorkerSettings

ROOT = Path(__file__).parent.parent.parent
COMPOSE = ROOT / "docker-compose.yml"
GPU_OVERRIDE = ROOT / "deploy" / "compose.gpu.yml"


@pytest.fixture(scope="module")
def compose() -> dict[str, Any]:
    return yaml.safe_load(COMPOSE.read_text())


def run_tool(*command: str | Path) -> str:
    """Run a console script of this environment; return what it says, fail with it if it fails."""
    tool, *arguments = command
    done = subprocess.run(
        [Path(sys.executable).parent / tool, *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=HANG_S,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def test_compose_files_follow_the_compose_specification():
    run_tool("check-jsonschema", "--builtin-schema", "vendor.compose-spec", COMPOSE, GPU_OVERRIDE)


def test_yaml_is_clean():
    run_tool("yamllint", "--strict", "--config-file", "deploy/yamllint.yml", COMPOSE, "deploy")


def test_the_five_services_are_there(compose):
    assert set(compose["services"]) == {"valkey", "service", "trainer", "prometheus", "grafana"}


def test_every_service_is_hardened(compose):
    for name, service in compose["services"].items():
        user = service["user"].split(":")[0]
        assert user.isdigit(), f"{name}: Docker cannot check that a user name is not root"
        assert int(user) > 0, name
        assert service["read_only"] is True, name
        assert service["cap_drop"] == ["ALL"], name
        assert service["security_opt"] == ["no-new-privileges:true"], name
        assert service["restart"] == "unless-stopped", name
        assert service["stop_grace_period"], name
        limits = service["deploy"]["resources"]["limits"]
        assert limits["memory"], name
        assert limits["pids"], name
        assert not {"privileged", "network_mode", "pid", "ipc", "cap_add", "devices"} & set(service), name


def test_tessera_runs_as_its_own_user(compose):
    for name in ("service", "trainer"):
        assert compose["services"][name]["user"] == "10001:10001"


def test_every_service_has_a_health_check_with_a_start_period(compose):
    for name, service in compose["services"].items():
        assert service["healthcheck"]["start_period"], name
        # The images built here bring their own test (deploy/Dockerfile); the others need one.
        assert ("test" in service["healthcheck"]) is ("build" not in service), name


def test_waiting_for_a_service_means_waiting_until_it_is_healthy(compose):
    services = compose["services"]
    assert services["service"]["depends_on"] == {"valkey": {"condition": "service_healthy"}}
    assert services["trainer"]["depends_on"] == {"valkey": {"condition": "service_healthy"}}
    for service in services.values():
        for condition in service.get("depends_on", {}).values():
            assert condition == {"condition": "service_healthy"}


def test_ports_are_published_on_the_loopback_interface_only(compose):
    published = [port for service in compose["services"].values() for port in service.get("ports", [])]
    assert len(published) == 3
    for port in published:
        assert port.startswith("127.0.0.1:"), port


def test_the_store_is_on_an_internal_network_without_published_ports(compose):
    assert compose["networks"]["store"] == {"internal": True}
    assert compose["services"]["valkey"]["networks"] == ["store"]
    assert "ports" not in compose["services"]["valkey"]
    members = {name for name, service in compose["services"].items() if "store" in service["networks"]}
    assert members == {"valkey", "service", "trainer"}


def test_secrets_are_files_and_stand_in_no_environment(compose):
    for name, secret in compose["secrets"].items():
        assert secret == {"file": f"./deploy/secrets/{name}"}
    used = {name for service in compose["services"].values() for name in service.get("secrets", [])}
    assert used == set(compose["secrets"])
    for service in compose["services"].values():
        for variable, value in service.get("environment", {}).items():
            if re.search(r"PASSWORD|SECRET|HF_TOKEN|API_KEY", variable):
                assert value.startswith("/run/secrets/"), variable
                assert value.removeprefix("/run/secrets/") in service["secrets"]


def test_every_variable_is_one_that_the_process_reads(compose):
    """Both refuse to start over a variable that they do not know."""
    sections = {"service": (ServiceSettings, EngineSettings), "trainer": (WorkerSettings,)}
    image = {"TESSERA_DATA_DIR", "TESSERA_BASE_MODEL"}
    for name, own in sections.items():
        known = {
            f"{settings.model_config['env_prefix']}{field}".upper()
            for settings in (CommonSettings, *own)
            for field in settings.model_fields
        }
        environment = compose["services"][name]["environment"]
        assert {variable for variable in environment if variable.startswith("TESSERA_")} <= known
        assert image <= known


def test_images_have_an_exact_tag(compose):
    for name, service in compose["services"].items():
        if "build" not in service:
            tag = service["image"].partition(":")[2]
            assert re.fullmatch(r"v?\d+\.\d+(\.\d+)?", tag), f"{name}: {service['image']}"


def test_mounted_files_exist_and_volumes_are_declared(compose):
    named = set()
    for service in compose["services"].values():
        for volume in service.get("volumes", []):
            source, _, options = volume.partition(":")
            if source.startswith("./"):
                assert (ROOT / source).exists(), source
                assert options.endswith(":ro"), f"{volume}: containers only read the checkout"
            else:
                named.add(source)
    assert named == set(compose["volumes"])


def test_the_override_adds_gpus_to_services_that_exist(compose):
    override = yaml.safe_load(GPU_OVERRIDE.read_text())
    assert set(override["services"]) == {"service", "trainer"}
    for name, service in override["services"].items():
        (device,) = service["deploy"]["resources"]["reservations"]["devices"]
        assert device["driver"] == "nvidia"
        assert device["capabilities"] == ["gpu"]
        assert service["image"] != compose["services"][name]["image"], "the two must not be mixed up"
        assert service["build"]["args"]["TORCH_INDEX_URL"] == "", "an index of CPU builds must not be kept"


def test_every_variable_of_the_compose_files_is_documented_with_its_default(compose):
    """Those with a default (`${NAME:-default}`), and those that are handed on if they are set (`NAME:`)."""
    text = COMPOSE.read_text() + GPU_OVERRIDE.read_text()
    known = {n: default or "empty" for n, default in re.findall(r"\$\{(\w+):-([^}]*)\}", text)}
    for service in compose["services"].values():
        known |= {name: "unset" for name, value in service.get("environment", {}).items() if value is None}

    told = {}
    for line in (ROOT / "deploy/README.md").read_text().split("\n## Settings\n")[1].splitlines():
        if line.startswith("| `"):
            names, defaults = (re.findall(r"`([^`]+)`|(unset|empty)", cell) for cell in line.split("|")[1:3])
            values = [quoted or bare for quoted, bare in defaults]
            told |= dict(zip([n for n, _ in names], values * (len(names) // len(values)), strict=True))
        if line.startswith("## "):
            break
    assert told == known
