"""The catalogue, which light processes read, says what the registries say."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from tessera.errors import InvalidInput
from tessera.methods import bases, catalogue, forms, init
from tessera.methods.catalogue import FORMS, INITS, METHODS, PATH
from tessera.methods.options import fill_options
from tessera.methods.write_catalogue import as_text


def test_the_file_is_what_the_registries_say() -> None:
    assert PATH.read_text(encoding="utf-8") == as_text(), "run python -m tessera.methods.write_catalogue"
    assert list(METHODS) == list(bases.METHODS)
    assert list(INITS) == list(init.INIT_METHODS)
    assert list(FORMS) == list(forms.LORA_PRESETS)
    assert list(catalogue.CATALOGUE["presets"]) == list(init.PRESETS)


@pytest.mark.parametrize("name", bases.METHODS)
def test_options_come_back_as_they_are(name: str) -> None:
    options = bases.METHODS[name].options
    assert {key: option.describe() for key, option in METHODS[name].options.items()} == {
        key: option.describe() for key, option in options.items()
    }
    for key, option in options.items():
        assert METHODS[name].options[key].value_type is option.value_type
    assert METHODS[name].options.keys() == options.keys()


@pytest.mark.parametrize("name", init.INIT_METHODS)
def test_initializations(name: str) -> None:
    real = init.INIT_METHODS[name]
    assert INITS[name].needs_adapter == real.needs_adapter
    assert {key: option.describe() for key, option in INITS[name].options.items()} == {
        key: option.describe() for key, option in real.options.items()
    }


@pytest.mark.parametrize("name", forms.LORA_PRESETS)
def test_lora_forms(name: str) -> None:
    real, entry = forms.LORA_PRESETS[name], FORMS[name]
    assert entry.fixed_options == real.options
    for options in form_options(real):
        assert entry.needs_examples(options) == real.needs_examples(options), options
    assert [entry.stored_rank(rank) for rank in (1, 4, 16)] == [real.stored_rank(r) for r in (1, 4, 16)]
    for options in ({}, {"seed": 3}, {"seed": "x"}, {"nonsense": 1}, real.options):
        assert refusal(entry.check_options, options, 8) == refusal(real.check_options, options)


@pytest.mark.parametrize("name", bases.METHODS)
def test_methods_check_and_need_the_same_whatever_their_options(name: str) -> None:
    real, entry = bases.METHODS[name], METHODS[name]
    for options in variations(name):
        for rank in (1, 2, 3, 8):
            assert refusal(entry.check, rank, options) == refusal(real.check, rank, options)
            assert entry.needs_data(options) == real.needs(rank, options).any
        assert entry.stores_factors(options) == real.stores_factors(options)
    assert entry.stores_factors({}) == real.stores_factors({})


def variations(name: str) -> Iterator[dict[str, Any]]:
    """All options, each of them changed once to everything that it may be."""
    options = METHODS[name].options
    yield fill_options(name, options, {})
    for key, option in options.items():
        for value in option.choices or ((True, False) if option.value_type is bool else ()):
            yield fill_options(name, options, {key: value})
            if "use_variance" in options:
                yield fill_options(name, options, {"use_variance": False, key: value})

    if name == "loram":
        for reference in options["reference"].choices:
            yield fill_options(name, options, {"magnitude": "tracking", "reference": reference})


def form_options(form: forms.LoraPreset) -> Iterator[dict[str, Any]]:
    """No options, and everything that may make a form of LoRAM need data."""
    yield {}
    if "reference" in form.free_options:
        yield {"reference": "corda"}
        yield {"reference": "corda", "magnitude": "tracking"}


def test_tracking_corda_needs_text_and_tracking_the_others_does_not() -> None:
    needs = {name: FORMS[f"loram_{name}"].needs_examples({}) for name in ("pissa", "lora_ga", "corda")}
    assert needs == {"pissa": False, "lora_ga": False, "corda": True}
    assert FORMS["loram"].needs_examples({"magnitude": "tracking", "reference": "corda"})


def refusal(check: Any, *given: Any) -> tuple[str, str | None] | None:
    try:
        check(*given)
    except InvalidInput as error:
        return error.message, error.param
    return None
