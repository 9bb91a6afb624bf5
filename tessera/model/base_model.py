"""The frozen base model: load it, name it by its bytes, find and replace its target modules.

Knows nothing of adapters, Redis or HTTP. The model classes of transformers are used unmodified.
"""

from __future__ import annotations

import fnmatch
import hashlib
import os
import re
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

import torch
from torch import nn
from transformers import AutoTokenizer, PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer
from transformers.pytorch_utils import Conv1D
from transformers.utils import logging as transformers_logging

from tessera.defaults import BUNDLED_MODEL, LLAMA_LINEARS
from tessera.errors import InvalidInput, UnsupportedModel
from tessera.model import quantised
from tessera.model.pretrained import load_weights
from tessera.model.rope import pin_rotations

#: Output heads, by any part of a name. They see only the positions that are sampled, and are often tied to
#: the embeddings.
_HEADS = {"lm_head", "embed_out", "cls", "pred_layer"}
#: Words in the names of modules that no text goes through.
_TOWERS = {"vision", "visual", "image", "audio", "speech"}
#: What chooses experts or tokens, by any part of a name: where its scores change, choices change by jumps.
_SELECTORS = {"gate", "router", "wg", "classifier", "shared_expert_gate", "indexer"}

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}

#: What a model is made of, in the order in which it is digested. Pickled weights are never loaded.
_WEIGHT_PATTERNS = ("config.json", "*.safetensors", "*.safetensors.index.json")
#: What configurations call the longest sequence, and what is taken where they do not say (Bloom, say).
_MAX_POSITION_FIELDS = ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length")
_DEFAULT_MAX_POSITION = 2048
#: Files digested at once: one core hashes 1.3 GB a second.
_MAX_DIGESTS = 4


@dataclass(frozen=True)
class BaseModel:
    """A loaded base model, whose linear layers are all `torch.nn.Linear`, see `make_linear`.

    model_id: `model_digest` of its files, the name that bases refer to.
    """

    name: str
    model_id: str
    model: PreTrainedModel
    #: The longest text that is served and trained, in tokens; None: as long as the model takes.
    max_model_len: int | None = None

    def __post_init__(self) -> None:
        make_linear(self.model)

    @property
    def device(self) -> torch.device:
        return torch.device(self.model.device)

    @property
    def max_position(self) -> int:
        """The longest sequence in tokens that the model was made for and is used for."""
        config = self.model.config.get_text_config()
        names = (name for name in _MAX_POSITION_FIELDS if getattr(config, name, None))
        longest = int(getattr(config, next(names, ""), _DEFAULT_MAX_POSITION))
        return min(longest, self.max_model_len or longest)


def load_base_model(
    source: str | Path,
    *,
    revision: str | None = None,
    device: str = "auto",
    dtype: str = "auto",
    max_model_len: int | None = None,
) -> BaseModel:
    """Load frozen weights from a directory or a hub id, and choose its rotations (`rope.py`).

    device: "auto" takes CUDA if there is one. dtype: "auto" is bfloat16 on CUDA and float32 on CPU, where
    half precision is slower and the reference results are wanted. Raises `UnsupportedModel`.
    """
    device = resolve_device(device)
    torch_dtype = resolve_dtype(dtype, device)
    folder = model_folder(source, revision=revision)
    quantised.check_before_load(source, folder)
    transformers_logging.disable_progress_bar()  # a log is no place for a moving bar
    with ThreadPoolExecutor(1) as beside:  # hashing 16 GB in one file takes 12 s
        digest = beside.submit(model_digest, folder)
        model = load_weights(source, folder, torch_dtype)
        quantised.check_loaded(source, folder, model)
        if model.dtype != torch_dtype:  # transformers dequantises into a dtype of its own
            model.to(torch_dtype)
        model.requires_grad_(False)
        model.eval()
        model.to(device)
        base = BaseModel(model_name(source), digest.result(), model, max_model_len)
        pin_rotations(model, base.max_position)
        return base


