"""Encoders in the engine: heads of several users in one batch, equal to transformers' own class, merged."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from service.engine.engine import Engine
from service.engine.settings import EngineConfig
from service.engine.wire.messages import NO_HEAD, NOT_GENERATIVE, GenerationRequest, SamplingParams
from tessera.errors import InvalidInput, UnsupportedModel
from tessera.formats.adapter import Adapter
from tessera.formats.adapter_ref import AdapterRef
from tessera.formats.basis import Basis
from tessera.formats.head import ClassificationHead
from tessera.methods.bases import build_basis
from tessera.model.base_model import BaseModel, load_base_model
from tessera.model.encoders import ENCODERS
from tests.encoders import NAMES, make_classifier
from tests.service.engine.driver import Answer, Driver

READ = SamplingParams(max_tokens=0, temperature=0.0)
LABELS = (("no", "yes"), ("a", "b", "c", "d", "e"), ())


class World:
    """An engine over an encoder with an adapter for each head, and the model as transformers loads it."""

    def __init__(self, name: str, folder: Path, **config: Any) -> None:
        self.name = name
        self.own = make_classifier(name)
        self.own.save_pretrained(folder)
        self.base = load_base_model(folder, dtype="float32", device="cpu")
        self.basis = build_basis(self.base, rank=4)
        other = build_basis(self.base, rank=3)
        generator = torch.Generator().manual_seed(3)
        self.adapters: dict[AdapterRef, Adapter] = {}
        for index, labels in enumerate(LABELS):
            basis = other if index == 2 else self.basis
            R = torch.randn(basis.num_modules, basis.rank, basis.rank, generator=generator)
            head = ClassificationHead(torch.randn(len(labels) or 1, 33, generator=generator), labels)
            ref = AdapterRef("default", f"a{index}", 1, basis.basis_id)
            self.adapters[ref] = Adapter(basis.basis_id, R, {}, head)
        self.bases = {basis.basis_id: basis for basis in (self.basis, other)}
        settings = {"num_slots": 4, "max_batch_tokens": 64, "max_batch_seqs": 16, **config}
        self.engine = Engine(self.base, EngineConfig(**settings))
        self.engine.add_basis(self.basis)
        self.driver = Driver(self.engine, self.adapters, {other.basis_id: other})

    def merged(self, ref: AdapterRef) -> PreTrainedModel:
        """transformers' own class with merged weights and the adapter's head."""
        model, adapter = copy.deepcopy(self.own), self.adapters[ref]
        basis: Basis = self.bases[ref.basis_id]
        for index, module in enumerate(basis.manifest.modules):
            weight = model.get_submodule(module.name).weight
            weight += basis.B[index].float() @ adapter.R[index] @ basis.A[index].float()
        head, linear = adapter.head, torch.nn.Linear(32, 1)
        assert head is not None
        linear.weight.data, linear.bias.data = head.weight[:, :-1], head.weight[:, -1]
        parent, _, child = ENCODERS[self.name].head.rpartition(".")
        setattr(model.get_submodule(parent), child, linear)
        return model

    def classify(self, text: list[int], ref: AdapterRef, *, first_length: int = 0) -> Answer:
        request_id = f"c{len(self.driver.answers)}"
        request = GenerationRequest(
            request_id, "default", text, READ, ref, classifies=True, first_length=first_length
        )
        self.engine.submit(request)
        self.driver.answers[request_id] = Answer()
        return self.driver.answers[request_id]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., World]]:
    engines: list[Engine] = []

    def make(name: str = "bert", **config: Any) -> World:
        world = World(name, tmp_path / f"{name}{len(engines)}", **config)
        engines.append(world.engine)
        return world

    yield make
    for engine in engines:
        engine.close()


def texts(*lengths: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(8)
    return [torch.randint(5, 99, (length,), generator=generator).tolist() for length in lengths]


@pytest.mark.parametrize("max_batch_tokens", [24, 200])
@pytest.mark.parametrize("name", NAMES)
def test_heads_of_several_users_in_one_batch(
    start: Callable[..., World], name: str, max_batch_tokens: int
) -> None:
    """In the small batches, long texts are planned in pieces and computed as a whole."""
    world = start(name, max_batch_tokens=max_batch_tokens)
    cases = [(text, ref) for text in texts(1, 23, 9, 22, 10) for ref in world.adapters]
    answers = [world.classify(text, ref) for text, ref in cases]
    world.driver.run()
    for answer, (text, ref) in zip(answers, cases, strict=True):
        found = answer.last.classification
        assert found is not None
        assert found.labels == list(world.adapters[ref].head.labels)  # type: ignore[union-attr]
        ids, model = torch.tensor([text]), world.merged(ref)
        expected = model(ids, attention_mask=torch.ones_like(ids)).logits[0].tolist()
        assert found.scores == pytest.approx(expected, abs=1e-4)
    assert max(answer.last.num_distinct for answer in answers) == 3


def test_a_pair_has_token_types(start: Callable[..., World]) -> None:
    world = start("bert")
    [text], ref = texts(12), next(iter(world.adapters))
    pair, single = world.classify(text, ref, first_length=5), world.classify(text, ref)
    world.driver.run()
    ids = torch.tensor([text])
    for answer, types in ((pair, [0] * 5 + [1] * 7), (single, [0] * 12)):
        expected = world.merged(ref)(ids, token_type_ids=torch.tensor([types])).logits[0].tolist()
        assert answer.last.classification is not None
        assert answer.last.classification.scores == pytest.approx(expected, abs=1e-4)


def test_an_encoder_generates_nothing(start: Callable[..., World]) -> None:
    world = start()
    [text] = texts(5)
    for ref in (None, *world.adapters):
        with pytest.raises(InvalidInput, match="encoder") as refusal:
            world.driver.submit(text, adapter=ref)
        assert (refusal.value.code, refusal.value.param) == (NOT_GENERATIVE, "model")
    with pytest.raises(InvalidInput) as refusal:
        world.driver.submit(text, READ, None, classifies=True)
    assert refusal.value.code == NO_HEAD


def test_the_limits_and_the_books(start: Callable[..., World]) -> None:
    world = start(max_batch_tokens=40)
    info = world.engine.info()
    assert (info.max_model_len, info.vocab_size) == (40, 99)
    assert info.forward_mode.startswith("encoder")
    ref = next(iter(world.adapters))
    with pytest.raises(InvalidInput, match="40"):
        world.classify(texts(41)[0], ref)
    whole = world.classify(texts(40)[0], ref)
    world.driver.run()
    assert whole.last.classification is not None
    stats = world.engine.stats()
    assert (stats.memory_bytes["kv"], stats.kv_blocks_used) == (0, 0)
    assert stats.prompt_tokens_total == 40


def test_extreme_values_fail_their_request_alone(start: Callable[..., World]) -> None:
    world = start()
    bad, good, _ = world.adapters
    broken = world.adapters[bad]
    world.driver.adapters[bad] = Adapter(broken.basis_id, broken.R * 1e38, {}, broken.head)
    [text] = texts(9)
    answers = [world.classify(text, ref) for ref in (bad, good)]
    world.driver.run()
    assert [answer.error_code for answer in answers] == ["non_finite_logits", None]


def test_a_model_that_mixes_the_texts_of_a_pass_is_refused(start: Callable[..., World]) -> None:
    """An encoder whose states depend on the length of the pass, as one without a mask would."""
    world = start()

    class Mixed(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + x.mean(0)

    base = BaseModel("mixed", "mixed", copy.deepcopy(world.own))
    base.model.classifier = Mixed()
    engine = Engine(base, EngineConfig(num_slots=1, max_batch_tokens=64))
    with pytest.raises(UnsupportedModel, match="another state"):
        engine.runner.warm_up()
