"""The trial of a model before the first request: whether the engine computes the same as the model.

Three sequences of different lengths share steps of the engine, cut into pieces. Two of them have an adapter
of their own on every linear layer that can carry one. The result of each must be the same as when the model
runs it by itself: alone, whole, with its own eager attention. So anything that mixes the rows of a batch
(shared statistics, positions that are counted instead of read, state outside the KV cache, routing by
sequence) is found before it reaches a user. A part that fails is refused by name: the model, or the layers
that cannot carry adapters.

A successful trial takes eight forward passes of at most 26 tokens and the memory of rank-4 factors of every
linear layer: 0.5 s and 56 MB for an 8B model in bfloat16 on an H200. Only a failure takes longer, because its
reason must be found.
"""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Sequence
from contextlib import ExitStack

import torch
from torch import Tensor, nn
from transformers.utils import logging as transformers_logging

from service.engine.adapters.linear import rows_per_token
from service.engine.attention.reference import implementation_of
from service.engine.forward.forward_pass import ModelFacts, install_attention, install_cache
from service.engine.forward.obstacles import DEVICE_ERRORS
from service.engine.trial.trial_passes import AdaptedModel, TrialAdapter, Way
from tessera.errors import UnsupportedModel
from tessera.model.base_model import BaseModel, linear_layers

logger = logging.getLogger(__name__)

#: Largest difference of the logits as a share of their spread. Rounding gives 1e-6 in float32, 0.3 % in
#: float16 and 2.4 % in bfloat16 (gpt_oss on a CPU and an H200; most other models, such as an 8B Llama, show
#: no difference at all, because products of so few rows round alike). A wrong adapter on one layer of 21
#: gives 20 %.
TOLERANCES = {torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 6e-2}
#: In half precision this share of the rows must be close: rounding may route single tokens to other experts.
_NEAR_SHARE = 0.75
#: Tokens of the sequences: two with adapters, and one without. The length of the last is a prime number, so
#: that no shape of another meaning has the same number of rows.
LENGTHS = (8, 5, 13)
#: Rounding may tip a router that is undecided between two experts; on a second draw it is not undecided.
_NUM_DRAWS = 2

_AS_SERVED = Way(together=True, in_pieces=True)
_MIXES = "gives a sequence different results when other sequences share its step"
#: The reason to report if the base model fails in one of these ways and not in those before it.
_MEANINGS = {
    Way(together=False, in_pieces=False): "does not compute the same over the paged KV cache as by itself",
    Way(together=True, in_pieces=False): _MIXES,
    Way(
        together=False, in_pieces=True
    ): "gives different results for a text in pieces than for the whole text: later tokens "
    "change the results of earlier ones, or it keeps state outside the KV cache",
    _AS_SERVED: _MIXES,
}


@torch.inference_mode()
def install_and_try(base: BaseModel) -> tuple[ModelFacts, dict[str, str]]:
    """Prepare `base` for the engine and try it. Also returns the linear layers that cannot carry adapters,
    each with the reason.

    Raises `UnsupportedModel` for a model that the engine would not serve exactly.
    """
    before, verbosity = implementation_of(base.model), transformers_logging.get_verbosity()
    # otherwise each change of attention logs a warning per vision tower
    transformers_logging.set_verbosity_error()
    try:
        facts = install_attention(base.model)
        try:
            return facts, _Trial(base, facts).run()
        except UnsupportedModel as refusal:
            if facts.attends_itself:
                raise
            logger.info("%s; trying it with its own attention", refusal)
            base.model.set_attn_implementation(before)
            try:
                facts = install_cache(base.model)
                return facts, _Trial(base, facts).run()
            except UnsupportedModel:
                raise refusal from None
    except BaseException:
        base.model.set_attn_implementation(before)
        raise
    finally:
        transformers_logging.set_verbosity(verbosity)


