"""The sweep over architectures tells exact from refused, wrong and unbuildable."""

from __future__ import annotations

import pytest

from benchmarks.architectures.__main__ import cells, judge_apart
from benchmarks.architectures.exactness import Verdict, judge
from benchmarks.architectures.tiny_models import MAX_PARAMETERS, build, make_config, model_types


def test_an_architecture_is_served_exactly_by_either_path() -> None:
    llama, starcoder = judge("llama"), judge("starcoder2")
    assert (llama.outcome, llama.path, llama.model_class) == ("exact", "fused", "LlamaForCausalLM")
    assert (starcoder.outcome, starcoder.path) == ("exact", "generic")
    assert {"q_proj", "down_proj"} <= set(llama.targets)


def test_what_the_engine_refuses_has_its_reason() -> None:
    verdict = judge("mamba")
    assert verdict.outcome == "refused"
    assert verdict.reason.startswith("MambaForCausalLM cannot be served")


def test_what_cannot_be_built_here_is_told_from_what_is_refused() -> None:
    verdict = judge("llama", num_attention_heads=3)
    assert verdict.outcome == "not_built"
    assert verdict.reason


def test_a_model_of_full_size_is_not_built() -> None:
    with pytest.raises(ValueError, match="million parameters"):
        build(make_config("llama", vocab_size=MAX_PARAMETERS // 64))


def test_each_type_is_judged_in_a_process_of_its_own() -> None:
    first, second = judge_apart(["gpt2", "no-such-type"])
    assert (first.model_type, first.outcome) == ("gpt2", "exact")
    assert (second.model_type, second.outcome) == ("no-such-type", "not_built")


def test_a_row_of_the_table_is_one_line() -> None:
    verdict = Verdict("a", "refused", "AForCausalLM", reason="first line\n  second line")
    assert cells(verdict) == ("a", "AForCausalLM", "refused", "first line second line")


def test_the_sweep_knows_many_types() -> None:
    assert len(model_types()) > 100
