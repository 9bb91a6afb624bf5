"""The base model: whether it is complete, fit for adapters, and has a chat template. Loads no weights."""

from __future__ import annotations

import json
import os
from collections.abc import Generator, Iterator
from pathlib import Path

from tessera.cli.applications import repository_url
from tessera.cli.doctor.findings import Finding, ok, problem, warning
from tessera.defaults import BUNDLED_MODEL
from tessera.errors import TesseraError
from tessera.settings import CommonSettings

_CHOOSE = "set TESSERA_BASE_MODEL to a directory in transformers' format or to a hub id (owner/name)"


def check(settings: CommonSettings) -> Iterator[Finding]:
    """Yield findings about the base model that these settings name."""
    folder = yield from _find(settings.base_model, settings.base_model_revision)
    if folder is None:
        return
    yield _weights(settings.base_model, folder)
    yield _layers(settings, folder)
    yield _template(folder)


def _find(source: str, revision: str | None) -> Generator[Finding, None, Path | None]:
    """Return the model's folder on this machine, or None after a finding that says why there is none."""
    path = Path(source)
    if path.is_dir():
        if not (path / "config.json").is_file():
            yield problem("model", f"{path} holds no config.json", _CHOOSE)
            return None
        yield ok("model", f"{path.resolve()}")
        return path
    if source == str(BUNDLED_MODEL):
        yield problem(
            "model",
            "TESSERA_BASE_MODEL is unset, and its default, the tiny model, is only in the repository",
            f"{_CHOOSE}, or clone {repository_url()}",
        )
        return None
    if path.is_absolute() or source.startswith((".", "~")) or source.count("/") > 1:
        yield problem("model", f"there is no directory {source}, and it is not a hub id", _CHOOSE)
        return None
    return (yield from _find_in_cache(source, revision))


def _find_in_cache(source: str, revision: str | None) -> Generator[Finding, None, Path | None]:
    """Find a hub id in the cache of the hub's client. A check fetches nothing."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.constants import HF_HUB_OFFLINE
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        folder = Path(snapshot_download(source, revision=revision, local_files_only=True))
    except HFValidationError as error:
        yield problem("model", f"{source} is neither a directory nor a hub id: {error}", _CHOOSE)
        return None
    except LocalEntryNotFoundError:
        missing = f"{source} is neither a directory nor in the hub's cache on this machine"
        if HF_HUB_OFFLINE:
            yield problem("model", f"{missing}, and HF_HUB_OFFLINE is set", "unset it for the first start")
        else:
            yield warning(
                "model",
                f"{missing}: the first start fetches it, if the hub has a model of this name",
                f"fetch it now with `hf download {source}`, and run `tessera doctor` again",
            )
        return None
    at = f" at revision {revision}" if revision else ""
    yield ok("model", f"{source}{at} in {folder}")
    return folder


def _weights(source: str, folder: Path) -> Finding:
    """Check that the weight files exist, can be read, and have a format that is loaded."""
    weights = {path.name for path in folder.glob("*.safetensors")}
    if not weights:
        kinds = sorted({path.suffix for path in folder.iterdir()} & {".bin", ".pt", ".pth", ".gguf"})
        found = f", only {', '.join(kinds)}" if kinds else ""
        return problem(
            "model",
            f"it has no *.safetensors file{found}",
            "use a copy in safetensors format; pickled weights are never loaded",
        )
    for index in folder.glob("*.safetensors.index.json"):
        missing = sorted(set(json.loads(index.read_bytes())["weight_map"].values()) - weights)
        if missing:
            return problem(
                "model",
                f"{len(missing)} of its weight files are missing: {missing[0]}",
                "fetch or copy all files of the model again",
            )
    closed = sorted(path.name for path in folder.iterdir() if not os.access(path, os.R_OK))
    if closed:
        return problem("model", f"user {os.getuid()} may not read {', '.join(closed)}", "chmod a+r them")
    num_bytes = sum((folder / name).stat().st_size for name in weights)
    return ok("model", f"{len(weights)} weight file(s), {num_bytes / 2**30:.2f} GiB")


def _layers(settings: CommonSettings, folder: Path) -> Finding:
    """Check that config.json can be read, and that adapters of the default basis fit the linear layers."""
    from tessera.model.layout import linear_shapes
    from tessera.model.quantised import check_before_load
    from tessera.model.target_modules import check_patterns, check_rank, choose_targets

    try:
        check_before_load(settings.base_model, folder)
        shapes = linear_shapes(folder)
        check_patterns(list(shapes), settings.target_modules)
        targets = [shapes[name] for name in choose_targets(list(shapes), settings.target_modules)]
        for target in targets:
            check_rank(settings.rank, target)
    except TesseraError as error:
        advice = {
            "target_modules": "correct TESSERA_TARGET_MODULES, or unset it",
            "rank": "lower TESSERA_RANK",
        }
        return problem("model", error.message, advice.get(error.param or "", "take another base model"))
    kinds = sorted({target.name.split(".")[-1] for target in targets})
    return ok(
        "model",
        f"not quantised; {len(targets)} target modules ({', '.join(kinds)}), adapters of rank "
        f"{settings.rank} take {2 * len(targets) * settings.rank**2 / 1024:,.1f} KiB in float16",
    )


def _template(folder: Path) -> Finding:
    from tessera.chat.chat_format import load_chat_format

    try:
        chat = load_chat_format(folder)
    except TesseraError as error:
        return problem("template", error.message, "take a model that has a tokenizer in its folder")
    if not chat.has_template:
        return warning(
            "template",
            "the tokenizer loads, but has no chat template: chat completions and chat data are refused",
            "take the model's instruction-tuned variant, or use /v1/completions and prompt/completion data",
        )
    if chat.turn_end is None:
        return warning(
            "template",
            "the chat template has no token that ends an answer, so answers run until max_tokens",
            "send `stop` with each request",
        )
    end = chat.tokenizer.convert_ids_to_tokens(chat.turn_end)
    return ok("template", f"tokenizer and chat template load; {end} ends an answer")
