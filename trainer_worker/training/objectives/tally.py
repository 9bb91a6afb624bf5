"""The losses of one step or one evaluation of many runs, gathered pass by pass, whatever their objectives.

The result of a run does not depend, except for rounding, on the runs beside it: every sum is over one run's
own rows. Knows no model; the trainers do.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from tessera.chat.chat_format import EncodedExample
from trainer_worker.data.training_data import MicroBatch, micro_batches
from trainer_worker.training.objectives.objective import Measured, Objective, Sample


class Tally:
    """The samples of several slots, and what the passes so far have measured of them."""

    def __init__(
        self,
        samples: Mapping[int, Sequence[Sample]],
        objectives: Mapping[int, Objective],
        *,
        num_slots: int,
        device: torch.device,
    ) -> None:
        """samples, objectives: by slot. num_slots: K."""
        self._objectives, self._device = objectives, device
        #: The rows of all samples with their slots, and how many successive ones stay in one pass.
        self._items: list[tuple[int, EncodedExample]] = []
        self._sizes: list[int] = []
        sizes = torch.zeros(num_slots)  # what each slot's losses are divided by: its tokens, or its pairs
        for slot, mine in samples.items():
            rows = [(slot, row) for sample in mine for row in sample.rows]
            self._items += rows
            if objectives[slot].is_preference:
                self._sizes += [len(sample.rows) for sample in mine]
                sizes[slot] = len(mine)
            else:
                self._sizes += [1] * len(rows)
                sizes[slot] = sum(row.num_loss_tokens for _, row in rows)
        self._slot_sizes = sizes.to(device).clamp_min(1)
        self._sums = torch.zeros(2, num_slots, dtype=torch.float64, device=device)  # loss, accuracy
        self._num_exact = torch.zeros(num_slots, dtype=torch.float64, device=device)  # rows
        self._num_rows = Counter(slot for slot, _ in self._items)
        is_paired = any(objectives[slot].is_preference for slot in samples)
        self._pairs = _Pairs(samples, objectives, self._slot_sizes, device) if is_paired else None

    def passes(self, *, token_budget: int, min_tokens: int) -> Iterator[MicroBatch]:
        """Yield the micro-batches that hold every row once, on the device. Each goes to `add`."""
        for batch in micro_batches(
            self._items, sizes=self._sizes, token_budget=token_budget, min_tokens=min_tokens
        ):
            yield batch.to(self._device)

    def add(self, batch: MicroBatch, losses: Tensor, is_correct: Tensor) -> Tensor:
        """Take the measurements of a micro-batch and return the derivative of the slots' losses by `losses`.

        losses: -log p of each token to learn, [N]. is_correct: whether it was the most likely token, [N].
        """
        weights = torch.ones_like(losses) / self._slot_sizes[batch.owners]
        measured = torch.stack([losses.detach(), is_correct]).double()
        if self._pairs is not None:
            weights, measured = self._pairs.add(batch, weights, measured)
        self._sums.index_add_(1, batch.owners, measured)
        row = batch.positions // batch.token_ids.shape[1]  # [N]
        is_exact = torch.ones_like(batch.rows, dtype=torch.float64)
        is_exact.scatter_reduce_(0, row, is_correct.double(), "amin")
        self._num_exact.index_add_(0, batch.rows, is_exact)
        return weights

    def measured(self) -> dict[int, Measured]:
        """Return the means of every slot that has samples, after all passes."""
        loss, accuracy = (self._sums / self._slot_sizes).tolist()
        exact = [num / max(1, self._num_rows[slot]) for slot, num in enumerate(self._num_exact.tolist())]
        found = {slot: Measured(loss[slot], accuracy[slot], exact[slot]) for slot in self._objectives}
        return found if self._pairs is None else found | self._pairs.measured()

    def logps(self) -> dict[int, Tensor]:
        """Return the log-probabilities of the answers of every slot with pairs: [pairs, 2], on the CPU."""
        return {} if self._pairs is None else self._pairs.logps_by_slot()


class _Pairs:
    """The pairs of all slots with a preference objective: P in all."""

    def __init__(
        self,
        samples: Mapping[int, Sequence[Sample]],
        objectives: Mapping[int, Objective],
        slot_sizes: Tensor,
        device: torch.device,
    ) -> None:
        self._device = device
        self._slots: list[int] = []  # the slot of each pair
        self._groups: dict[Objective, list[int]] = {}
        places: list[tuple[int, int]] = []  # of each row: its pair and its side, -1 if it belongs to no pair
        lengths, reference = [], []
        for slot, mine in samples.items():
            for sample in mine:
                if not objectives[slot].is_preference:
                    places += [(-1, 0)] * len(sample.rows)
                    continue
                pair, first = len(self._slots), sample.num_chosen
                self._slots.append(slot)
                self._groups.setdefault(objectives[slot], []).append(pair)
                places += [(pair, int(row >= first)) for row in range(len(sample.rows))]
                counts = [row.num_loss_tokens for row in sample.rows]
                lengths.append((sum(counts[:first]), sum(counts[first:])))
                reference.append(sample.reference)
        self._places = torch.tensor(places, dtype=torch.int64).view(-1, 2)  # [rows, 2]
        self._lengths = _columns(lengths, device)
        self._reference = _columns(reference, device)
        slots_of_pairs = torch.tensor(self._slots, dtype=torch.int64, device=device)
        self._num_pairs = slot_sizes.double()[slots_of_pairs]  # of each pair's slot
        self._logps = torch.zeros_like(self._lengths)
        self._slopes = torch.zeros_like(self._lengths)
        self._found: dict[str, Tensor] = {}

    def add(self, batch: MicroBatch, weights: Tensor, measured: Tensor) -> tuple[Tensor, Tensor]:
        """Judge the pairs of a micro-batch; returns weights and measurements with those of their tokens."""
        places = self._places[batch.items]
        pairs = {pair for pair in places[:, 0].tolist() if pair >= 0}
        if not pairs:
            return weights, measured
        pair, side = places.to(self._device).T  # [S]
        row = batch.positions // batch.token_ids.shape[1]  # [N]
        is_paired = pair[row] >= 0
        pair, side = pair[row].clamp_min(0), side[row]
        logps = torch.where(is_paired, -measured[0], 0.0)
        self._logps.view(-1).index_add_(0, side * self._logps.shape[1] + pair, logps)
        self._judge(pairs)
        weights = torch.where(is_paired, -self._slopes[side, pair].to(weights), weights)
        return weights, torch.where(is_paired, 0.0, measured)

    def _judge(self, pairs: set[int]) -> None:
        """Judge pairs whose rows have all been measured."""
        for objective, mine in self._groups.items():
            chosen = torch.tensor([pair for pair in mine if pair in pairs], device=self._device)
            if not len(chosen):
                continue
            judged = objective.judge(
                self._logps[:, chosen], self._reference[:, chosen], self._lengths[:, chosen]
            )
            self._slopes[:, chosen] = judged.slope / self._num_pairs[chosen]
            values = {"loss": judged.loss, "accuracy": judged.is_correct, **judged.details}
            for name, value in values.items():
                self._found.setdefault(name, torch.zeros_like(self._num_pairs))[chosen] = value

    def measured(self) -> dict[int, Measured]:
        values = {name: self._means(found) for name, found in self._found.items()}
        return {
            slot: Measured(
                values["loss"][slot],
                values["accuracy"][slot],
                details={
                    name: means[slot] for name, means in values.items() if name not in ("loss", "accuracy")
                },
            )
            for slot in dict.fromkeys(self._slots)
        }

    def logps_by_slot(self) -> dict[int, Tensor]:
        logps, slots = self._logps.T.cpu(), torch.tensor(self._slots, dtype=torch.int64)
        return {slot: logps[slots == slot] for slot in dict.fromkeys(self._slots)}

    def _means(self, values: Tensor) -> dict[int, float]:
        """Return the mean over the pairs of each slot."""
        listed, means = values.tolist(), dict.fromkeys(self._slots, 0.0)
        counts = dict.fromkeys(self._slots, 0)
        for slot, value in zip(self._slots, listed, strict=True):
            means[slot] += value
            counts[slot] += 1
        return {slot: total / counts[slot] for slot, total in means.items()}


def _columns(rows: Sequence[tuple[float, float]], device: torch.device) -> Tensor:
    """[2, len(rows)]."""
    return torch.tensor(rows, dtype=torch.float64, device=device).view(-1, 2).T.contiguous()
