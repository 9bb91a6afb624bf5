"""Constants that settings need. Reading them loads neither torch nor transformers.

`tests/tessera/test_defaults.py` holds the names against the registries that they are taken from.
"""

from __future__ import annotations

from pathlib import Path

#: Shipped with the repository so that nothing has to be downloaded; see its README for what it can do.
BUNDLED_MODEL = Path(__file__).parent.parent / "models" / "tiny"

#: The seven linear kinds of a Llama-like decoder layer: LoRA-XS, LoRA-SB and their peers adapt all of them.
LLAMA_LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")

#: Methods whose basis follows from the base model alone, so that naming one is enough to have it built. In
#: the order of `tessera.methods.bases.METHODS`.
SELF_BUILDING = ("lora_xs", "loram", "pissa", "milora", "olora", "random", "tinylora", "psoft")

#: Labels of one classification. More classes than that are a retrieval. A head of 256 rows for a hidden state
#: of 4,096 takes 4 MiB.
MAX_LABELS = 256
MAX_LABEL_CHARS = 64
#: All labels of a classification as JSON: they are a part of the adapter's metadata.
MAX_LABELS_BYTES = 32 * 1024
