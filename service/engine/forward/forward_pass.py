"""The two ways through a model, which must agree: its own unmodified layers, and fused ops.

    generic    any architecture: the model's forward pass, with our attention function and our linear layers
               (a model that computes attention itself is run over a cache, `cached_model.py`)
    fused      known architectures: the same weights, fewer and larger ops (`layers.py`)

The fused way is used if the model is recognised and both ways agree in a self-check.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor
from transformers import PreTrainedModel

from service.engine.adapters.resident_bases import ResidentBases
from service.engine.attention import reference
from service.engine.attention.masks import AttendsToLaterTokens, read_windows
from service.engine.attention.reference import (
    AttentionOptions,
    AttentionProbe,
    AttentionStep,
    NotPageable,
    PagedAttention,
    TokenRows,
    WindowedStep,
    attending,
)
from service.engine.forward import cached_model
from service.engine.forward.cached_model import CachedModel
from service.engine.forward.layers import FusedModel
from service.engine.forward.obstacles import DEVICE_ERRORS, PAGEABLE_LAYERS, find_obstacle
from service.engine.forward.self_check import TOLERANCES
from service.engine.forward.spec import ModelSpec, NotFusable, recognise
from service.engine.kv.cache import KVShape, PagedKV
from tessera.errors import UnsupportedModel
from tessera.model.pooling import HeadInput

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ModelFacts:
    """Facts about a model that a probe, a run of one token, has shown."""

    #: The shape of K and V that each layer stores per token.
    kv_shapes: tuple[KVShape, ...]
    #: The kind of attention of each layer; empty for a model that computes attention itself.
    options: tuple[AttentionOptions, ...]
    #: Query heads.
    num_heads: int
    vocab_size: int
    #: The windows of layers that pass another window, or none, than their own mask has; `options` has the
    #: mask's.
    windows: Mapping[int, int | None] = field(default_factory=dict)
    #: Whether the layers count the tokens of the cache, in a model that computes attention itself.
    has_counting_layers: bool = False

    @property
    def attends_itself(self) -> bool:
        """Whether the model computes attention itself, see `cached_model.py`."""
        return not self.options


@torch.inference_mode()
def install_attention(model: PreTrainedModel) -> ModelFacts:
    """Make `model` use our attention, or our cache if it computes attention itself, and probe it with one
    token.

    Raises `UnsupportedModel` if neither works.
    """
    obstacle = find_obstacle(model)
    if obstacle:
        raise _unsupported(model, obstacle)
    own_implementation = reference.implementation_of(model)
    try:
        return _probe_attention(model)
    except AttendsToLaterTokens:
        raise _unsupported(
            model,
            "its tokens attend to later ones (it is an encoder, or its config.json lacks is_decoder), so "
            "nothing of a text can be cached while it grows",
        ) from None
    except DEVICE_ERRORS:
        raise
    except Exception as error:  # an unknown keyword argument, or a mask that the model expects
        logger.info("%s cannot use paged attention: %s", type(model).__name__, error)
    model.set_attn_implementation(own_implementation)
    return install_cache(model)


@torch.inference_mode()
def install_cache(model: PreTrainedModel) -> ModelFacts:
    """Let `model` compute attention itself over our cache, and probe it with one token. Raises
    `UnsupportedModel`."""
    try:
        shapes, has_counting_layers, logits = cached_model.probe(model)
    except cached_model.NotCacheable as error:
        raise _unsupported(model, f"it {error}") from error
    except DEVICE_ERRORS:
        raise
    except Exception as error:
        reason = f"transformers cannot run it on one token: {type(error).__name__}: {error}"
        raise _unsupported(model, reason) from error
    return ModelFacts(shapes, (), 1, _vocab_size(model, logits), has_counting_layers=has_counting_layers)


def _probe_attention(model: PreTrainedModel) -> ModelFacts:
    """Install our attention in `model` and probe it with one token. Raises `NotPageable`, and any error of a
    model that cannot work with our attention."""
    config = model.config.get_text_config()
    types = set(getattr(config, "layer_types", None) or ())
    if types - PAGEABLE_LAYERS:
        raise NotPageable(f"layers of type {', '.join(sorted(types - PAGEABLE_LAYERS))}")
    # Without a cache Llama 4 counts from the start of the batch, which a probe is too short to show.
    if getattr(config, "attn_temperature_tuning", False):
        raise NotPageable("queries scaled by positions that its layers count in a cache")
    masks = read_windows(model)
    model.set_attn_implementation(reference.NAME)
    probe = AttentionProbe()
    zero = torch.zeros(1, dtype=torch.int64, device=model.device)
    logits = _run_model(model, zero, zero, probe, zero)
    layers = range(len(probe.shapes))
    if not layers or sorted(probe.shapes) != list(layers) or probe.num_calls != len(layers):
        raise NotPageable(f"{probe.num_calls} calls of our attention in layers {sorted(probe.shapes)}")
    passed = {layer: probe.options[layer].sliding_window for layer in layers}
    windows = {layer: window for layer, window in masks.items() if passed[layer] != window}
    own_windows = {**passed, **windows}
    return ModelFacts(
        tuple(probe.shapes[layer] for layer in layers),
        tuple(replace(probe.options[layer], sliding_window=own_windows[layer]) for layer in layers),
        probe.num_heads,
        _vocab_size(model, logits),
        windows,
    )


def _vocab_size(model: PreTrainedModel, logits: Tensor) -> int:
    return min(int(logits.shape[-1]), int(model.get_input_embeddings().weight.shape[0]))


def _unsupported(model: PreTrainedModel, reason: str) -> UnsupportedModel:
    return UnsupportedModel(f"{type(model).__name__} cannot be served: {reason}", param="base_model")


class ForwardPass:
    """Runs `model` in the better of the two ways. num_positions: the longest request in tokens."""

    def __init__(
        self,
        model: PreTrainedModel,
        facts: ModelFacts,
        bases: ResidentBases,
        *,
        num_positions: int,
        enable_fused: bool,
    ) -> None:
        self._model = model
        self._facts = facts
        self._bases = bases
        self._num_positions = num_positions
        self._cached: CachedModel | None = None
        if facts.attends_itself:
            self._cached = CachedModel(model, has_counting_layers=facts.has_counting_layers)
        self._spec: ModelSpec | None = None
        #: The fused way, if it is used.
        self.fused: FusedModel | None = None
        self._prepared_for: str | None = None
        #: Why the fused way is not used.
        self.reason = "not prepared yet"
        try:
            if not enable_fused:
                raise NotFusable("it is switched off")
            self._spec = recognise(model, facts.options)
        except NotFusable as error:
            self.reason = str(error)

    @property
    def mode(self) -> str:
        """The way in which the model is run, and why."""
        if self.fused is not None:
            return "fused"
        return f"{'generic' if self._cached is None else 'generic, over a cache'}: {self.reason}"

    def prepare(self, measure_error: Callable[[], float]) -> bool:
        """Fuse the weights with the factors of the default basis and check the result. Return False if this
        has been done already.

        measure_error: the difference between the two ways, as a share of the logits. Stays with the generic
        way if the fused one cannot be used, and logs which it is.
        """
        if self._prepared_for == self._bases.default_id:
            return False
        self._prepared_for = self._bases.default_id
        name = type(self._model).__name__
        if self._spec is not None:
            self.close()
            self._try_to_fuse(self._spec, measure_error)
        if self.fused is not None:
            logger.info("%s runs on the fused path", name)
        else:
            logger.info("%s runs on the generic path: %s", name, self.reason)
        return True

    def forward(
        self, rows: TokenRows, kv: PagedKV, step: AttentionStep, logit_rows: Tensor | None = None
    ) -> Tensor:
        """Return the logits [n, V] of some rows of the flattened batch, int64 [n], or of all rows."""
        if self.fused is not None:
            return self.fused.forward(rows, kv, step, logit_rows)
        return self.forward_generic(rows, kv, step, logit_rows)

    def forward_generic(
        self, rows: TokenRows, kv: PagedKV, step: AttentionStep, logit_rows: Tensor | None = None
    ) -> Tensor:
        """Run the unmodified model, whose attention writes to `kv` itself."""
        if self._cached is not None:
            assert isinstance(step, PagedAttention)
            return self._cached.forward(rows, kv, step, logit_rows, list(self._bases.tables.values()))
        if self._facts.windows:
            step = WindowedStep(step, self._facts.windows)
        return _run_model(self._model, rows.input_ids, rows.positions, step, logit_rows)

    def forward_hidden(
        self, rows: TokenRows, kv: PagedKV, step: AttentionStep, logit_rows: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return the logits [n, V] of some rows of the flattened batch, int64 [n], and their hidden states
        [n, d], which the output head reads."""
        if self.fused is not None:
            return self.fused.forward_hidden(rows, kv, step, logit_rows)
        if self._cached is not None:
            assert isinstance(step, PagedAttention)
            tables = list(self._bases.tables.values())
            return self._cached.forward_hidden(rows, kv, step, logit_rows, tables)
        with HeadInput(self._model) as head_input:
            logits = self.forward_generic(rows, kv, step, logit_rows)
        hidden = head_input.take().flatten(0, -2)
        return logits, hidden if len(hidden) == len(logits) else hidden.index_select(0, logit_rows)

    def follow_bases(self) -> None:
        """Follow the bases that were added and evicted."""
        if self.fused is not None:
            self.fused.follow(self._bases.tables)

    def close(self) -> None:
        """Restore the layers' own weights."""
        if self.fused is not None:
            self.fused.close()
            self.fused = None

    def _try_to_fuse(self, spec: ModelSpec, measure_error: Callable[[], float]) -> None:
        basis_id = self._bases.default_id
        try:
            self.fused = FusedModel(
                self._model, spec, self._facts.kv_shapes, basis_id=basis_id, num_positions=self._num_positions
            )
        except NotFusable as refusal:
            self.reason = str(refusal)
            return
        self.reason = self._self_check(measure_error)
        if self.reason:
            logger.error("the fused path of %s is wrong: %s", type(self._model).__name__, self.reason)
            self.close()

    def _self_check(self, measure_error: Callable[[], float]) -> str:
        """Compare the fused way with the generic one. Return what is wrong, or "". Raises an accelerator's
        own errors."""
        try:
            error = measure_error()
        except torch.AcceleratorError:
            raise
        except Exception as failure:  # a compiler of kernels may raise anything
            logger.exception("the self-check of the fused path failed")
            return f"its self-check failed: {failure!r}"
        if error <= TOLERANCES[self._model.dtype]:
            return ""
        return f"its logits differ from the model's own by {error:.2g} of their size"


def _run_model(
    model: PreTrainedModel,
    input_ids: Tensor,
    positions: Tensor,
    step: AttentionStep,
    logit_rows: Tensor | None,
) -> Tensor:
    """input_ids, positions: int64 [T]."""
    with attending(step):
        output = model(
            input_ids=input_ids[None],
            position_ids=positions[None],
            use_cache=False,
            logits_to_keep=0 if logit_rows is None else logit_rows,
        )
    logits: Tensor = output.logits[0]
    return logits
