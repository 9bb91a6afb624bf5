"""Answers of the base model and of a trained adapter to the same held-out prompts, side by side.

Both answers are decoded greedily in one batch of two equal prompts, so no padding is needed and every model
of transformers can do it. The work holds the model only for one prompt at a time and ends after a given time,
so that other jobs wait little.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tessera.chat.chat_format import ChatFormat, EncodedExample
from tessera.formats.adapter import Adapter
from tessera.formats.basis import Basis
from tessera.model.base_model import BaseModel
from trainer_worker.common.model_lock import ModelLock, Progress
from trainer_worker.training.run import TrainRun

#: Longest answer, in tokens. A report shows what an adapter has learned, not how it continues.
MAX_NEW_TOKENS = 96
#: Share of the training time that the answers may take, within these bounds in seconds.
TIME_SHARE, MIN_TIME_S, MAX_TIME_S = 0.1, 1.0, 10.0


@dataclass(frozen=True)
class SampleAnswers:
    """One prompt with three answers, as text."""

    prompt: str
    #: The answer of the example.
    expected: str
    base: str
    tuned: str
    #: False if no example was held back, so that the adapter has learned this one.
    is_held_out: bool = True


class SampleMaker:
    """Makes the samples of finished runs."""

    def __init__(self, base: BaseModel, chat: ChatFormat, model_lock: ModelLock, *, max_samples: int) -> None:
        self._base, self._chat, self._model_lock = base, chat, model_lock
        self._max_samples = max_samples

    async def make(
        self, run: TrainRun, adapter: Adapter, basis: Basis, *, training_s: float
    ) -> list[SampleAnswers]:
        """Return up to max_samples samples of the run's held-out examples, as many as the time allows.

        training_s: how long the training took. Raises what the model raises.
        """
        is_held_out = bool(run.data.valid)
        chosen = run.data.valid_chosen if is_held_out else run.data.train_chosen
        examples = run.data.valid_examples if is_held_out else run.data.train_examples
        tasks = [
            last_answer(rows[: chosen[index]] if chosen else rows)
            for index, rows in enumerate(examples[: self._max_samples])
        ]
        ends_at = time.monotonic() + min(MAX_TIME_S, max(MIN_TIME_S, TIME_SHARE * training_s))
        samples: list[SampleAnswers] = []
        decoder = GreedyPair(self._base, adapter, basis, end_ids=self._chat.end_ids)
        for prompt, expected in tasks:
            if time.monotonic() >= ends_at:
                break
            limit = min(MAX_NEW_TOKENS, len(expected) + len(expected) // 2 + 8)

            def decode(
                _: Progress, prompt: list[int] = prompt, limit: int = limit
            ) -> tuple[list[int], list[int]]:
                return decoder.answers(prompt, max_new_tokens=limit, ends_at=ends_at)

            answers = await self._model_lock.run(
                decode,
                modules=(),
                on_progress=lambda done, total: None,
            )
            base, tuned = map(self._text, answers)
            samples.append(SampleAnswers(self._text(prompt), self._text(expected), base, tuned, is_held_out))
        return samples

    def _text(self, ids: Sequence[int]) -> str:
        text = self._chat.tokenizer.decode(list(ids), skip_special_tokens=True)
        assert isinstance(text, str)
        return text.strip()


def last_answer(rows: Sequence[EncodedExample]) -> tuple[list[int], list[int]]:
    """Return the token ids of an example's last prompt, and of the answer that is learned after it."""
    row = rows[-1]
    end = max(index for index, is_learned in enumerate(row.loss_mask) if is_learned) + 1
    start = end - 1
    while row.loss_mask[start - 1]:
        start -= 1
    return list(row.token_ids[:start]), list(row.token_ids[start:end])


class GreedyPair:
    """Decodes two rows of the same prompt: row 0 by the base model, row 1 with the adapter."""

    def __init__(self, base: BaseModel, adapter: Adapter, basis: Basis, *, end_ids: Sequence[int]) -> None:
        self._base, self._adapter, self._basis, self._end_ids = base, adapter, basis, set(end_ids)
        self._hooks: dict[str, _AddToSecondRow] = {}

    @torch.no_grad()
    def answers(
        self, prompt: Sequence[int], *, max_new_tokens: int, ends_at: float
    ) -> tuple[list[int], list[int]]:
        """Return the ids of both answers, up to an end token.

        They may break off at `ends_at`, by the monotonic clock.
        """
        model, device = self._base.model, self._base.device
        ids = torch.tensor([list(prompt)] * 2, device=device)
        past: Any = None
        with self._second_row_adapted():
            for _ in range(min(max_new_tokens, self._base.max_position - len(prompt))):
                new = ids if past is None else ids[:, -1:]
                output = model(input_ids=new, past_key_values=past, use_cache=True)
                past = getattr(output, "past_key_values", None)  # None: compute everything again
                ids = torch.cat([ids, output.logits[:, -1].argmax(-1)[:, None]], dim=1)
                is_over = all(self._end_ids & set(row) for row in ids[:, len(prompt) :].tolist())
                if is_over or time.monotonic() >= ends_at:
                    break
        base, tuned = (self._before_end(row) for row in ids[:, len(prompt) :].tolist())
        return base, tuned

    @contextmanager
    def _second_row_adapted(self) -> Iterator[None]:
        """Add B R A x to the outputs of row 1."""
        if not self._hooks:
            self._hooks = self._make_hooks()
        handles = []
        try:
            for name, hook in self._hooks.items():
                handles.append(self._base.model.get_submodule(name).register_forward_hook(hook))
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _make_hooks(self) -> dict[str, _AddToSecondRow]:
        """Return the hook of every target module by its name."""
        basis, hooks = self._basis, {}
        for module, A, B, R in zip(basis.manifest.modules, basis.A, basis.B, self._adapter.R, strict=True):
            layer = self._base.model.get_submodule(module.name)
            assert isinstance(layer, nn.Linear)
            left = (B.double() @ R.double()).to(layer.weight)  # [d_out, r]
            hooks[module.name] = _AddToSecondRow(A.to(layer.weight), left)
        return hooks

    def _before_end(self, ids: list[int]) -> list[int]:
        ends = [index for index, token in enumerate(ids) if token in self._end_ids]
        return ids[: ends[0]] if ends else ids


class _AddToSecondRow:
    """A forward hook of a linear layer. A: [r, d_in]. left: B R, [d_out, r]."""

    def __init__(self, A: Tensor, left: Tensor) -> None:
        self._A, self._left = A, left

    def __call__(self, module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        half = output.shape[0] // 2  # some models flatten [2, L, d] to [2 L, d]
        change = F.linear(F.linear(args[0][half:], self._A), self._left)
        return torch.cat([output[:half], output[half:] + change])
