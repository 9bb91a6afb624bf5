"""Two plots for each data set: loss against trained numbers, and the learning curves of one rank."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.quality.results import Results

#: Curves of one picture at most: the best of each form, and LoRA.
MAX_CURVES = 9
#: Methods of one form in the picture of losses.
MAX_LINES = 12
MARKERS = {"": "o", "lora": "s", "peft": "^"}


class PlottingMissing(Exception):
    """There is no matplotlib."""


def plot(results: Results, path: Path) -> None:
    """Write the picture. Raises `PlottingMissing`, with what to install."""
    try:
        import matplotlib  # type: ignore[import-not-found,unused-ignore]
    except ImportError as error:
        raise PlottingMissing("no plot without matplotlib: pip install matplotlib") from error
    matplotlib.use("Agg")
    from matplotlib import pyplot

    names = [data for data in results.all_datasets if results.ranks(data)]
    if not names:
        return
    figure, axes = pyplot.subplots(2, len(names), figsize=(7.5 * len(names), 11), squeeze=False)
    for column, data in enumerate(names):
        draw_losses(axes[0][column], results, data)
        draw_curves(axes[1][column], results, data)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def draw_losses(axis: Any, results: Results, data: str) -> None:
    """One point per method and rank, joined over ranks."""
    lines: dict[str, list[tuple[int, float]]] = {}
    for rank in results.ranks(data):
        for case in results.cases(data, rank):
            loss = results.loss(data, case, rank)
            if loss is not None and loss.mean < float("inf"):
                lines.setdefault(case, []).append((results.parameters(data, case, rank), loss.mean))
    for case, points in chosen_lines(lines):
        xs, ys = zip(*sorted(points), strict=True)
        axis.plot(xs, ys, marker=marker(case), markersize=4, linewidth=0.8, label=case)
    if data in results.base:
        axis.axhline(results.base[data], color="grey", linewidth=0.8, linestyle=":", label="base model")
    axis.set_xscale("log")
    axis.set(title=f"{data}: best of the sweep", xlabel="trained numbers", ylabel="validation loss")
    axis.legend(fontsize=5, ncols=3)


def chosen_lines(lines: dict[str, list[tuple[int, float]]]) -> list[tuple[str, list[tuple[int, float]]]]:
    """The best of each form, by the lowest loss."""
    ordered = sorted(lines.items(), key=lambda item: min(loss for _, loss in item[1]))
    chosen = []
    for form in MARKERS:
        chosen += [item for item in ordered if item[0].rpartition(":")[0] == form][:MAX_LINES]
    return chosen


def draw_curves(axis: Any, results: Results, data: str) -> None:
    """Training losses at each method's best rate, at the rank with the most methods."""
    rank = max(results.ranks(data), key=lambda r: len(results.cases(data, r)))
    cases = sorted(results.cases(data, rank), key=lambda case: final_loss(results, data, case, rank))
    forms = {form: [case for case in cases if case.rpartition(":")[0] == form] for form in MARKERS}
    per_form = MAX_CURVES // len(MARKERS)
    for chosen in forms.values():
        for case in chosen[:per_form]:
            loss = results.loss(data, case, rank)
            assert loss is not None
            run = results.sweep(data, case, rank)[loss.rate][0]
            points = [(step, value) for step, value in run["train_curve"] if value is not None]
            axis.plot(*zip(*points, strict=True), linewidth=0.9, label=f"{case} ({loss.rate:g})")
            valid = [(step, value) for step, value in run["valid_curve"] if value is not None]
            axis.plot(*zip(*valid, strict=True), marker(case), markersize=4, color=axis.lines[-1].get_color())
    axis.set(title=f"{data}, r = {rank}: lines train, points validation", xlabel="step", ylabel="loss")
    axis.legend(fontsize=6)


def final_loss(results: Results, data: str, case: str, rank: int) -> float:
    loss = results.loss(data, case, rank)
    return float("inf") if loss is None else loss.mean


def marker(case: str) -> str:
    return MARKERS[case.rpartition(":")[0]]
