"""The methods and LoRA forms by name, for processes that do not load torch to know them.

`tests/tessera/test_defaults.py` holds both lists against the registries.
"""

from __future__ import annotations

METHOD_NAMES = (
    "lora_xs",
    "lora_sb",
    "lora_da",
    "loram",
    "lolora",
    "pissa",
    "milora",
    "olora",
    "lora_ga",
    "lora_one",
    "corda",
    "eva",
    "gradient_svd",
    "population",
    "random",
)
FORM_NAMES = (
    "lora",
    "rslora",
    "lora_plus",
    "lora_fa",
    "lora_fa_orthogonal",
    "pissa",
    "pissa_fa",
    "milora",
    "olora",
    "corda",
    "lora_ga",
    "lora_one",
    "eva",
    "eva_fa",
    "lora_da",
    "lora_da_repo",
    "lora_da_fa",
    "lora_da_no_bias",
    "lora_da_no_variance",
    "lora_da_no_fisher",
    "loram",
    "loram_pissa",
    "loram_milora",
    "loram_orthogonal",
    "loram_gaussian",
    "lolora",
    "lolora_svd",
    "lolora_ae",
    "lolora_softhebb",
    "lolora_uncentred",
)
