"""The judges: lm-eval in an environment of its own, and the loss of the answers.

lm-eval brings about sixty packages, so it is no dependency. Its interpreter runs `lm_eval_process.py` once
for all models of a table, with a task of its own: a YAML file and the examples beside it, so that nothing is
downloaded. It reads the service's completions with log-probabilities, as for any other OpenAI-compatible
server, and takes the label with the largest log-likelihood after the chat prompt.
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

#: The release with which the figures were measured: pip install 'lm-eval[api]==0.4.13' transformers
LM_EVAL_VERSION = "0.4.13"
TASK = "tessera_labels"
_PROCESS = Path(__file__).with_name("lm_eval_process.py")
_YAML = """\
task: {task}
dataset_path: json
dataset_kwargs:
  data_files:
    test: {data}
test_split: test
output_type: multiple_choice
doc_to_text: question
doc_to_choice: labels
doc_to_target: label
target_delimiter: ""
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
"""


@dataclass(frozen=True)
class LmEval:
    """lm-eval in an environment of its own."""

    #: The interpreter of that environment.
    python: Path
    #: A folder with the base model's tokenizer and chat template.
    tokenizer: Path

    def accuracies(self, url: str, api_key: str, models: Sequence[str], folder: Path) -> list[float]:
        """Return each model's accuracy on the task that `write_task` wrote to `folder`.

        url: of the service, up to and with /v1. Raises `RuntimeError` with the end of lm-eval's output.
        """
        request = {
            "url": f"{url}/completions", "models": list(models), "folder": str(folder), "task": TASK,
            "tokenizer": str(self.tokenizer), "version": LM_EVAL_VERSION,
            "output": str(folder / "lm_eval.json"),
        }  # fmt: skip
        environment = {
            "PATH": "/usr/bin:/bin", "HOME": str(folder), "OPENAI_API_KEY": api_key,
            "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false",
        }  # fmt: skip
        run = subprocess.run(
            [str(self.python), str(_PROCESS)], input=json.dumps(request), text=True, check=False,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=environment,
        )  # fmt: skip
        if run.returncode != 0:
            raise RuntimeError(f"lm-eval ended with code {run.returncode}: {run.stdout[-4000:]}")
        found = json.loads((folder / "lm_eval.json").read_text())
        return [float(found[model]) for model in models]


def write_task(test: Path, folder: Path) -> None:
    """Write lm-eval's task for a file of chat examples whose answers are labels."""
    examples = [json.loads(line)["messages"] for line in test.read_text(encoding="utf-8").splitlines()]
    labels = sorted({messages[-1]["content"] for messages in examples})
    lines = [
        json.dumps(
            {
                "question": messages[-2]["content"],
                "labels": labels,
                "label": labels.index(messages[-1]["content"]),
            }
        )
        for messages in examples
    ]
    data = folder / "labels.jsonl"
    data.write_text("\n".join(lines) + "\n", encoding="utf-8")
    (folder / f"{TASK}.yaml").write_text(_YAML.format(task=TASK, data=data), encoding="utf-8")