class _Trial:
    def __init__(self, base: BaseModel, facts: ModelFacts) -> None:
        self._base = base
        self._facts = facts
        self._linears = {
            name: linear
            for name, linear in linear_layers(base.model).items()
            if linear.weight.is_floating_point()
        }
        self._lengths = [min(length, base.max_position) for length in LENGTHS]
        self._own: dict[tuple[int, int], Tensor] = {}  # logits of the base model, by draw and sequence

    def run(self) -> dict[str, str]:
        """Return the layers that cannot carry an adapter, with the reasons. Raises `UnsupportedModel`."""
        shapes = self._input_shapes()
        unfit = self._unfit_by_shape(shapes)
        unfit |= self._unfit_without_call([name for name in self._linears if name not in shapes])
        fit = [name for name in shapes if name not in unfit]
        if not self._fault(fit):
            return unfit
        self._check_base_model()
        for names in _by_kind(fit):
            if fault := self._fault(names):
                unfit |= dict.fromkeys(names, fault)
        if fault := self._fault([name for name in fit if name not in unfit]):
            raise self._unsupported(f"cannot carry several adapters in one step ({fault})")
        return unfit

    def _input_shapes(self) -> dict[str, list[torch.Size]]:
        """Return the shapes of the inputs of all layers in a pass of the last sequence, in the order of the
        model."""
        shapes: defaultdict[str, list[torch.Size]] = defaultdict(list)
        with ExitStack() as hooks:
            for name, linear in self._linears.items():

                def note(_: nn.Module, inputs: tuple[Tensor, ...], name: str = name) -> None:
                    shapes[name].append(inputs[0].shape if inputs else torch.Size())

                hooks.callback(linear.register_forward_pre_hook(note).remove)
            try:
                self._own_logits(self._adapted([], 0), 0, len(LENGTHS) - 1)
            except DEVICE_ERRORS:
                raise
            except Exception as error:
                raise self._unsupported(f"fails on a short text by itself: {error}") from error
        return {name: shapes[name] for name in self._linears if name in shapes}

    def _unfit_by_shape(self, shapes: dict[str, list[torch.Size]]) -> dict[str, str]:
        num_tokens = self._lengths[-1]
        unfit = {}
        for name, own in shapes.items():
            odd = [list(s) for s in own if not s or rows_per_token(s[:-1], num_tokens) is None]
            if odd:
                unfit[name] = f"it sees {odd[0]} in a text of {num_tokens} tokens, not every token in order"
        return unfit

    def _unfit_without_call(self, names: list[str]) -> dict[str, str]:
        """Those of the layers without a call that still have their weight read. The others, such as those of
        a vision tower, are not reached by text, and an adapter on them changes nothing."""
        unfit: dict[str, str] = {}
        if self._is_read(names):
            for own in _by_kind(names):
                if self._is_read(own):
                    unfit |= dict.fromkeys(own, "the model reads its weight without calling it")
        return unfit

    def _is_read(self, names: Sequence[str]) -> bool:
        """Whether the weights of these layers matter to the logits."""
        if not names:
            return False
        weights = {name: self._linears[name].weight for name in names}
        try:
            for name, weight in weights.items():
                nothing = torch.full((1, 1), float("nan"), dtype=weight.dtype, device=weight.device)
                self._linears[name].weight = nn.Parameter(nothing.expand(weight.shape), requires_grad=False)
            logits = self._adapted([], 0).own_logits(self._token_ids(0)[0])
            return not bool(logits.isfinite().all())
        finally:
            for name, weight in weights.items():
                self._linears[name].weight = weight

    def _check_base_model(self) -> None:
        """Check that the base model is served exactly. Raises `UnsupportedModel`, with the reason if it can
        be determined."""
        if self._numbers_positions_differently():
            raise self._unsupported(
                "does not number the positions of a text from 0, as the engine does (RoBERTa and similar "
                "models start after the number of their padding token)"
            )
        for way, meaning in _MEANINGS.items():
            if fault := self._fault([], way):
                raise self._unsupported(f"{meaning} ({fault})")

    def _numbers_positions_differently(self) -> bool:
        """Whether the positions that the model uses by itself are not 0, 1, 2 and so on."""
        model, token_ids = self._adapted([], 0), self._token_ids(0)[-1]
        positions = torch.arange(len(token_ids), device=self._base.device)[None]
        try:
            logits = model.own_logits(token_ids, position_ids=positions)
        except DEVICE_ERRORS:
            raise
        except Exception:  # it accepts no positions
            return False
        dtype = self._base.model.dtype
        return difference(logits, self._own_logits(model, 0, len(LENGTHS) - 1), dtype) > TOLERANCES[dtype]

    def _fault(self, names: Sequence[str], way: Way = _AS_SERVED) -> str:
        """Return what is wrong with adapters on these layers; "" if they are right in one of the draws."""
        fault = ""
        for draw in range(_NUM_DRAWS):
            fault = self._fault_in_draw(names, draw, way)
            if not fault:
                break
        return fault

    def _fault_in_draw(self, names: Sequence[str], draw: int, way: Way) -> str:
        model = self._adapted(names, draw)
        adapters = [*model.adapters, None] if names else [None] * len(LENGTHS)
        try:
            own = [self._own_logits(model, draw, i, adapter) for i, adapter in enumerate(adapters)]
            served = model.served_logits(list(zip(self._token_ids(draw), adapters, strict=True)), way)
        except DEVICE_ERRORS:
            raise
        except Exception as error:  # the code of a model may raise anything
            logger.info("a pass of the trial failed", exc_info=error)
            return f"the pass fails: {error}"
        dtype = self._base.model.dtype
        gap = max(difference(*pair, dtype) for pair in zip(served, own, strict=True))
        return "" if gap <= TOLERANCES[dtype] else f"its logits differ by {gap:.2g} of their spread"

    def _own_logits(
        self, model: AdaptedModel, draw: int, index: int, adapter: TrialAdapter | None = None
    ) -> Tensor:
        if adapter is not None:
            return model.own_logits(self._token_ids(draw)[index], adapter)
        if (draw, index) not in self._own:
            self._own[draw, index] = model.own_logits(self._token_ids(draw)[index])
        return self._own[draw, index]

    def _token_ids(self, draw: int) -> list[list[int]]:
        """Token ids from the middle of the vocabulary, because special tokens are at its ends."""
        generator = torch.Generator().manual_seed(draw)
        low, high = self._facts.vocab_size // 4, max(1, self._facts.vocab_size // 2)
        return [torch.randint(low, high, (n,), generator=generator).tolist() for n in self._lengths]

    def _adapted(self, names: Sequence[str], draw: int) -> AdaptedModel:
        linears = {name: self._linears[name] for name in names}
        return AdaptedModel(self._base, self._facts, linears, max_tokens=sum(LENGTHS), seed=draw)

    def _unsupported(self, reason: str) -> UnsupportedModel:
        name = type(self._base.model).__name__
        return UnsupportedModel(f"{name} cannot be served: it {reason}", param="base_model")


def difference(logits: Tensor, expected: Tensor, dtype: torch.dtype) -> float:
    """Return the difference between two sets of logits [n, V] as a share of their spread: that of the worst
    row in float32, and of the worst of the closest three quarters in half precision. Infinite if one is not
    finite."""
    logits, expected = (x.float() - x.float().mean(-1, keepdim=True) for x in (logits, expected))
    rows = (logits - expected).norm(dim=-1) / expected.norm(dim=-1)
    if not rows.isfinite().all():
        return float("inf")
    return float(rows.quantile(1.0 if dtype == torch.float32 else _NEAR_SHARE, interpolation="lower"))


def _by_kind(names: Sequence[str]) -> list[list[str]]:
    """Group layers of all blocks by the last part of their name."""
    kinds: defaultdict[str, list[str]] = defaultdict(list)
    for name in names:
        kinds[name.split(".")[-1]].append(name)
    return list(kinds.values())
