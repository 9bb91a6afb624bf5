"""The sweep over architectures tells exact from refused, wrong and unbuildable."""

from __future__ import annotations

import json

import pytest
import transformers

from benchmarks.architectures.__main__ import cells, judge_apart
from benchmarks.architectures.document import DOCUMENT, RESULTS, render
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


def test_the_page_says_what_the_last_whole_sweep_found() -> None:
    results = json.loads(RESULTS.read_text())
    assert DOCUMENT.read_text() == render(results)
    if results["transformers"] == transformers.__version__:
        assert [row["model_type"] for row in results["verdicts"]] == model_types()
    assert not {row["outcome"] for row in results["verdicts"]} & {"wrong", "crash"}


def test_the_page_names_paths_targets_and_reasons() -> None:
    exact = Verdict("gptj", "exact", "GPTJForCausalLM", "generic, over a cache", targets=("fc_in", "q_proj"))
    refused = Verdict("m", "refused", "M", reason="M cannot be served: it keeps\n  a | b")
    rows = [verdict.to_map() for verdict in (exact, refused)]
    page = render({"transformers": "5.0.0", "torch": "2.0", "verdicts": rows}).splitlines()
    assert "| `gptj` | GPTJForCausalLM | generic, over a cache | `fc_in` `q_proj` |" in page
    assert "| `m` | refused | it keeps a \\| b |" in page
    assert "| now | 1 | 1 | 0 | 0 | 0 |" in page


def test_the_sweep_knows_many_types() -> None:
    assert len(model_types()) > 100
