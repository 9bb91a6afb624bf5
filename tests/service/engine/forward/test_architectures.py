"""Architectures that run on the generic path, one tiny model of each kind, and a GPT-2 from file to answer.

The oracle is that of the sweep over all architectures (`benchmarks.architectures`): five requests in one
batch with chunked prefill, then again with a prefix cache, against merged weights without any cache.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.architectures.exactness import judge
from benchmarks.architectures.tiny_models import VOCAB_SIZE, build, make_config
from service.engine.engine import Engine
from service.engine.settings import EngineConfig
from tessera.chat.chat_format import EncodedExample
from tessera.formats.adapter import Adapter
from tessera.formats.adapter_ref import AdapterRef
from tessera.methods.bases import build_basis
from tessera.model.base_model import BaseModel, load_base_model
from tessera.peft.exporting import to_peft
from tests.service.engine.driver import Driver
from trainer_worker.data.training_data import TrainingData
from trainer_worker.training.plan import TrainingPlan
from trainer_worker.training.trainer import CoreRun, Trainer

#: A case: a type, fields of its configuration, and a target module that must carry adapters.
CASES: dict[str, tuple[str, dict[str, Any], str]] = {
    "keyword arguments end in the decoder layer": ("stablelm", {}, "q_proj"),
    "no gate in the MLP": ("nemotron", {}, "up_proj"),
    "attention sinks": ("gpt_oss", {}, "o_proj"),
    "transposed weights": ("gpt2", {}, "c_attn"),
    "a scale of each layer": ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "c_fc"),
    "rotated in the attention": ("gptj", {}, "fc_in"),
    "slopes from the mask": ("bloom", {}, "query_key_value"),
    "slopes from the end": ("mpt", {}, "Wqkv"),
    "a number of heads that is no power of two": ("bloom", {"n_head": 3, "hidden_size": 48}, "dense"),
    "one head of keys": ("falcon", {"new_decoder_architecture": False, "multi_query": True}, "dense"),
    "slopes and grouped heads": ("falcon", {"alibi": True}, "dense_4h_to_h"),
    "local layers": ("gpt_neo", {}, "out_proj"),
    "two softmaxes a layer": ("diffllama", {}, "q_proj"),
    "chunks of the context": ("llama4_text", {}, "q_proj"),
    "queries scaled by the place in the cache": (
        "llama4_text", {"floor_scale": 16, "attn_scale": 0.5, "no_rope_layers": [1, 0, 1, 0]}, "q_proj"
    ),
    "the same in every layer": (
        "llama4_text", {"floor_scale": 16, "attn_scale": 0.5, "no_rope_layers": [0] * 4}, "q_proj"
    ),
    "sinusoids": ("xglm", {}, "fc1"),
    "latent keys": ("deepseek_v3", {}, "kv_b_proj"),
}  # fmt: skip
ITSELF = EngineConfig(num_blocks=64, block_size=8, max_batch_seqs=8, max_batch_tokens=24)


@pytest.mark.parametrize("case", CASES)
def test_an_architecture_is_served_exactly(case: str) -> None:
    model_type, fields, target = CASES[case]
    verdict = judge(model_type, **fields)
    assert (verdict.outcome, verdict.reason) == ("exact", "")
    assert target in verdict.targets


def tiny_model(model_type: str, **fields: Any) -> BaseModel:
    return BaseModel(model_type, f"random-{model_type}", build(make_config(model_type, **fields)))


@pytest.mark.parametrize("model_type", ["gpt_neo", "mpt", "gptj"])
def test_the_longest_context_of_a_model_that_attends_itself(model_type: str) -> None:
    """Its tables of positions end with the context, which may not be a whole number of blocks."""
    base = tiny_model(model_type, **dict.fromkeys(("max_position_embeddings", "max_seq_len"), 45))
    driver = Driver(Engine(base, ITSELF))
    answer = driver.submit(list(range(3, 36)))
    driver.run()

    assert driver.engine.info().max_model_len == 45
    assert (answer.error_code, answer.finish_reason, len(answer.token_ids)) == (None, "length", 12)


def test_a_model_that_attends_itself_reads_no_block_of_others() -> None:
    base = tiny_model("bloom")
    prompts = [list(range(3, 3 + count)) for count in (4, 21, 37)]
    expected = []
    for prompt in prompts:
        driver = Driver(Engine(base, ITSELF))
        answer = driver.submit(prompt)
        driver.run()
        driver.engine.close()
        expected.append((answer.token_ids, [report.logprob for report in answer.logprobs]))
    driver = Driver(Engine(base, ITSELF))
    for layer in range(4):
        for page in driver.engine.kv.pages_of(layer):
            page[1:] = torch.nan  # left by earlier holders
    answers = [driver.submit(prompt) for prompt in prompts]
    driver.run()

    for answer, (tokens, logprobs) in zip(answers, expected, strict=True):
        assert answer.token_ids == tokens
        assert [report.logprob for report in answer.logprobs] == pytest.approx(logprobs, abs=1e-4)


#: PEFT 0.21 still reads a property that transformers 5.23 deprecates.
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
def test_a_gpt2_is_trained_served_and_exported(tmp_path: Path) -> None:
    """Its layers are `Conv1D` with transposed weights, from the files to the answer."""
    build(make_config("gpt2")).save_pretrained(tmp_path / "gpt2")
    base = load_base_model(tmp_path / "gpt2", device="cpu", dtype="float32")
    pristine = copy.deepcopy(base.model)
    basis = build_basis(base, rank=8)
    names = {module.name.split(".", 3)[3] for module in basis.manifest.modules}
    assert names == {"attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"}

    prompt, answer = list(range(10, 30)), [7, 191, 23, 5, 77, 100]
    ids = prompt + answer
    example = EncodedExample(ids, [index >= len(prompt) for index in range(len(ids))])
    plan = TrainingPlan(num_epochs=1, batch_size=1, total_steps=60, learning_rate=0.1, seed=1)
    run = CoreRun("a", TrainingData((example,), (), digest="a"), plan, basis)
    trainer = Trainer(base, basis, max_runs=1, token_budget=64)
    trainer.join(run)
    while not run.is_finished:
        trainer.step()
    trainer.leave("a")
    R = basis.fold(run.best_R.double()).float()
    adapter, ref = Adapter(basis.basis_id, R), AdapterRef("default", "a", 1, basis.basis_id)

    served = load_base_model(tmp_path / "gpt2", device="cpu", dtype="float32")
    engine = Engine(served, ITSELF)
    engine.add_basis(basis)
    driver = Driver(engine, {ref: adapter})
    adapted, plain = driver.submit(prompt, adapter=ref), driver.submit(prompt)
    driver.run()
    assert adapted.token_ids[: len(answer)] == answer
    assert plain.token_ids[: len(answer)] != answer

    peft = pytest.importorskip("peft")
    for name, content in to_peft(basis, adapter, base_model="gpt2").items():
        (tmp_path / name).write_bytes(content)
    plain = type(pristine).from_pretrained(tmp_path / "gpt2")
    with pytest.warns(UserWarning, match="fan_in_fan_out"):
        exported = peft.PeftModel.from_pretrained(plain, tmp_path)
    with torch.no_grad():
        logits = exported(torch.tensor([ids])).logits[0, len(prompt) - 1 : -1]
    assert logits.argmax(-1).tolist() == answer
    assert logits.shape[-1] == VOCAB_SIZE
