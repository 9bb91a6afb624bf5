"""The report of a job as one HTML page: it needs no other file, no script and no network.

Everything that comes from a user, a model or a file is escaped. The page works in light and dark, and on
paper.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from html import escape
from typing import Any

from tessera.queue.preference import DPO
from tessera.queue.records import Job
from trainer_worker.outcome.charts import Line, line_chart
from trainer_worker.outcome.samples import SampleAnswers
from trainer_worker.training.history import StepRow

#: Longest text shown of a prompt or an answer, in characters. A prompt shows its end, which is the question.
MAX_SHOWN_CHARS = 1500

_STYLE = """
:root{color-scheme:light dark;--ink:#1c2430;--soft:#5c6675;--paper:#fff;--card:#f5f6f8;--rule:#d9dde3;
--train:#8a94a3;--valid:#0b66c3;--tuned:#0b7a4b;--warn:#9a5b00}
@media(prefers-color-scheme:dark){:root{--ink:#e6e9ee;--soft:#9aa4b2;--paper:#14181e;--card:#1d232b;
--rule:#333c47;--train:#7d8794;--valid:#66b2ff;--tuned:#5fd19a;--warn:#f0b45a}}
body{font:15px/1.5 system-ui,sans-serif;color:var(--ink);background:var(--paper);max-width:860px;
margin:0 auto;padding:24px 16px}
h1{font-size:22px;margin:0}h2{font-size:17px;margin:28px 0 8px}p{margin:6px 0}
.soft,.tick,th{color:var(--soft)}.warn{color:var(--warn)}
table{border-collapse:collapse;width:100%}td,th{text-align:left;padding:4px 12px 4px 0;vertical-align:top;
border-bottom:1px solid var(--rule);font-weight:400}td.number{font-variant-numeric:tabular-nums}
tr.chosen td{font-weight:600}
figure{margin:12px 0}svg{width:100%;height:auto;display:block}.grid{stroke:var(--rule)}
.tick{font-size:11px;fill:var(--soft)}.line{fill:none;stroke-width:1.6}.line.train{stroke:var(--train)}
.line.valid{stroke:var(--valid);stroke-width:2.2}.dot.train{fill:var(--train)}.dot.valid{fill:var(--valid)}
.key{margin-left:14px;color:var(--soft)}.mark{display:inline-block;width:14px;height:3px;margin-right:5px;
vertical-align:middle}.mark.train{background:var(--train)}.mark.valid{background:var(--valid)}
.sample{background:var(--card);border-radius:6px;padding:10px 14px;margin:12px 0}
.answers{display:grid;grid-template-columns:repeat(auto-fit,minmax(220px,1fr));gap:14px;margin-top:8px}
.text{white-space:pre-wrap;overflow-wrap:anywhere}.answers h3,.sample h3{font-size:12px;margin:0;
color:var(--soft);font-weight:600;text-transform:uppercase;letter-spacing:.04em}
.tuned .text{color:var(--tuned)}
"""

#: Rows of the table of results: field of the job's result, and what it is called.
_FIGURES = (
    ("finish_reason", "Ended because"),
    ("steps", "Steps"),
    ("epochs", "Epochs"),
    ("published_step", "Published state, step"),
    ("initial_valid_loss", "Validation loss at the start, nats per token"),
    ("published_valid_loss", "Validation loss of the published state"),
    ("final_train_loss", "Training loss of the last step"),
    ("trained_tokens", "Trained tokens"),
    ("training_s", "Seconds in the worker"),
    ("adapter_bytes", "Size of the adapter, bytes"),
)
_DATA = (
    ("num_examples", "Examples"),
    ("num_train", "Trained on"),
    ("num_validation", "Held back for validation"),
    ("num_duplicates", "Equal to an earlier example"),
    ("num_near_duplicates", "Nearly equal to an earlier example"),
    ("num_distinct_answers", "Distinct answers"),
    ("truncated", "Truncated, because they are too long"),
    ("train_tokens", "Tokens per epoch"),
    ("longest_tokens", "Longest row, tokens"),
)
_FINISH_REASONS = {
    "completed": "all steps were made",
    "early_stop": "the validation loss no longer fell",
    "stopped": "its owner stopped it",
}


@dataclass(frozen=True)
class ReportContent:
    """Everything that a report shows."""

    job: Job
    #: The job's result, as `payloads.training_result` returns it.
    result: Mapping[str, Any]
    hyperparameters: Mapping[str, Any]
    rows: Sequence[StepRow]
    samples: Sequence[SampleAnswers]
    #: Unix time.
    made_at: float


def report_page(content: ReportContent) -> str:
    """Return the page."""
    job, result = content.job, content.result
    title = f"Training of {job.spec.adapter_id}"
    version = escape(str(result.get("version", "")))
    made = datetime.fromtimestamp(content.made_at, UTC).strftime("%Y-%m-%d %H:%M UTC")
    origin = job.spec.warm_start_from or job.spec.base_model
    parts = [
        f"<h1>{escape(title)}</h1>",
        f'<p class="soft">Job {escape(job.job_id)}, version {version}, trained from {escape(origin)}, '
        f"{escape(made)}</p>",
        _warnings(result.get("warnings", [])),
        _section("Losses and accuracy", _curves(content.rows, is_preference=job.spec.objective == DPO)),
        _section("Answers side by side", _samples(content.samples)),
        _section("Result", _table(_figures(job), result)),
        _section("Candidates of the search", _candidates(result.get("search"))),
        _section("Hyperparameters", _pairs(content.hyperparameters)),
        _section("Data", _table(_DATA, {**result, **result.get("data", {})})),
        _section("Metadata", _pairs(job.spec.metadata)),
    ]
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>{escape(title)}</title><style>{_STYLE}</style></head><body>{''.join(parts)}</body></html>\n"
    )


def _section(title: str, content: str) -> str:
    return f"<h2>{escape(title)}</h2>{content}" if content else ""


def _warnings(warnings: Sequence[Mapping[str, Any]]) -> str:
    return "".join(f'<p class="warn">Warning: {escape(str(warning["message"]))}</p>' for warning in warnings)


def _figures(job: Job) -> tuple[tuple[str, str], ...]:
    if job.spec.objective != DPO:
        return _FIGURES
    return tuple((name, title.replace("nats per token", "mean of the pairs")) for name, title in _FIGURES)


def _curves(rows: Sequence[StepRow], *, is_preference: bool) -> str:
    train_loss = [(row.step, row.train_loss) for row in rows if row.train_loss is not None]
    valid_loss = [(row.step, row.valid_loss) for row in rows if row.valid_loss is not None]
    train_accuracy = [(row.step, row.train_accuracy) for row in rows if row.train_accuracy is not None]
    valid_accuracy = [(row.step, row.valid_accuracy) for row in rows if row.valid_accuracy is not None]
    return line_chart(
        "Loss, mean of the pairs" if is_preference else "Loss, nats per token",
        [Line("training", "train", train_loss), Line("validation", "valid", valid_loss)],
    ) + line_chart(
        "Share of pairs in which the preferred answer gained more"
        if is_preference
        else "Share of tokens that were the most likely ones",
        [Line("training", "train", train_accuracy), Line("validation", "valid", valid_accuracy)],
    )


def _samples(samples: Sequence[SampleAnswers]) -> str:
    if not samples:
        return '<p class="soft">No answers were generated for this report.</p>'
    where = "training examples, because none was held back" if not samples[0].is_held_out else (
        "held-out examples, which the adapter has not seen"
    )  # fmt: skip
    head = f'<p class="soft">Greedy answers to {len(samples)} {where}. Long ones are cut.</p>'
    return head + "".join(_sample(sample) for sample in samples)


def _sample(sample: SampleAnswers) -> str:
    is_equal = sample.tuned.strip() == sample.expected.strip()
    answers = (
        ("Answer of the example", "", sample.expected),
        ("Base model", "", sample.base),
        ("With the adapter" + (" (equal)" if is_equal else ""), " tuned", sample.tuned),
    )
    columns = "".join(
        f'<div class="answer{style}"><h3>{escape(name)}</h3><div class="text">{_shown(text)}</div></div>'
        for name, style, text in answers
    )
    prompt = _shown(sample.prompt, is_end=True)
    return (
        f'<div class="sample"><h3>Prompt</h3><div class="text">{prompt}</div>'
        f'<div class="answers">{columns}</div></div>'
    )


def _shown(text: str, *, is_end: bool = False) -> str:
    if len(text) <= MAX_SHOWN_CHARS:
        return escape(text)
    return "… " + escape(text[-MAX_SHOWN_CHARS:]) if is_end else escape(text[:MAX_SHOWN_CHARS]) + " …"


def _candidates(search: Any) -> str:
    """The table of the runs among which the published one was chosen; "" if there was only one."""
    candidates = search.get("candidates") if isinstance(search, Mapping) else None
    if not candidates:
        return ""
    head = "".join(f"<th>{name}</th>" for name in ("Learning rate", "Validation loss", "Exact answers", ""))
    rows = []
    for candidate in candidates:
        cells = (
            _number(candidate.get("learning_rate")),
            _number(candidate.get("valid_loss")),
            _number(candidate.get("exact")),
            "chosen" if candidate.get("chosen") else "",
        )
        style = ' class="chosen"' if candidate.get("chosen") else ""
        rows.append(f"<tr{style}>{''.join(f'<td class=number>{cell}</td>' for cell in cells)}</tr>")
    return f"<table><tr>{head}</tr>{''.join(rows)}</table>"


def _table(names: Sequence[tuple[str, str]], values: Mapping[str, Any]) -> str:
    shown = {label: values.get(name) for name, label in names}
    return _pairs({label: value for label, value in shown.items() if value is not None})


def _pairs(values: Mapping[str, Any]) -> str:
    rows = (
        f'<tr><th>{escape(str(name))}</th><td class="number">{_number(value)}</td></tr>'
        for name, value in values.items()
    )
    return f"<table>{''.join(rows)}</table>" if values else ""


def _number(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    text = "" if value is None else str(value)
    return escape(_FINISH_REASONS.get(text, text))
