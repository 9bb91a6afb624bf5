"""Small random encoders in transformers' format, with a tokenizer that is made on the spot."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
from transformers import (
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    BertConfig,
    BertTokenizerFast,
    DistilBertConfig,
    ElectraConfig,
    ModernBertConfig,
    PreTrainedConfig,
    PreTrainedModel,
    RobertaConfig,
)

_SIZES = {
    "vocab_size": 99, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "max_position_embeddings": 64, "initializer_range": 0.3,
}  # fmt: skip
NAMES = ("bert", "distilbert", "electra", "modernbert", "roberta")


def make_config(name: str, **more: Any) -> PreTrainedConfig:
    sizes = {**_SIZES, **more}
    match name:
        case "bert":
            return BertConfig(**sizes)
        case "roberta":
            return RobertaConfig(**sizes)
        case "electra":
            return ElectraConfig(**sizes, embedding_size=24)
        case "modernbert":
            return ModernBertConfig(**sizes, pad_token_id=0, local_attention=8)
    return DistilBertConfig(
        vocab_size=sizes["vocab_size"], dim=32, hidden_dim=48, n_layers=2, n_heads=4,
        max_position_embeddings=64, initializer_range=0.3,
    )  # fmt: skip


def make_classifier(name: str, num_labels: int = 3, **more: Any) -> PreTrainedModel:
    """transformers' own class for sequence classification, with random weights, norms and biases."""
    torch.manual_seed(5)
    config = make_config(name, **more)
    config.num_labels = num_labels
    model = AutoModelForSequenceClassification.from_config(config).eval()
    for parameter in model.parameters():
        if parameter.ndim == 1:
            parameter.data += 0.2 * torch.randn_like(parameter)
    return model.requires_grad_(False)


def save_masked(name: str, folder: Path, **more: Any) -> None:
    """Save a checkpoint of a masked language model, which lacks poolers and heads."""
    torch.manual_seed(5)
    AutoModelForMaskedLM.from_config(make_config(name, **more)).save_pretrained(folder)


def make_tokenizer(texts: list[str], folder: Path) -> BertTokenizerFast:
    """Train a small tokenizer of BERT's kind on some texts, and save it."""
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    trainer = trainers.WordPieceTrainer(vocab_size=300, special_tokens=special, show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    cls, sep = (tokenizer.token_to_id(token) for token in ("[CLS]", "[SEP]"))
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", sep), ("[CLS]", cls))
    made = BertTokenizerFast(tokenizer_object=tokenizer, model_max_length=64)
    made.save_pretrained(folder)
    return made
