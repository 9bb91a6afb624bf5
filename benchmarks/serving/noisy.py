"""How much does one tenant's abuse cost another? Blank uploads and 4 MB prompts beside small requests.

    python -m benchmarks.serving.noisy [--rounds 4] [--phase-s 20] [--rate 10] [--workers 1] [--json FILE]

A quiet tenant sends small completions at a steady rate. In every second phase, two processes of a noisy
tenant send, without a pause, the requests that cost most to read: JSON lines that are all blank, a prompt of
4 MB, floods of tiny JSON values, and stop lists and conversations of the maximal size. The phases alternate,
so that other work on the machine affects both equally. The result is the quiet tenant's time to first token.
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import http.client
import itertools
import json
import multiprocessing
import os
import time
from collections import Counter
from collections.abc import Callable
from multiprocessing.queues import SimpleQueue
from multiprocessing.synchronize import Event
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from benchmarks.load.client import Outcome, Prompt, complete
from benchmarks.load.figures import errors, milliseconds
from benchmarks.load.options import add_stack_options, stack_environment
from benchmarks.load.stack import ServiceStack, running_stack
from benchmarks.report import print_table, save

QUIET_KEY, NOISY_KEY = "quiet-tenant-of-the-benchmark", "noisy-tenant-of-the-benchmark"
PERCENTILES = (50, 90, 99)
TIMEOUT_S = 120.0
MIB = 2**20
#: A little less than the service's limits, so that nothing is refused for its size alone.
BODY_BYTES, UPLOAD_BYTES = 4 * MIB - 1024, 32 * MIB - 4096

Request = tuple[str, str, bytes]  # path, content type, body


def upload_of(fill: bytes) -> Request:
    head = (
        b'--x\r\ncontent-disposition: form-data; name="purpose"\r\n\r\nfine-tune\r\n'
        b'--x\r\ncontent-disposition: form-data; name="file"; filename="f.jsonl"\r\n\r\n'
    )
    body = head + fill[:UPLOAD_BYTES] + b"\r\n--x--\r\n"
    return "/v1/files", "multipart/form-data; boundary=x", body


def json_body(path: str, head: str, repeated: bytes, tail: str) -> Request:
    room = BODY_BYTES - len(head) - len(tail)
    body = head.encode() + repeated * (room // len(repeated)) + tail.encode()
    return path, "application/json", body


def uploads(model: str) -> list[Request]:
    line = json.dumps({"prompt": "a question", "completion": "an answer"}).encode() + b"\n"
    return [
        upload_of(b"\n" * UPLOAD_BYTES),
        upload_of(b" \r\n" * UPLOAD_BYTES),
        upload_of(line * 50_000),
        upload_of(b'{"prompt": 3}\n' * UPLOAD_BYTES),
    ]


def prompts(model: str) -> list[Request]:
    completion, chat = "/v1/completions", "/v1/chat/completions"
    head = f'{{"model": "{model}", "max_tokens": 1, '
    return [
        json_body(completion, head + '"prompt": "', b"The quick brown fox. ", '"}'),
        json_body(completion, head + '"prompt": "', b"\\u00e9", '"}'),
        json_body(chat, head + '"messages": [{"role": "user", "content": "', b"a ", '"}]}'),
        json_body(completion, head + '"prompt": [', b"5,", "5]}"),
        json_body(completion, head + '"prompt": [', b"[],", "[5]]}"),
        json_body(completion, head + '"prompt": [', b"null,", "5]}"),
        json_body(chat, head + '"messages": [{"role": "user", "content": [', b"{},", "{}]}]}"),
        json_body(completion, head + '"prompt": "a", "stop": [', b'"s",', '"s"]}'),
        json_body(completion, head + '"prompt": "a", "logit_bias": {', b'"1":1,', '"2":1}}'),
        json_body(chat, head + '"messages": [', b'{"role":"user","content":"a"},', '{"role":"user"}]}'),
    ]


def make_noise(
    port: int, make: Callable[[str], list[Request]], model: str, noisy: Event, ended: Event, said: SimpleQueue
) -> None:
    """Send the requests in turn while `noisy` is set, until `ended`; then tell how they were answered."""
    os.nice(19)  # the noisy client's own work is not what is measured
    requests, statuses = make(model), Counter[str]()
    for path, content_type, body in itertools.cycle(requests):
        while not noisy.wait(0.1):
            if ended.is_set():
                break
        if ended.is_set():
            break
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=TIMEOUT_S)
        headers = {"authorization": f"Bearer {NOISY_KEY}", "content-type": content_type}
        try:
            connection.request("POST", path, body, headers)
            statuses[f"{path} {connection.getresponse().status}"] += 1
        except OSError as error:
            statuses[f"{path} {type(error).__name__}"] += 1
        finally:
            connection.close()
    said.put(dict(statuses))


async def quiet_phase(stack: ServiceStack, model: str, arguments: argparse.Namespace) -> list[Outcome]:
    """Small completions, each at its time, whatever became of those before it."""
    begin, tasks = time.monotonic(), []
    for index in range(int(arguments.phase_s * arguments.rate)):
        due_at = begin + index / arguments.rate
        await asyncio.sleep(max(0.0, due_at - time.monotonic()))
        prompt = Prompt(model, [5 + index % 1000, 7, 9], 2, key=QUIET_KEY)
        tasks.append(asyncio.create_task(complete(stack.port, prompt, timeout_s=TIMEOUT_S, due_at=due_at)))
    return list(await asyncio.gather(*tasks))


def measure(
    stack: ServiceStack, arguments: argparse.Namespace
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    context = multiprocessing.get_context("spawn")
    noisy, ended, said = context.Event(), context.Event(), context.SimpleQueue()
    model = stack.base_name(key=QUIET_KEY)
    senders = [
        context.Process(target=make_noise, args=(stack.port, make, model, noisy, ended, said), daemon=True)
        for make in (uploads, prompts)
    ]
    for sender in senders:
        sender.start()
    outcomes: dict[str, list[Outcome]] = {"alone": [], "beside the noise": []}
    peak_bytes = 0
    try:
        asyncio.run(quiet_phase(stack, model, arguments))  # warm
        for index in range(2 * arguments.rounds):
            name = "beside the noise" if index % 2 else "alone"
            (noisy.set if index % 2 else noisy.clear)()
            outcomes[name] += asyncio.run(quiet_phase(stack, model, arguments))
            resident = stack.resident_bytes()
            peak_bytes = max(peak_bytes, resident.get("api", resident.get("service", 0)))
    finally:
        noisy.clear()
        ended.set()
    answers = sum((Counter(said.get()) for _ in senders), Counter[str]())
    rows = [
        {
            "phase": name,
            "requests": len(found),
            **milliseconds("ttft", (o.first_token_s for o in found if o.error is None), *PERCENTILES),
            "errors": errors(found),
        }
        for name, found in outcomes.items()
    ]
    rise = {f"rise_p{p}_ms": _rise(rows, p) for p in PERCENTILES}
    return rows, {**rise, "api_resident_mib": peak_bytes // MIB, "noise": dict(sorted(answers.items()))}


def _rise(rows: list[dict[str, Any]], percentile: int) -> float:
    before, beside = (row[f"ttft_p{percentile}_ms"] for row in rows)
    return round(beside - before, 2)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--phase-s", type=float, default=20.0)
    parser.add_argument("--rate", type=float, default=10.0, help="of the quiet tenant, requests a second")
    add_stack_options(parser, slots=8)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    with TemporaryDirectory(prefix="tessera-bench-keys-") as folder:
        keys = {"quiet": QUIET_KEY, "noisy": NOISY_KEY}
        digests = {tenant: [hashlib.sha256(key.encode()).hexdigest()] for tenant, key in keys.items()}
        path = Path(folder) / "keys.json"
        path.write_text(json.dumps(digests))
        environment = {**stack_environment(arguments), "TESSERA_SERVICE_API_KEYS_FILE": str(path)}
        with running_stack(environment) as stack:
            rows, figures = measure(stack, arguments)
    print_table(rows)
    print(figures)
    save(
        arguments.json,
        question=__doc__.splitlines()[0],
        arguments=vars(arguments),
        rows=[*rows, figures],
    )


if __name__ == "__main__":
    main()
