"""Two users, one base model: train an adapter each, then serve both and the base in one batch.

The demo uses only the official `openai` client and one native endpoint (/v1/score). It starts Tessera on this
machine with an empty store, unless --base-url names a running service. It exits with 0 only if each adapter
predicts its own user's held-out answers better than the base model does.

The bundled model learns to define words as two old dictionaries do. `--model smollm2` is a small model that
can chat; it learns to answer as an old sea captain and as a butler.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import openai
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

DATA = Path(__file__).parent / "data"
#: The first start of a larger model builds its basis: 80 s for SmolLM2 on one busy core.
START_TIMEOUT_S = 900
TRAIN_TIMEOUT_S = 1800

console = Console()


@dataclass(frozen=True)
class Scenario:
    """Whose adapters are trained on a base model, and what is asked afterwards."""

    #: Each user has the files USER.train.jsonl and USER.heldout.jsonl in DATA.
    users: tuple[str, ...]
    prompts: tuple[str, ...]
    #: Hyperparameters of the jobs; Tessera chooses those that are absent.
    hyperparameters: dict[str, float] = field(default_factory=dict)
    #: Sampling options of the answers.
    sampling: dict[str, float] = field(default_factory=dict)


DICTIONARIES = Scenario(
    users=("devil", "jargon"),
    prompts=("What does 'love' mean?", "What does 'program' mean?", "What does 'friend' mean?"),
    # Without a penalty, a model of 7 M parameters repeats itself.
    sampling={"temperature": 0.7, "seed": 1, "repetition_penalty": 1.2},
)
VOICES = Scenario(
    users=("captain", "butler"),
    prompts=("How do I bake bread?", "Why do birds sing?", "What is a friend?"),
    hyperparameters={"n_epochs": 3, "learning_rate_multiplier": 3},
    sampling={"temperature": 0},
)
#: Scenarios by the id of the base model; every other model gets DICTIONARIES.
SCENARIOS = {"smollm2": VOICES}


@dataclass
class Stream:
    """One streamed answer and what was measured on the way."""

    model: str
    prompt: str
    text: str = ""
    ttft_ms: float = 0.0
    max_distinct_in_batch: int = 0


@dataclass
class Report:
    """The contents of demo-report.json, with the adapters in the order of the data sets."""

    losses: dict[str, dict[str, float]] = field(default_factory=dict)
    adapter_bytes: int = 0
    training_s: float = 0.0
    ttft_ms: float = 0.0
    distinct_in_batch: int = 0


async def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--base-url", help="a running service, such as http://127.0.0.1:8000/v1")
    where.add_argument("--model", help="tiny, smollm2, a directory or a hub id; default: TESSERA_BASE_MODEL")
    parser.add_argument("--api-key", default=os.environ.get("OPENAI_API_KEY", "unused"))
    parser.add_argument("--report", type=Path, default=Path("demo-report.json"))
    arguments = parser.parse_args()
    with running_service(arguments.base_url, arguments.model) as base_url:
        async with openai.AsyncOpenAI(base_url=base_url, api_key=arguments.api_key) as client:
            report = await run(client)
    arguments.report.write_text(json.dumps(report.__dict__, indent=2) + "\n")
    console.print(f"report: {arguments.report}")
    return 0 if adapters_win(report) else 1


async def run(client: openai.AsyncOpenAI) -> Report:
    """Train, answer, score: the demo in four lines."""
    base = (await client.models.list()).data[0].id
    scenario = SCENARIOS.get(base, DICTIONARIES)
    report = Report()
    adapters = await train(client, base, scenario, report)
    await answer_together(client, [base, *adapters], scenario, report)
    await score(client, [base, *adapters], scenario.users, report)
    return report


async def train(client: openai.AsyncOpenAI, base: str, scenario: Scenario, report: Report) -> list[str]:
    """Upload each user's data and train an adapter on it; both jobs share the worker."""
    console.rule("1. Train an adapter for each user")
    started = time.perf_counter()
    jobs = []
    for user in scenario.users:
        path = DATA / f"{user}.train.jsonl"
        file = await client.files.create(file=path, purpose="fine-tune")
        jobs.append(
            await client.fine_tuning.jobs.create(
                model=base,
                training_file=file.id,
                suffix=user,
                seed=1,
                method={
                    "type": "supervised",
                    "supervised": {"hyperparameters": scenario.hyperparameters},
                },
            )
        )
    columns = (
        TextColumn("{task.description:>8}"),
        BarColumn(),
        TextColumn("{task.fields[note]}"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console) as progress:
        bars = [progress.add_task(user, total=100, note="queued") for user in scenario.users]
        while True:
            jobs = [await client.fine_tuning.jobs.retrieve(job.id) for job in jobs]
            for bar, job in zip(bars, jobs, strict=True):
                progress.update(bar, completed=percent(job), note=note(job))
            if all(job.status in ("succeeded", "failed", "cancelled") for job in jobs):
                break
            if time.perf_counter() - started > TRAIN_TIMEOUT_S:
                raise SystemExit(f"training took longer than {TRAIN_TIMEOUT_S} s")
            await asyncio.sleep(0.5)
    report.training_s = round(time.perf_counter() - started, 2)
    for job in jobs:
        if job.status != "succeeded" or job.fine_tuned_model is None:
            raise SystemExit(f"job {job.id} {job.status}: {job.error}")
    report.adapter_bytes = int(await adapter_bytes(client, jobs[0].fine_tuned_model or ""))
    console.print(f"both trained in {report.training_s:.0f} s; one adapter is {report.adapter_bytes:,} bytes")
    return [job.fine_tuned_model or "" for job in jobs]


def percent(job: Any) -> float:
    progress = getattr(job, "progress", None) or {}
    return 100.0 if job.status == "succeeded" else float(progress.get("percent") or 0.0)


def note(job: Any) -> str:
    """Return the job's status and its last losses, for the progress bar."""
    progress = getattr(job, "progress", None) or {}
    losses = [
        f"{name} {progress[key]:.3f}"
        for name, key in (("train", "train_loss"), ("valid", "valid_loss"))
        if progress.get(key) is not None
    ]
    return " ".join([job.status, *losses])


async def adapter_bytes(client: openai.AsyncOpenAI, adapter: str) -> int:
    record = await client.get(f"/adapters/{adapter}", cast_to=object)
    return int(record["versions"][-1]["bytes"])  # type: ignore[index]


async def answer_together(
    client: openai.AsyncOpenAI, models: list[str], scenario: Scenario, report: Report
) -> None:
    """Send the same prompts to the base and to both adapters at once; the engine batches them."""
    console.rule("2. Base, user 1 and user 2, the same prompts, one batch")
    streams = [Stream(model, prompt) for prompt in scenario.prompts for model in models]
    await asyncio.gather(*(consume(client, stream, scenario.sampling) for stream in streams))
    table = Table("prompt", *models, show_lines=True)
    for prompt in scenario.prompts:
        table.add_row(prompt, *(s.text.strip() for s in streams if s.prompt == prompt))
    console.print(table)
    report.ttft_ms = round(statistics.median(s.ttft_ms for s in streams), 1)
    report.distinct_in_batch = max(s.max_distinct_in_batch for s in streams)
    console.print(
        f"median time to first token {report.ttft_ms:.0f} ms; "
        f"{report.distinct_in_batch} different models in one batch"
    )


async def consume(client: openai.AsyncOpenAI, stream: Stream, sampling: dict[str, float]) -> None:
    started = time.perf_counter()
    chunks = await client.chat.completions.create(
        model=stream.model,
        messages=[{"role": "user", "content": stream.prompt}],
        max_tokens=48,
        stream=True,
        stream_options={"include_usage": True},
        extra_body=sampling,
    )
    async for chunk in chunks:
        if chunk.choices and chunk.choices[0].delta.content:
            stream.ttft_ms = stream.ttft_ms or (time.perf_counter() - started) * 1000
            stream.text += chunk.choices[0].delta.content
        figures = getattr(chunk, "x_tessera", None) or {}
        stream.max_distinct_in_batch = max(
            stream.max_distinct_in_batch, figures.get("max_distinct_in_batch") or 0
        )


async def score(
    client: openai.AsyncOpenAI, models: list[str], users: tuple[str, ...], report: Report
) -> None:
    """Return the loss (nats per token) of every model, the base first, on every user's held-out answers."""
    console.rule("3. Held-out loss, nats per token (lower is better)")
    for name, model in zip(["base", *models[1:]], models, strict=True):
        report.losses[name] = {user: await heldout_loss(client, model, user) for user in users}
    table = Table("model", *users)
    for name, losses in report.losses.items():
        table.add_row(name, *(f"{losses[user]:.4f}" for user in users))
    console.print(table)


async def heldout_loss(client: openai.AsyncOpenAI, model: str, user: str) -> float:
    lines = (DATA / f"{user}.heldout.jsonl").read_text().splitlines()
    body = {"model": model, "input": [{"messages": json.loads(line)["messages"]} for line in lines]}
    reply: Any = await client.post("/score", body=body, cast_to=object)
    return round(float(reply["loss"]), 6)


def adapters_win(report: Report) -> bool:
    """Print and return whether each adapter beats the base on its own user's held-out data."""
    base = report.losses["base"]
    wins = True
    for user, (name, losses) in zip(base, list(report.losses.items())[1:], strict=True):
        better = losses[user] < base[user]
        wins &= better
        console.print(
            f"{name} on {user}: {base[user]:.4f} -> {losses[user]:.4f}"
            f" [{'green]better' if better else 'red]not better'} than the base[/]"
        )
    return wins


@contextmanager
def running_service(base_url: str | None, model: str | None) -> Iterator[str]:
    """Yield the URL of the named service, or else of one that is started here and ends with the demo."""
    if base_url is not None:
        yield base_url
        return
    chosen = {} if model is None else {"TESSERA_BASE_MODEL": base_model(model)}
    port = free_port()
    with tempfile.TemporaryDirectory(prefix="tessera-demo-") as folder:
        environment = {
            **os.environ,
            **chosen,
            "TESSERA_DATA_DIR": folder,
            "TESSERA_SERVICE_PORT": str(port),
            "TESSERA_WORKER_METRICS_PORT": "0",
            # Training beside other programs on two cores took 500 s with two threads, which spin while they
            # wait for each other, and 140 s with one.
            "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"),
            "TESSERA_LOG_LEVEL": os.environ.get("TESSERA_LOG_LEVEL", "WARNING"),
        }
        log_path = Path(folder) / "demo.log"
        with log_path.open("wb") as log:
            command = [sys.executable, "-m", "service.local"]
            from tessera.processes.child_process import start_child

            process = start_child(command, environment=environment, output=log)
        try:
            wait_until_ready(f"http://127.0.0.1:{port}", process, log_path)
            yield f"http://127.0.0.1:{port}/v1"
        except BaseException:
            console.print(log_path.read_text()[-4000:], markup=False)
            raise
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(60)


def base_model(name: str) -> str:
    """Return the model that `name` stands for, fetched by a child process if needed, to free the memory."""
    command = [sys.executable, "-m", "examples.base_models", name]
    found = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if found.returncode != 0:  # it has printed the reason
        raise SystemExit(found.returncode)
    return found.stdout.strip()


def wait_until_ready(url: str, process: subprocess.Popen[bytes], log_path: Path) -> None:
    from service.local import is_ready

    deadline = time.monotonic() + START_TIMEOUT_S
    with console.status("starting store, service and worker"):
        while not is_ready(url):
            if process.poll() is not None:
                raise SystemExit(f"the service ended with code {process.returncode}; its log follows")
            if time.monotonic() > deadline:
                raise SystemExit(f"the service was not ready within {START_TIMEOUT_S} s; its log follows")
            time.sleep(0.2)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


if __name__ == "__main__":
    sys.exit(asyncio.run(main()))
