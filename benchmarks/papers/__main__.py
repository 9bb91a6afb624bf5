"""Which order do the papers' own tables have through this service, at a small scale?

    python -m benchmarks.papers lora_xs lora_sb --lm-eval ~/lm-eval/bin/python --out FILE.json
    python -m benchmarks.papers all --url http://127.0.0.1:8000/v1 --tokenizer DIR --out FILE.json

Every row of a table is a job over REST, and its adapter is judged over REST: labels by lm-eval, which takes
the label of the largest log-likelihood, and all answers by their loss. Without --url, a service is started on
this machine with an empty store and ends with the call. `tables.py` says what each table is, what the paper's
protocol was, and what is smaller here.

lm-eval needs an environment of its own: python -m venv ~/lm-eval; ~/lm-eval/bin/pip install
'lm-eval[api]==0.4.13' transformers. Without --lm-eval, the loss is the only judge. A second call with the
same --out keeps the tables that are already in it.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path

from benchmarks.papers.judging import LM_EVAL_VERSION, LmEval
from benchmarks.papers.reproduction import Protocol, reproduce
from benchmarks.papers.service import Service
from benchmarks.papers.tables import TABLES
from benchmarks.report import hardware, print_table
from examples.demo import running_service
from tessera.defaults import BUNDLED_MODEL


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("tables", nargs="+", choices=["all", *TABLES])
    parser.add_argument("--url", help="of a running service, with /v1")
    parser.add_argument("--api-key", default=os.environ.get("OPENAI_API_KEY", "unused"))
    parser.add_argument("--lm-eval", type=Path, help="the interpreter of the environment with lm-eval")
    parser.add_argument("--tokenizer", type=Path, default=BUNDLED_MODEL, help="the base model's folder")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--timeout-s", type=float, default=3600, help="of one job")
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    lm_eval = None
    if arguments.lm_eval is not None:
        lm_eval = LmEval(arguments.lm_eval.absolute(), arguments.tokenizer.absolute())
    names = list(TABLES) if "all" in arguments.tables else arguments.tables
    found = json.loads(arguments.out.read_text()) if arguments.out.exists() else {}
    with running_service(arguments.url, None) as url, Service(url, arguments.api_key) as service:
        protocol = Protocol(
            service, arguments.api_key, arguments.seeds, lm_eval, arguments.timeout_s, report=_say
        )
        found |= {"model": service.base_model(), "machine": hardware(), "lm_eval": LM_EVAL_VERSION}
        for name in names:
            if name in found.get("tables", {}):
                continue
            found.setdefault("tables", {})[name] = reproduce(TABLES[name], protocol)
            arguments.out.write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n")
    for name in names:
        _show(found["tables"][name])
    return 0


def _say(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


def _show(table: dict[str, object]) -> None:
    print(f"\n{table['paper']}, {table['table']}: {table['claim']}\n")
    rows = table["rows"]
    assert isinstance(rows, list)
    columns = ("name", "published", "accuracy", "loss", "rate")
    print_table([{key: row[key] for key in columns if key in row} for row in rows])


if __name__ == "__main__":
    sys.exit(main())
