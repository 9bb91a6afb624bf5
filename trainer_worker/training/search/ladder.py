"""How large a search is: which learning rates are tried, and on how many folds each one is judged.

Small jobs are bound by launches on a GPU, so candidates that fit into the idle part of a step cost little
time there; on a CPU each one costs its tokens. Knows neither the data nor the model except by their sizes.
"""

from __future__ import annotations

from dataclasses import dataclass

#: Jobs with more examples train once, at the rate of the tables: their steps fill the device.
MAX_EXAMPLES = 500
#: With fewer examples each one is needed for training and for judging: candidates are judged on folds.
MAX_EXAMPLES_FOR_FOLDS = 100
MAX_FOLDS = 3
#: Multiples of the tables' rate. The first one leads until the candidates are first compared.
MULTIPLES = (1.0, 3.0, 10.0, 0.3)
#: Tokens per step that a GPU trains in about the time of a few: 8,192 for a model of up to 2e9 parameters,
#: 2,048 for 8e9. Measured on an H200 with SmolLM2 (1.3e8, float32), runs of 302 tokens a step: 1 / 4 / 8 / 16
#: / 24 runs take 172 / 214 / 199 / 212 / 220 ms.
MIN_GPU_TOKENS, MAX_GPU_TOKENS = 2048, 8192
GPU_TOKENS_TIMES_PARAMETERS = 1.6e13


@dataclass(frozen=True)
class Ladder:
    """The size of a search."""

    #: Of the tables' learning rate, in the order in which they were chosen.
    multiples: tuple[float, ...]
    #: Parts of the examples, each of which judges runs that train on the others, while one more run trains on
    #: all examples and is published. 0: one held-out part judges the run that is published.
    num_folds: int

    @property
    def num_runs(self) -> int:
        return len(self.multiples) * (self.num_folds + 1)


#: One run at the tables' rate, compared with the base model.
ONE_RUN = Ladder(MULTIPLES[:1], 0)


def idle_tokens(*, is_gpu: bool, num_parameters: int) -> int:
    """Return the tokens per step that a search may fill without making a step much longer."""
    if not is_gpu:
        return 0
    return int(min(MAX_GPU_TOKENS, max(MIN_GPU_TOKENS, GPU_TOKENS_TIMES_PARAMETERS / max(1, num_parameters))))


def choose_ladder(
    *, num_examples: int, num_groups: int, tokens_per_step: int, max_tokens: int, has_held_out: bool
) -> Ladder | None:
    """Return the size of the search for a job, or None if it is to train once.

    num_groups: groups of examples that stay together (`splits.py`). tokens_per_step: of one run. max_tokens:
    per step, for all runs together, at the beginning. has_held_out: whether examples are held back already,
    in a validation file or by the split.
    """
    if num_examples > MAX_EXAMPLES:
        return None
    num_folds = min(MAX_FOLDS, num_groups)
    if num_examples < MAX_EXAMPLES_FOR_FOLDS and num_folds > 1:
        for folds in range(num_folds, 1, -1):
            ladder = Ladder(MULTIPLES, folds)
            if ladder.num_runs * tokens_per_step <= max_tokens:
                return ladder
        if not has_held_out:  # too few to hold some back: the folds at least say when to stop
            return Ladder(MULTIPLES[:1], 2)
    return Ladder(MULTIPLES, 0) if has_held_out else None
