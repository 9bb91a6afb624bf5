"""What do adapters cost while decoding? Tokens per second of whole requests with 0, 1 and N adapters.

    python -m benchmarks.decode.requests [--model DIR] [--batch 32] [--new-tokens 32] [--rank 16]

Peers on the same model, prompts and machine: transformers' padded `generate` (the base model alone), and
the mixed batches of PEFT (`adapter_names`), the same adapters as LoRA. Ratios are within this run.
"""

from __future__ import annotations

import argparse
import copy
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.report import measure, percentiles, print_table, save
from service.engine.engine import Engine
from service.engine.settings import EngineConfig
from service.engine.wire.messages import GenerationRequest, SamplingParams
from tessera.defaults import BUNDLED_MODEL
from tessera.formats.adapter import Adapter
from tessera.formats.adapter_ref import AdapterRef
from tessera.formats.basis import Basis
from tessera.methods.bases import build_basis
from tessera.model.base_model import BaseModel, load_base_model

PROMPT_TOKENS = 64
#: Adapters of a size that training gives: the outputs differ, the model does not break.
R_SCALE = 0.05


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default=str(BUNDLED_MODEL))
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--without-peers", action="store_true")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    base = load_base_model(arguments.model)
    basis = build_basis(base, rank=arguments.rank)
    rows = engine_rows(base, basis, arguments)
    if not arguments.without_peers:
        rows += peer_rows(base, basis, arguments)
    bare = rows[0]["tokens_per_s"]
    for row in rows:
        row["ratio_to_bare"] = round(row["tokens_per_s"] / bare, 3)
    print_table(rows)
    save(arguments.json, question=__doc__.splitlines()[0], arguments=vars(arguments), rows=rows)


def engine_rows(base: BaseModel, basis: Basis, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Our engine: bare, then 1 and N different adapters over the same batch."""
    model = copy.deepcopy(base.model)
    config = EngineConfig(num_slots=arguments.batch, enable_prefix_cache=False, max_batch_tokens=2048)
    engine = Engine(BaseModel(base.name, base.model_id, model), config)
    engine.add_basis(basis)
    prompts = make_prompts(engine.info().vocab_size, arguments.batch)
    refs = []
    for index in range(arguments.batch):
        ref = AdapterRef("bench", f"user-{index}", 1, basis.basis_id)
        engine.provide_adapter(ref, make_adapter(basis, index))
        refs.append(ref)
    rows = []
    for distinct in (0, 1, arguments.batch):
        chosen = [refs[i % distinct] if distinct else None for i in range(arguments.batch)]
        run = engine_run(engine, prompts, chosen, arguments.new_tokens)
        rows.append(make_row(f"engine, {distinct} adapters", run, arguments))
    return rows


def engine_run(
    engine: Engine, prompts: list[list[int]], refs: list[AdapterRef | None], new_tokens: int
) -> Callable[[], None]:
    sampling = SamplingParams(max_tokens=new_tokens, temperature=0.0)

    def run() -> None:
        for index, (prompt, ref) in enumerate(zip(prompts, refs, strict=True)):
            engine.submit(GenerationRequest(str(index), "bench", prompt, sampling, ref))
        while engine.has_work:
            for output in engine.step():
                assert output.error is None, output.error

    return run


def peer_rows(base: BaseModel, basis: Basis, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """transformers' padded generate, and PEFT with one LoRA per row."""
    vocab_size = base.model.config.get_text_config().vocab_size
    input_ids = torch.tensor(make_prompts(vocab_size, arguments.batch), device=base.device)
    limits = {
        "min_new_tokens": arguments.new_tokens,
        "max_new_tokens": arguments.new_tokens,
        "do_sample": False,
        "attention_mask": torch.ones_like(input_ids),
    }

    def generate() -> None:
        base.model.generate(input_ids, **limits)

    rows = [make_row("transformers generate, base model alone", generate, arguments)]
    mixed = load_with_peft(base, basis, arguments.batch)
    names = [f"user-{index}" for index in range(arguments.batch)]

    def generate_mixed() -> None:
        mixed.generate(input_ids=input_ids, adapter_names=names, **limits)

    rows.append(make_row(f"PEFT adapter_names, {arguments.batch} adapters", generate_mixed, arguments))
    return rows


def load_with_peft(base: BaseModel, basis: Basis, num_adapters: int) -> Any:
    """A PEFT model with every adapter as a LoRA of the same rank: lora_A = A, lora_B = B R."""
    import peft

    names = [module.name for module in basis.manifest.modules]
    config = peft.LoraConfig(r=basis.rank, lora_alpha=basis.rank, target_modules=names)
    model = peft.get_peft_model(copy.deepcopy(base.model), config, adapter_name="user-0")
    for index in range(1, num_adapters):
        model.add_adapter(f"user-{index}", config)
    for index in range(num_adapters):
        R = make_adapter(basis, index).R
        for i, module in enumerate(basis.manifest.modules):
            layer = model.get_submodule(f"base_model.model.{module.name}")
            layer.lora_A[f"user-{index}"].weight.data.copy_(basis.A[i])
            layer.lora_B[f"user-{index}"].weight.data.copy_(basis.B[i].float() @ R[i])
    return model.eval()


def make_row(name: str, run: Callable[[], object], arguments: argparse.Namespace) -> dict[str, Any]:
    times = measure(run, repeats=arguments.repeats)
    tokens = arguments.batch * arguments.new_tokens
    return {"what": name, "tokens_per_s": round(tokens / statistics.median(times), 1), **percentiles(times)}


def make_prompts(vocab_size: int, batch: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(0)
    shape = (batch, PROMPT_TOKENS)
    prompts: list[list[int]] = torch.randint(10, vocab_size, shape, generator=generator).tolist()
    return prompts


def make_adapter(basis: Basis, index: int) -> Adapter:
    generator = torch.Generator().manual_seed(index)
    shape = (basis.num_modules, basis.rank, basis.rank)
    return Adapter(basis.basis_id, R_SCALE * torch.randn(shape, generator=generator))


if __name__ == "__main__":
    main()
