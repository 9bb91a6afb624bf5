"""Mixed batches of classification heads, equal to transformers' own class, merged and alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForSequenceClassification

from service.engine.wire.messages import NO_HEAD, NOT_GENERATIVE, SamplingParams
from tessera.errors import InvalidInput
from tessera.formats.adapter_ref import AdapterRef
from tessera.formats.head import ClassificationHead
from tests.service.engine.driver import Answer, Driver
from tests.service.engine.models import Served, family

Start = Callable[..., Driver]
TOLERANCE = 1e-4
READ = SamplingParams(max_tokens=0, temperature=0.0)
#: Labels of the heads: a binary task, one of five classes, a regression.
LABELS = (("no", "yes"), ("a", "b", "c", "d", "e"), ())

both_paths = pytest.mark.parametrize("enable_fused", [True, False], ids=["fused", "generic"])


def with_heads(served: Served, driver: Driver) -> list[AdapterRef]:
    """Give three adapters, one of them of the second basis, a head each."""
    generator = torch.Generator().manual_seed(5)
    width = served.base.model.config.hidden_size
    refs = [served.refs[0], served.refs[1], served.other_refs[0]]
    for ref, labels in zip(refs, LABELS, strict=True):
        weight = torch.randn(len(labels) or 1, width + 1, generator=generator)
        driver.adapters[ref] = replace(served.adapters[ref], head=ClassificationHead(weight, labels))
    return refs


def oracle(served: Served, head: ClassificationHead, ref: AdapterRef, prompt: list[int]) -> list[float]:
    """transformers' own class for sequence classification over the merged weights."""
    merged = served.merged(ref)
    config = type(merged.config)(**{**merged.config.to_dict(), "num_labels": len(head.weight)})
    model = AutoModelForSequenceClassification.from_config(config).eval()
    body = getattr(model, model.base_model_prefix)
    body.load_state_dict(merged.base_model.state_dict())
    with torch.inference_mode():
        model.score.weight.copy_(head.weight[:, :-1])
        scores: list[float] = (model(torch.tensor([prompt])).logits[0] + head.weight[:, -1]).tolist()
    return scores


def classify(driver: Driver, prompt: list[int], ref: AdapterRef) -> Answer:
    return driver.submit(prompt, READ, ref, classifies=True)


@pytest.fixture(params=["llama", "qwen2", "gemma2"])
def decoder(request: pytest.FixtureRequest) -> Served:
    return family(request.param)


@both_paths
@pytest.mark.parametrize("max_batch_tokens", [7, 256])
def test_heads_of_several_users_in_one_batch(
    decoder: Served, start: Start, enable_fused: bool, max_batch_tokens: int
) -> None:
    """Beside them, others generate and score; prompts are cut into chunks in the small batches."""
    driver = start(decoder, enable_fused=enable_fused, max_batch_tokens=max_batch_tokens)
    refs = with_heads(decoder, driver)
    prompts = decoder.prompts(1, 23, 17, 9)
    answers = {(ref, i): classify(driver, p, ref) for i, p in enumerate(prompts) for ref in refs}
    generating = driver.submit(prompts[2], adapter=decoder.refs[2])
    scored = driver.submit(prompts[1], replace(READ, prompt_logprobs=0))
    driver.run()

    for (ref, index), answer in answers.items():
        adapter = driver.adapters[ref]
        assert adapter.head is not None  # type: ignore[union-attr]
        found = answer.last.classification
        assert found is not None
        assert found.labels == list(adapter.head.labels)  # type: ignore[union-attr]
        expected = oracle(decoder, adapter.head, ref, prompts[index])  # type: ignore[union-attr]
        assert found.scores == pytest.approx(expected, abs=TOLERANCE)
        assert (answer.finish_reason, answer.token_ids) == ("length", [])
    assert generating.token_ids == decoder.oracle(decoder.refs[2], prompts[2], 12)[0]
    assert scored.last.prompt_logprobs is not None
    assert len(scored.last.prompt_logprobs) == len(prompts[1]) - 1


def test_a_model_that_computes_attention_itself(start: Start) -> None:
    from benchmarks.architectures.tiny_models import build, make_config
    from tessera.model.base_model import BaseModel
    from tests.service.engine.models import make_served, randomise_vectors

    torch.manual_seed(3)
    model = build(make_config("gptj", vocab_size=97, num_hidden_layers=2)).float().eval()
    randomise_vectors(model)
    model.requires_grad_(False)
    served = make_served(BaseModel("gptj", "random-gptj", model))
    driver = start(served)
    assert driver.engine.runner.forward_mode.startswith("generic, over a cache")
    refs = with_heads(served, driver)
    prompts = served.prompts(5, 12, 1)
    answers = [classify(driver, prompt, ref) for prompt, ref in zip(prompts, refs, strict=True)]
    driver.submit(prompts[0], adapter=served.refs[2])
    driver.run()
    for answer, prompt, ref in zip(answers, prompts, refs, strict=True):
        head = driver.adapters[ref].head  # type: ignore[union-attr]
        assert head is not None
        assert answer.last.classification is not None
        expected = oracle(served, head, ref, prompt)
        assert answer.last.classification.scores == pytest.approx(expected, abs=TOLERANCE)


