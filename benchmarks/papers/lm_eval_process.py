"""Runs inside lm-eval's own environment: reads a request from standard input, writes accuracies to a file.

Imports nothing of this repository. See `judging.py` for the request.
"""

from __future__ import annotations

import json
import sys
from importlib.metadata import version
from pathlib import Path


def main() -> int:
    request = json.load(sys.stdin)
    found = version("lm-eval")
    if found != request["version"]:
        print(f"lm-eval is {found}, but {request['version']} is needed")
        return 2
    from lm_eval import simple_evaluate
    from lm_eval.models.openai_completions import LocalCompletionsAPI
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=request["folder"], include_defaults=False)
    accuracies = {}
    for model in request["models"]:
        client = LocalCompletionsAPI(
            base_url=request["url"], model=model, tokenizer=request["tokenizer"],
            tokenizer_backend="huggingface", batch_size=16,
        )  # fmt: skip
        results = simple_evaluate(
            model=client, tasks=[request["task"]], task_manager=manager, apply_chat_template=True,
            bootstrap_iters=0, log_samples=False,
        )  # fmt: skip
        accuracies[model] = results["results"][request["task"]]["acc,none"]
    Path(request["output"]).write_text(json.dumps(accuracies))
    return 0


if __name__ == "__main__":
    sys.exit(main())