def load_tokenizer(source: str | Path, *, revision: str | None = None) -> Tokenizer:
    """The tokenizer (with its chat template) of a base model. Raises `UnsupportedModel`."""
    try:
        return AutoTokenizer.from_pretrained(model_folder(source, revision=revision), trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise UnsupportedModel(
            f"cannot load the tokenizer of {source}: {error}", param="base_model"
        ) from error


def resolve_device(device: str) -> str:
    return ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device


def resolve_dtype(dtype: str, device: str) -> torch.dtype:
    """Raises `InvalidInput` for a name that is not a floating-point dtype."""
    if dtype == "auto":
        return torch.bfloat16 if device.startswith("cuda") else torch.float32
    if dtype not in DTYPES:
        raise InvalidInput(f"dtype must be auto, {', '.join(DTYPES)}; got {dtype!r}", param="dtype")
    return DTYPES[dtype]


def model_name(source: str | Path) -> str:
    """What clients call the base model: the last part of its directory or hub id."""
    return Path(os.path.abspath(source)).name if Path(source).exists() else str(source).split("/")[-1]


def public_source(source: str | Path) -> str:
    """How others find the base model: by the whole hub id, or by a directory's name without its path."""
    return model_name(source) if Path(source).exists() else str(source)


def model_folder(source: str | Path, *, revision: str | None = None) -> Path:
    """The local directory of a model, fetched from the hub if `source` is no directory."""
    if Path(source).is_dir():
        return Path(source)
    if str(source) == str(BUNDLED_MODEL):
        raise UnsupportedModel(
            "the bundled model is in the repository, not in the package: name a base model, by a directory "
            "in transformers' format or a hub id (TESSERA_BASE_MODEL for the service and the worker)",
            param="base_model",
        )
    try:
        from huggingface_hub import snapshot_download

        patterns = [*_WEIGHT_PATTERNS, "*.json", "*.jinja", "*.model"]
        return Path(snapshot_download(str(source), revision=revision, allow_patterns=patterns))
    except Exception as error:
        raise UnsupportedModel(
            f"{source} is neither a directory nor a model that the hub can deliver: {error}",
            param="base_model",
        ) from error


def model_digest(folder: Path) -> str:
    """SHA-256 over the names and contents of config.json and the weight files, as hex.

    A file of the hub's cache is a link to a blob named by its SHA-256: that name is used instead of reading
    gigabytes again. Raises `UnsupportedModel` if the folder holds no safetensors file.
    """
    names = sorted({path.name for pattern in _WEIGHT_PATTERNS for path in folder.glob(pattern)})
    if not any(name.endswith(".safetensors") for name in names):
        raise UnsupportedModel(f"{folder} holds no *.safetensors file; pickled weights are not loaded")
    digest = hashlib.sha256()
    with ThreadPoolExecutor(_MAX_DIGESTS) as together:  # hashing lets other threads run
        for name, file_digest in zip(
            names, together.map(_file_digest, [folder / name for name in names]), strict=True
        ):
            digest.update(f"{name}\0{file_digest}\n".encode())
    return digest.hexdigest()


def _file_digest(path: Path) -> str:
    blob = path.resolve().name
    if path.is_symlink() and re.fullmatch(r"[0-9a-f]{64}", blob):
        return blob
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def iter_target_modules(
    model: nn.Module, patterns: Sequence[str] = LLAMA_LINEARS
) -> Iterator[tuple[str, nn.Linear]]:
    """The linear layers to adapt, in model order, as (dotted name, module); see `choose_targets`.

    Raises `UnsupportedModel` naming the candidates if nothing matches, and for a matching layer whose weight
    is quantised or not two-dimensional. One list may serve several architectures, so single patterns may
    match nothing; what a user asks for is checked by `check_patterns`.
    """
    linears = linear_layers(model)
    chosen = set(choose_targets(list(linears), patterns))
    for name, module in model.named_modules():
        if name not in chosen and (is_plain_linear(module) or not _is_named(name, patterns)):
            continue
        if not hasattr(module, "weight") or _HEADS & set(name.split(".")):
            continue
        if not is_plain_linear(module) or not module.weight.is_floating_point():
            raise UnsupportedModel(
                f"target module {name} is a {type(module).__name__} with {module.weight.dtype} weights; "
                "adapters need a torch.nn.Linear with floating-point weights",
                param="target_modules",
            )
        yield name, module
    if not chosen:
        check_patterns(list(linears), patterns)


def linear_layers(model: nn.Module) -> dict[str, nn.Linear]:
    """The linear layers that text goes through, but for the output head, by dotted name, in model order."""
    head = model.get_output_embeddings() if isinstance(model, PreTrainedModel) else None
    found = {}
    for name, module in model.named_modules():
        parts = set(name.split("."))
        words = {word for part in parts for word in part.split("_")}
        if is_plain_linear(module) and module is not head and not (parts & _HEADS or words & _TOWERS):
            found[name] = module
    return found


def is_plain_linear(module: nn.Module) -> TypeGuard[nn.Linear]:
    """Whether a module gives a product and no more: some routers of transformers are linear by class only."""
    return isinstance(module, nn.Linear) and "Router" not in type(module).__name__


def choose_targets(names: Sequence[str], patterns: Sequence[str]) -> list[str]:
    """Which of a model's linear layers are adapted.

    A pattern matches the last part of a dotted name, or the whole of it, with shell wildcards: "q_proj",
    "*.mlp.*". "all-linear" is every layer but single experts, which see only the tokens that are routed to
    them. The default, Llama's seven names, means the same layers in other architectures: where a model does
    not have all seven, they are all linear layers of its decoder layers but experts and routers.
    """
    whole = [name for name in names if "experts" not in name.split(".")]
    if set(patterns) == set(LLAMA_LINEARS):
        in_layers = [name for name in whole if any(part.isdecimal() for part in name.split("."))]
        if not set(LLAMA_LINEARS) <= {name.split(".")[-1] for name in in_layers}:
            return [name for name in in_layers if not _SELECTORS & set(name.split("."))]
    if "all-linear" in patterns:
        return whole
    return [name for name in names if _is_named(name, patterns)]


def check_patterns(names: Sequence[str], patterns: Sequence[str]) -> None:
    """Raises `UnsupportedModel` for patterns that match no layer in `choose_targets`.

    A misspelt name would train less than was asked for. The default names may be absent, see there.
    """
    if choose_targets(names, patterns):
        if set(patterns) == set(LLAMA_LINEARS):
            return
        patterns = [p for p in patterns if p != "all-linear" and not any(_is_named(n, [p]) for n in names)]
        if not patterns:
            return
    kinds = sorted({name.split(".")[-1] for name in names})
    raise UnsupportedModel(
        f"no linear layer matches {list(patterns)}; the model has {kinds}", param="target_modules"
    )


def _is_named(name: str, patterns: Sequence[str]) -> bool:
    last = name.split(".")[-1]
    return any(fnmatch.fnmatchcase(last, p) or fnmatch.fnmatchcase(name, p) for p in patterns)


def make_linear(model: nn.Module) -> None:
    """Replace every `Conv1D` of transformers (GPT-2's kind of linear layer, whose weight is [d_in, d_out]) by
    the same function as a `torch.nn.Linear` over the same memory, so that all target modules are alike."""
    for name in [name for name, module in model.named_modules() if isinstance(module, Conv1D)]:
        replace_module(model, name, _linear_of)


def _linear_of(conv: nn.Module) -> nn.Linear:
    weight, bias = conv.weight, conv.bias
    assert isinstance(weight, nn.Parameter)
    assert isinstance(bias, nn.Parameter)
    d_in, d_out = weight.shape
    linear = nn.Linear(d_in, d_out, device="meta")
    linear.weight = nn.Parameter(weight.detach().T, requires_grad=weight.requires_grad)
    linear.bias = bias
    return linear.train(conv.training)


def replace_module(model: nn.Module, name: str, make: Callable[[Any], nn.Module]) -> nn.Module:
    """Put `make(old module)` in the place of the module called `name`; returns the new module."""
    parent_name, _, child = name.rpartition(".")
    parent = model.get_submodule(parent_name)
    new = make(getattr(parent, child))
    setattr(parent, child, new)
    return new