def test_prefix_cache_and_preemption_change_nothing(llama: Served, start: Start) -> None:
    found = []
    for num_blocks in (256, 14):
        driver = start(llama, num_blocks=num_blocks)
        [ref, *_] = with_heads(llama, driver)
        prompts = llama.prompts(40, 38, 33)
        for _ in range(2):
            generating = [driver.submit(prompt[:20], adapter=llama.refs[2]) for prompt in prompts]
            answers = [classify(driver, prompt, ref) for prompt in prompts]
            driver.run()
            found.append([answer.last.classification for answer in answers])
            assert all(answer.finish_reason == "length" for answer in generating)
        if num_blocks == 256:
            assert [answer.last.num_cached_tokens for answer in answers] == [32, 32, 32]
        driver.engine.close()
    for others in found[1:]:
        for one, other in zip(found[0], others, strict=True):
            assert one is not None
            assert other is not None
            assert other.scores == pytest.approx(one.scores, abs=1e-5)


def test_with_lookahead_the_classes_are_the_same(llama: Served, start: Start) -> None:
    found = []
    for lookahead in ("off", "on"):
        driver = start(llama, lookahead=lookahead)
        refs = with_heads(llama, driver)
        answers = [classify(driver, p, r) for p in llama.prompts(9, 23) for r in refs]
        driver.submit(llama.prompts(5)[0], adapter=llama.refs[2])
        driver.run()
        found.append([answer.last.classification for answer in answers])
        driver.engine.close()
    for one, two in zip(*found, strict=True):
        assert one is not None
        assert two is not None
        assert one.scores == pytest.approx(two.scores, abs=1e-5)


def test_requests_for_another_task_fail_alone(llama: Served, start: Start) -> None:
    driver = start(llama)
    [ref, *_] = with_heads(llama, driver)
    [prompt] = llama.prompts(9)
    generating, headless = driver.submit(prompt, adapter=ref), classify(driver, prompt, llama.refs[2])
    right = classify(driver, prompt, ref)
    driver.run()
    assert (generating.error_code, headless.error_code) == (NOT_GENERATIVE, NO_HEAD)
    assert right.last.classification is not None
    again = driver.submit(prompt, adapter=ref)  # resident by now
    driver.run()
    assert again.error_code == NOT_GENERATIVE
    with pytest.raises(InvalidInput, match="base model") as refusal:
        driver.submit(prompt, READ, None, classifies=True)
    assert (refusal.value.code, refusal.value.param) == (NO_HEAD, "model")
    with pytest.raises(InvalidInput, match="generates no tokens"):
        driver.submit(prompt, SamplingParams(max_tokens=1), ref, classifies=True)


def test_a_head_of_another_width_is_refused(llama: Served, start: Start) -> None:
    driver = start(llama)
    ref = llama.refs[0]
    head = ClassificationHead(torch.ones(2, 5), ("no", "yes"))
    driver.adapters[ref] = replace(llama.adapters[ref], head=head)
    answer = classify(driver, llama.prompts(5)[0], ref)
    driver.run()
    assert answer.error_code == "basis_mismatch"


def test_heads_count_in_the_host_cache_and_leave_with_their_adapter(llama: Served, start: Start) -> None:
    driver = start(llama)
    refs = with_heads(llama, driver)
    for ref in refs:
        classify(driver, llama.prompts(5)[0], ref)
    driver.run()
    sizes = {
        ref: adapter.R.nbytes + adapter.head.nbytes  # type: ignore[union-attr]
        for ref, adapter in driver.adapters.items()
        if ref in refs
    }
    assert driver.engine.stats().host_cache_bytes == sum(sizes.values())
    driver.engine.unload("default", refs[0].adapter_id)
    driver.adapters[refs[0]] = llama.adapters[refs[0]]
    answer = classify(driver, llama.prompts(5)[0], refs[0])
    driver.run()
    assert answer.error_code == NO_HEAD


def test_a_state_that_is_not_finite_fails_its_request_alone(llama: Served, start: Start) -> None:
    driver = start(llama)
    ref, other, _ = with_heads(llama, driver)
    broken = driver.adapters[ref]
    driver.adapters[ref] = replace(broken, R=broken.R * 1e30)  # type: ignore[union-attr]
    [prompt] = llama.prompts(9)
    bad, good = classify(driver, prompt, ref), classify(driver, prompt, other)
    driver.run()
    assert bad.error_code == "non_finite_logits"
    assert good.last.classification is not None
