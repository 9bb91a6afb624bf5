"""PEFT's LoRA initialisations on the same data, steps, batches and rates, one run after another.

Nothing of ours is in the training but the batches, the loss and the schedule: PEFT's layers, torch's AdamW.
"""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.quality.data import DataSet, mean_token_loss
from benchmarks.quality.records import BuildRecord, RunRecord, shortened
from benchmarks.quality.settings import BuildMeter, Settings
from tessera.chat.chat_format import EncodedExample
from tessera.defaults import LLAMA_LINEARS
from tessera.methods.bases import CalibrationSet
from tessera.model.base_model import BaseModel, iter_target_modules
from trainer_worker.data.training_data import micro_batches
from trainer_worker.training.plan import TrainingPlan
from trainer_worker.training.trainer import token_losses

#: PEFT's names of initialisations; all with r = alpha.
PEERS = ("lora", "pissa", "olora", "eva", "corda", "lora_ga")
#: CorDA's preprocessing takes one example at a time: 256 of them would take longer than a run.
CORDA_EXAMPLES = 64


class PeerMissing(Exception):
    """This PEFT does not have that initialisation, or there is no PEFT."""


def train_peer(
    base: BaseModel,
    name: str,
    rank: int,
    data: DataSet,
    settings: Settings,
    *,
    seeds: Sequence[int],
    rates: Sequence[float],
) -> Iterator[BuildRecord | RunRecord]:
    """Builds once per seed (only LoRA's differ), trains once per rate. Raises `PeerMissing`."""
    case = f"peft:{name}"
    for seed in seeds:
        torch.manual_seed(seed)
        with BuildMeter() as meter, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = make_peer(base, name, rank, data.calibration.take(settings.calibration, seed=0))
        yield BuildRecord(data.name, case, rank, meter.seconds, meter.peak_bytes)
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        initial = [parameter.detach().clone() for parameter in trained]
        parameters = sum(parameter.numel() for parameter in trained)
        for rate in rates:
            with torch.no_grad():
                for parameter, value in zip(trained, initial, strict=True):
                    parameter.copy_(value)
            plan = settings.plan(data, rate=rate, seed=seed)
            losses = list(_train(model, trained, data, plan, settings))
            peer = BaseModel(base.name, base.model_id, model)
            loss = mean_token_loss(peer, data.data.valid, token_budget=settings.token_budget)
            valid = [[float(plan.total_steps), loss]]
            final = loss if math.isfinite(loss) and math.isfinite(losses[-1]) else None
            curve = shortened(losses)
            yield RunRecord(data.name, case, rank, seed, rate, final, parameters, curve, valid)


def _train(
    model: Any, trained: list[nn.Parameter], data: DataSet, plan: TrainingPlan, settings: Settings
) -> Iterator[float]:
    """The loss of each step; ends early if it is not finite."""
    optimizer = torch.optim.AdamW(trained, lr=plan.learning_rate, weight_decay=0.0)
    device = trained[0].device
    minimum = 0 if device.type == "cpu" else settings.token_budget
    for step in range(plan.total_steps):
        batch = data.data.batch(step, batch_size=plan.batch_size, seed=plan.seed)
        num_tokens = sum(example.num_loss_tokens for example in batch)
        total = torch.zeros((), device=device)
        with settings.training_precision(exact=False):
            for part in micro_batches(
                [(0, example) for example in batch], token_budget=settings.token_budget, min_tokens=minimum
            ):
                losses, _ = token_losses(model, part.to(device))
                loss = losses.sum() / num_tokens
                torch.autograd.backward(loss)
                total += loss.detach()
        nn.utils.clip_grad_norm_(trained, plan.max_grad_norm)
        for group in optimizer.param_groups:
            group["lr"] = plan.learning_rate_at(step)
        optimizer.step()
        optimizer.zero_grad()
        yield float(total)
        if not math.isfinite(float(total)):
            return


def make_peer(base: BaseModel, name: str, rank: int, calibration: CalibrationSet) -> Any:
    """A copy of the model with PEFT's LoRA layers, initialised. Raises `PeerMissing`."""
    try:
        import peft
    except ImportError as error:
        raise PeerMissing("PEFT is not installed: pip install peft") from error
    model = copy.deepcopy(base.model)
    names = [module for module, _ in iter_target_modules(model, LLAMA_LINEARS)]
    fields: dict[str, Any] = {"r": rank, "lora_alpha": rank, "target_modules": names, "lora_dropout": 0.0}
    try:
        makers = {"corda": _corda, "lora_ga": _lora_ga, "eva": _eva}
        if name in makers:
            wrapped = makers[name](peft, model, fields, calibration)
        else:
            fields["init_lora_weights"] = {"lora": True, "pissa": "pissa_niter_16"}.get(name, name)
            wrapped = peft.get_peft_model(model, peft.LoraConfig(**fields))
    except (ImportError, AttributeError, TypeError) as error:
        raise PeerMissing(f"PEFT {peft.__version__} has no {name}: {error}") from error
    return wrapped.get_base_model()


def _corda(peft: Any, model: Any, fields: dict[str, Any], calibration: CalibrationSet) -> Any:
    from peft.tuners.lora.config import CordaConfig
    from peft.tuners.lora.corda import preprocess_corda

    corda = CordaConfig(corda_method="ipm")
    config = peft.LoraConfig(**fields, init_lora_weights="corda", corda_config=corda)
    part = calibration.take(CORDA_EXAMPLES, seed=0)

    def run_model() -> None:
        for token_ids, _ in part.examples:
            model(input_ids=torch.tensor([token_ids], device=model.device), use_cache=False)

    preprocess_corda(model, config, run_model=run_model)
    return peft.get_peft_model(model, config)


def _lora_ga(peft: Any, model: Any, fields: dict[str, Any], calibration: CalibrationSet) -> Any:
    from peft.tuners.lora.config import LoraGAConfig
    from peft.tuners.lora.loraga import preprocess_loraga

    config = peft.LoraConfig(**fields, init_lora_weights="lora_ga", lora_ga_config=LoraGAConfig())
    items = [(0, example) for example in _encoded(calibration)]

    def train_step() -> None:
        for part in micro_batches(items, token_budget=4096, min_tokens=4096):
            losses, _ = token_losses(model, part.to(model.device))
            torch.autograd.backward(losses.mean())

    preprocess_loraga(model, config, train_step)
    return peft.get_peft_model(model, config)


def _eva(peft: Any, model: Any, fields: dict[str, Any], calibration: CalibrationSet) -> Any:
    from peft import EvaConfig, initialize_lora_eva_weights

    config = peft.LoraConfig(**fields, init_lora_weights="eva", eva_config=EvaConfig())
    wrapped = peft.get_peft_model(model, config, low_cpu_mem_usage=True)
    initialize_lora_eva_weights(wrapped, dataloader=_eva_batches(calibration), show_progress_bar=False)
    return wrapped


def _eva_batches(calibration: CalibrationSet) -> list[dict[str, Tensor]]:
    """Batches as a data loader would give them; -100 marks what is not learned."""
    batches = []
    for batch in calibration.batches():
        labels = batch.token_ids.masked_fill(~batch.labels, -100)
        batches.append({"input_ids": batch.token_ids, "attention_mask": batch.valid.long(), "labels": labels})
    return batches


def _encoded(calibration: CalibrationSet) -> list[EncodedExample]:
    return [EncodedExample(list(ids), [False, *mask[1:]]) for ids, mask in calibration.examples]
