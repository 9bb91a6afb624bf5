"""Encoders as base models: the pooled state of transformers' own classes, and what a checkpoint may lack."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from tessera.chat.chat_format import ChatFormat, load_chat_format
from tessera.errors import UnsupportedModel
from tessera.methods.bases import build_basis
from tessera.model.base_model import linear_layers, load_base_model
from tessera.model.encoders import ENCODERS, find_encoder
from tessera.model.layout import linear_shapes
from tessera.model.pooling import hidden_width, pooled_states
from tests.encoders import NAMES, make_classifier, make_tokenizer, save_masked


@pytest.mark.parametrize("name", NAMES)
def test_the_head_reads_what_transformers_own_class_reads(name: str, tmp_path: Path) -> None:
    """Texts of different lengths share a pass, one of them a pair; alone, transformers computes the same."""
    own = make_classifier(name)
    own.save_pretrained(tmp_path)
    base = load_base_model(tmp_path, dtype="float32", device="cpu")
    assert base.encoder is ENCODERS[name]
    assert hidden_width(base.model) == 32
    generator = torch.Generator().manual_seed(1)
    texts = [torch.randint(5, 99, (1, length), generator=generator) for length in (5, 13, 9)]
    token_ids = torch.cat([torch.nn.functional.pad(text, (0, 13 - text.shape[1])) for text in texts])
    firsts = torch.tensor([0, 6, 0])
    pooled = pooled_states(base.model, token_ids, torch.tensor([5, 13, 9]), firsts)
    head = own.get_submodule(ENCODERS[name].head)
    for text, first, state in zip(texts, firsts.tolist(), pooled, strict=True):
        more = {}
        if first and name in ("bert", "electra"):
            more["token_type_ids"] = (torch.arange(text.shape[1]) >= first).long()[None]
        expected = own(text, attention_mask=torch.ones_like(text), **more).logits[0]
        torch.testing.assert_close(head(state), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_adapters_go_into_the_layers_and_not_into_the_head(name: str, tmp_path: Path) -> None:
    make_classifier(name).save_pretrained(tmp_path)
    base = load_base_model(tmp_path, dtype="float32", device="cpu")
    layers = list(linear_layers(base.model))
    assert not any(set(layer.split(".")) & set(ENCODERS[name].outside) for layer in layers)
    assert list(linear_shapes(tmp_path)) == layers
    in_layers = [layer for layer in layers if any(part.isdecimal() for part in layer.split("."))]
    modules = build_basis(base, rank=4).manifest.modules
    assert [module.name for module in modules] == in_layers


def test_the_layers_of_lora_xs_on_roberta(tmp_path: Path) -> None:
    """LoRA-XS (arXiv 2405.17604) adapts query, value, attention output and the second FFN layer."""
    save_masked("roberta", tmp_path)
    base = load_base_model(tmp_path, dtype="float32", device="cpu")
    basis = build_basis(base, rank=4, target_modules=("query", "value", "*.output.dense"))
    kinds = [".".join(module.name.split(".")[4:]) for module in basis.manifest.modules][:4]
    assert kinds == ["attention.self.query", "attention.self.value", "attention.output.dense", "output.dense"]


@pytest.mark.parametrize("name", NAMES)
def test_a_pooler_that_the_checkpoint_lacks_is_the_identity(name: str, tmp_path: Path) -> None:
    save_masked(name, tmp_path)
    states = []
    for _ in range(2):
        base = load_base_model(tmp_path, dtype="float32", device="cpu")
        ids = torch.arange(5, 14)[None]
        states.append(pooled_states(base.model, ids, torch.tensor([9])))
    assert torch.equal(*states), "no random numbers"
    if name != "modernbert":  # whose masked language model has the same layer
        dense = base.model.get_submodule(ENCODERS[name].pooler[0])
        assert torch.equal(dense.weight, torch.eye(32))
        assert not dense.bias.any()


def test_an_encoder_that_lacks_other_weights_is_refused(tmp_path: Path) -> None:
    save_masked("bert", tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 3}))
    with pytest.raises(UnsupportedModel, match="not in its files"):
        load_base_model(tmp_path, dtype="float32", device="cpu")


def test_positions_of_roberta_begin_after_the_padding(tmp_path: Path) -> None:
    save_masked("roberta", tmp_path)
    base = load_base_model(tmp_path, dtype="float32", device="cpu")
    assert base.max_position == 62
    ids = torch.full((1, 62), 7)
    assert pooled_states(base.model, ids, torch.tensor([62])).isfinite().all()


def test_a_decoder_is_no_encoder(tmp_path: Path) -> None:
    assert find_encoder(tmp_path) is None
    for config in ({"model_type": "llama"}, {"model_type": "bert", "is_decoder": True}, [], {}):
        (tmp_path / "config.json").write_text(json.dumps(config))
        assert find_encoder(tmp_path) is None


@pytest.fixture
def chat(tmp_path: Path) -> ChatFormat:
    save_masked("bert", tmp_path, vocab_size=300)
    make_tokenizer(["the cup is red", "there is a red cup", "one two three four five six"] * 3, tmp_path)
    return load_chat_format(tmp_path)


def test_texts_get_the_special_tokens_of_the_tokenizer(chat: ChatFormat) -> None:
    assert chat.is_encoder
    tokenizer = chat.tokenizer
    one = chat.labelled_ids("the cup is red")
    assert one.token_ids == tokenizer("the cup is red")["input_ids"]
    assert (one.first_length, one.is_truncated) == (0, False)
    two = chat.labelled_ids("the cup", "is red")
    expected = tokenizer("the cup", "is red")
    assert two.token_ids == expected["input_ids"]
    types = [int(index >= two.first_length) for index in range(len(two.token_ids))]
    assert types == expected["token_type_ids"]


def test_long_texts_keep_their_special_tokens(chat: ChatFormat) -> None:
    long = chat.labelled_ids("one two three four five six", max_tokens=5)
    assert long.is_truncated
    assert len(long.token_ids) == 5
    assert long.token_ids[-1] == chat.tokenizer.sep_token_id
    pair = chat.labelled_ids("one two three four five six", "red", max_tokens=7)
    assert pair.is_truncated
    assert pair.token_ids.count(chat.tokenizer.sep_token_id) == 2
    assert not chat.labelled_ids("one two", "red", max_tokens=64).is_truncated


def test_nobody_forges_a_border(chat: ChatFormat) -> None:
    ids = chat.labelled_ids("the cup [SEP] is red").token_ids
    assert ids.count(chat.tokenizer.sep_token_id) == 1
