"""`tessera doctor`: what it says of a machine in order, and of everything that can be wrong with one."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import redis

from service.settings import ServiceSettings
from tessera.cli.doctor import device, machine, model, store
from tessera.cli.doctor import settings as settings_check
from tessera.cli.doctor.device import DeviceFacts
from tessera.cli.doctor.findings import Finding, Level, ok, problem, warning
from tessera.cli.doctor.report import show, worst
from tessera.cli.doctor.store import StoreFacts
from tessera.defaults import BUNDLED_MODEL
from tessera.settings import CommonSettings
from tests.conftest import free_ports
from tests.deploy.deployed_store import deployed_store
from tests.servers import run_server
from tests.tessera.cli.commands import tessera
from tests.waiting import wait_until_sync

IN_ORDER = StoreFacts(
    kind="Valkey",
    version="9.1.2",
    role="master",
    round_trip_ms=0.1,
    has_log=True,
    log_is_written=True,
    snapshots="",
    max_memory_bytes=2**30,
    used_memory_bytes=2**20,
    eviction="noeviction",
)
CPU = DeviceFacts(torch="2.13.0+cpu", cuda=None, is_cuda_available=False, has_driver=False)
GPU = DeviceFacts(
    torch="2.13.0",
    cuda="13.0",
    is_cuda_available=True,
    has_driver=True,
    name="NVIDIA H200",
    capability=(9, 0),
    free_bytes=138 * 2**30,
    total_bytes=139 * 2**30,
    triton="3.9.0",
)


def levels(findings: Any) -> list[Level]:
    return [finding.level for finding in findings]


def is_complete(finding: Finding) -> bool:
    """Whether whoever reads it knows what to do."""
    return bool(finding.message) and (finding.level is Level.OK) == (finding.advice == "")


@pytest.fixture
def server(tmp_path: Path) -> Iterator[str]:
    """The URL of a real server that keeps a log."""
    (port,) = free_ports(1)
    with (
        run_server(tmp_path, "--bind", "127.0.0.1", "--port", str(port), "--appendonly", "yes"),
        redis.Redis(port=port) as client,
    ):

        def answers() -> bool:
            try:
                return bool(client.ping())
            except redis.ConnectionError:
                return False

        wait_until_sync(answers)
        yield f"redis://127.0.0.1:{port}"


def common(**fields: Any) -> CommonSettings:
    return CommonSettings(**fields)


def test_a_machine_in_order_has_no_problem(server, tmp_path):
    service, worker = free_ports(2)
    environment = {
        "TESSERA_DEVICE": "cpu",
        "TESSERA_SERVICE_PORT": str(service),
        "TESSERA_WORKER_METRICS_PORT": str(worker),
    }
    done = tessera(
        "doctor", "--json", "--store-url", server, "--data-dir", tmp_path / "data", environment=environment
    )

    report = json.loads(done.stdout)
    assert done.returncode == 0, done.stdout
    assert report["status"] in ("ok", "warning")
    assert {finding["check"] for finding in report["findings"]} == {
        "installation", "settings", "store", "data", "ports", "limits", "device", "model", "template",
    }  # fmt: skip
    by_check = {finding["check"]: finding["message"] for finding in report["findings"]}
    assert "42 target modules" in by_check["model"]
    assert "<|end|> ends an answer" in by_check["template"]
    assert not (tmp_path / "data").exists(), "a check makes nothing"


def test_what_is_wrong_stands_among_what_is_not_and_ends_with_status_1(tmp_path):
    (port,) = free_ports(1)
    done = tessera(
        "doctor",
        "--model",
        "/nowhere/model",
        "--store-url",
        f"redis://tessera:secret@127.0.0.1:{port}",
        environment={"TESSERA_SERVICE_PROT": "8000", "TESSERA_DATA_DIR": str(tmp_path)},
    )

    assert done.returncode == 1
    assert "TESSERA_SERVICE_PROT is not a setting; did you mean TESSERA_SERVICE_PORT?" in done.stdout
    assert f"redis://tessera@127.0.0.1:{port} does not answer" in done.stdout
    assert "secret" not in done.stdout + done.stderr
    assert "there is no directory /nowhere/model" in done.stdout
    assert "→ " in done.stdout
    assert "3 problems" in done.stdout


def test_a_value_that_cannot_be_used_is_named_with_its_meaning():
    done = tessera("doctor", "--json", environment={"TESSERA_RANK": "many"})

    report = json.loads(done.stdout)
    (found,) = [f for f in report["findings"] if "TESSERA_RANK" in f["message"]]
    assert done.returncode == 1
    assert found["level"] == "problem"
    assert "rank of the default basis" in found["advice"]
    assert "store" not in {finding["check"] for finding in report["findings"]}


def test_a_service_that_lets_strangers_in_is_a_problem():
    done = tessera("doctor", "--json", environment={"TESSERA_SERVICE_HOST": "0.0.0.0", "TESSERA_RANK": "x"})

    messages = [finding["message"] for finding in json.loads(done.stdout)["findings"]]
    assert "refusing to listen on 0.0.0.0 without API keys" in messages


def test_the_settings_of_the_applications_are_found_by_their_names():
    found = settings_check.read()

    assert isinstance(found.service, ServiceSettings)
    assert found.worker is not None
    assert worst(found.findings) is Level.OK


def test_a_real_server_is_in_order(server):
    findings = list(store.check(common(store_url=server)))

    assert levels(findings) == [Level.OK] * 3
    assert "Valkey" in findings[0].message or "Redis" in findings[0].message
    assert "append-only file" in findings[1].message
    assert "noeviction" in findings[2].message


def test_a_server_that_evicts_is_a_problem_and_one_without_persistence_a_warning(server):
    with redis.Redis.from_url(server) as client:
        client.config_set("maxmemory", "100mb")
        client.config_set("maxmemory-policy", "allkeys-lru")
        client.config_set("appendonly", "no")

    findings = list(store.check(common(store_url=server)))

    assert levels(findings) == [Level.OK, Level.WARNING, Level.PROBLEM]
    assert "nothing on disk" in findings[1].message
    assert "allkeys-lru" in findings[2].message
    assert "noeviction" in findings[2].advice


def test_the_store_of_our_deployment_is_in_order_although_it_forbids_config(tmp_path):
    with deployed_store(tmp_path) as running:
        settings = common(store_url=running.url, store_password_file=running.secrets / "store_password")
        assert levels(store.check(settings)) == [Level.OK] * 3

        (tmp_path / "wrong").write_text("guess")
        (refused,) = store.check(common(store_url=running.url, store_password_file=tmp_path / "wrong"))

    assert refused.level is Level.PROBLEM
    assert "TESSERA_STORE_PASSWORD_FILE" in refused.advice
    assert "guess" not in refused.message


def test_a_store_that_is_down_is_a_problem():
    (port,) = free_ports(1)
    (finding,) = store.check(common(store_url=f"redis://127.0.0.1:{port}"))

    assert finding.level is Level.PROBLEM
    assert is_complete(finding)


def test_without_a_url_the_embedded_store_is_looked_at(tmp_path):
    (finding,) = store.check(common(data_dir=tmp_path))

    assert finding.level is Level.OK
    assert "embedded" in finding.message
    assert not (tmp_path / "store").exists()


@pytest.mark.parametrize(
    ("change", "level", "message"),
    [
        ({}, Level.OK, "evicts nothing"),
        ({"kind": "Redis", "version": "6.2.1"}, Level.PROBLEM, "too old"),
        ({"version": "7.1.0"}, Level.PROBLEM, "too old"),
        ({"kind": "Redis", "version": "7.0.15"}, Level.OK, "Redis 7.0.15"),
        ({"role": "slave"}, Level.PROBLEM, "replica"),
        ({"round_trip_ms": 20.0}, Level.WARNING, "round trip"),
        ({"log_is_written": False}, Level.PROBLEM, "fails to write"),
        ({"has_log": False, "snapshots": "3600 1"}, Level.WARNING, "snapshots only"),
        ({"has_log": False, "snapshots": ""}, Level.WARNING, "nothing on disk"),
        ({"has_log": False, "snapshots": None}, Level.WARNING, "may not keep"),
        ({"eviction": "volatile-ttl"}, Level.PROBLEM, "volatile-ttl"),
        ({"eviction": "allkeys-lru", "max_memory_bytes": 0}, Level.WARNING, "allkeys-lru"),
    ],
)
def test_each_fact_about_a_store_is_judged(change, level, message):
    findings = list(store.judge("redis://store", dataclasses.replace(IN_ORDER, **change)))

    assert all(is_complete(finding) for finding in findings)
    assert worst(findings) is level
    assert any(finding.level is level and message in finding.message for finding in findings)


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """A copy of the bundled model, to be damaged."""
    return Path(shutil.copytree(BUNDLED_MODEL, tmp_path / "copy"))


def edit(path: Path, **fields: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def test_the_bundled_model_is_in_order():
    findings = list(model.check(common()))

    assert levels(findings) == [Level.OK] * 4


def test_a_model_without_a_chat_template_is_a_warning(copy):
    for name in ("chat_template.jinja", "chat_template.json"):
        (copy / name).unlink(missing_ok=True)
    config = json.loads((copy / "tokenizer_config.json").read_text())
    config.pop("chat_template", None)
    (copy / "tokenizer_config.json").write_text(json.dumps(config))

    finding = list(model.check(common(base_model=str(copy))))[-1]

    assert finding.level is Level.WARNING
    assert "no chat template" in finding.message
    assert is_complete(finding)


def test_a_quantised_model_is_a_problem(copy):
    edit(copy / "config.json", quantization_config={"quant_method": "gptq", "bits": 4})

    assert any(
        finding.level is Level.PROBLEM and "quantised (gptq)" in finding.message
        for finding in model.check(common(base_model=str(copy)))
    )


@pytest.mark.parametrize(
    ("fields", "message", "advice"),
    [
        ({"target_modules": ("query",)}, "no linear layer matches", "TESSERA_TARGET_MODULES"),
        ({"rank": 512}, "rank must be between", "TESSERA_RANK"),
    ],
)
def test_a_basis_that_does_not_fit_the_model_is_a_problem(fields, message, advice):
    findings = [f for f in model.check(common(**fields)) if f.level is Level.PROBLEM]

    assert [message in f.message and advice in f.advice for f in findings] == [True]


def test_a_model_whose_files_are_missing_is_a_problem(copy):
    (weights,) = copy.glob("*.safetensors")
    index = {"weight_map": {"a": weights.name, "b": "model-00002-of-00002.safetensors"}}
    (copy / "model.safetensors.index.json").write_text(json.dumps(index))
    half = list(model.check(common(base_model=str(copy))))[1]
    weights.rename(copy / "pytorch_model.bin")
    pickled = list(model.check(common(base_model=str(copy))))[1]
    (copy / "config.json").unlink()
    (empty,) = model.check(common(base_model=str(copy)))

    assert levels([half, pickled, empty]) == [Level.PROBLEM] * 3
    assert "model-00002-of-00002.safetensors" in half.message
    assert "only .bin" in pickled.message
    assert "config.json" in empty.message
    assert all(is_complete(finding) for finding in (half, pickled, empty))


@pytest.mark.parametrize("source", ["/nowhere/model", "./nowhere", "a/b/c", "org/na me", "org/none"])
def test_a_model_that_is_not_there_is_a_problem(source):
    (finding,) = model.check(common(base_model=source))  # the tests are offline: a hub cannot be asked

    assert finding.level is Level.PROBLEM
    assert source in finding.message
    assert is_complete(finding)


def test_a_hub_id_that_is_not_fetched_yet_is_a_warning(tmp_path):
    environment = {"HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path), "TESSERA_DATA_DIR": str(tmp_path)}
    done = tessera("doctor", "--json", environment={**environment, "TESSERA_BASE_MODEL": "org/none"})

    (finding,) = [f for f in json.loads(done.stdout)["findings"] if f["check"] == "model"]
    assert finding["level"] == "warning"
    assert "hf download org/none" in finding["advice"]


@pytest.mark.parametrize(
    ("wanted", "facts", "change", "level", "message"),
    [
        ("auto", CPU, {}, Level.OK, "runs on the CPU"),
        ("cpu", GPU, {}, Level.OK, "runs on the CPU"),
        ("cuda", CPU, {}, Level.PROBLEM, "finds no CUDA device"),
        ("auto", CPU, {"has_driver": True}, Level.WARNING, "the GPU is not used"),
        ("cuda", CPU, {"has_driver": True}, Level.PROBLEM, "the GPU is not used"),
        ("auto", CPU, {"has_driver": True, "cuda": "13.0"}, Level.WARNING, "finds no CUDA device"),
        ("auto", GPU, {}, Level.OK, "NVIDIA H200"),
        ("cuda:7", GPU, {"name": ""}, Level.PROBLEM, "there is no cuda:7"),
        ("auto", GPU, {"capability": (7, 5)}, Level.WARNING, "no bfloat16"),
        ("auto", GPU, {"free_bytes": 2**30}, Level.WARNING, "something else uses most of it"),
        ("auto", GPU, {"triton": None}, Level.WARNING, "not installed"),
        ("auto", GPU, {"has_compiler": False}, Level.WARNING, "no C compiler"),
        ("auto", GPU, {"is_triton_interpreted": True}, Level.WARNING, "kernels run in Python"),
    ],
)
def test_each_fact_about_a_device_is_judged(wanted, facts, change, level, message):
    findings = list(device.judge(wanted, dataclasses.replace(facts, **change)))

    assert all(is_complete(finding) for finding in findings)
    assert worst(findings) is level
    assert any(finding.level is level and message in finding.message for finding in findings)


@pytest.mark.gpu
def test_this_machines_gpu_is_seen():
    facts = device.look("auto")
    if not facts.is_cuda_available:
        pytest.skip("needs a CUDA device")
    assert facts.name
    assert 0 < facts.free_bytes <= facts.total_bytes


def test_a_port_that_is_taken_is_a_problem_for_the_service():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        finding = machine.service_port("127.0.0.1", taken.getsockname()[1])

    assert finding.level is Level.PROBLEM
    assert "Address already in use" in finding.message
    assert is_complete(finding)


@pytest.mark.parametrize(("is_chosen", "level"), [(False, Level.WARNING), (True, Level.PROBLEM)])
def test_a_metrics_port_that_is_taken_stops_only_a_worker_that_was_told_to_use_it(is_chosen, level):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        finding = machine.metrics_port("127.0.0.1", taken.getsockname()[1], is_chosen=is_chosen)

    assert finding.level is level
    assert is_complete(finding)


def test_an_address_of_another_machine_cannot_be_listened_on():
    assert machine.service_port("192.0.2.1", 8000).level is Level.PROBLEM


def test_few_open_files_are_a_warning():
    assert machine.open_files(1024, 10_000).level is Level.WARNING
    assert machine.open_files(65_536, 10_000).level is Level.OK
    assert machine.open_files(-1, 10_000).level is Level.OK


def test_a_data_folder_has_to_be_a_folder_that_can_be_written(tmp_path):
    (tmp_path / "file").touch()
    closed = tmp_path / "closed"
    closed.mkdir(mode=0o500)

    assert machine.data_folder(tmp_path / "file" / "data").level is Level.PROBLEM
    assert machine.data_folder(tmp_path / "new" / "data").level in (Level.OK, Level.WARNING)
    if os.getuid() != 0:  # root may write anywhere
        assert machine.data_folder(closed).level is Level.PROBLEM


def test_the_exit_status_follows_the_worst_finding(capsys):
    assert show([ok("a", "x")]) == 0
    assert show([warning("a", "x", "y")]) == 0
    assert show([warning("a", "x", "y"), problem("b", "[z]", "do this")]) == 1
    assert "[z]" in capsys.readouterr().out, "a message is no markup"


def test_nothing_but_json_is_printed_with_json(capsys):
    assert show([problem("b", "z", "do this")], as_json=True) == 1
    assert json.loads(capsys.readouterr().out) == {
        "status": "problem",
        "findings": [{"check": "b", "level": "problem", "message": "z", "advice": "do this"}],
    }
