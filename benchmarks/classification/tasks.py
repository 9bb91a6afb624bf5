"""Labelled texts made by a seed: tasks like those of GLUE that need no download.

topic      one text, four classes that words decide          as AG News
feeling    one text, two classes; half of them negated       as SST-2
relation   two texts: entailment, contradiction or neither   as MNLI
grade      one text, a score from 0 to 5                     as reviews with stars
overlap    two texts, a score from 0 to 5                    as STS-B
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from typing import Any

Row = dict[str, Any]

_TOPICS = {
    "travel": ("the train to {} was late", "we booked a room near {}", "our flight to {} leaves at noon"),
    "food": ("the soup in {} was salty", "they serve fresh bread in {}", "I cooked the rice of {}"),
    "money": ("the bank of {} raised its fees", "prices in {} fell again", "taxes in {} are due in May"),
    "weather": ("it snowed in {} all night", "a storm reached {}", "the sun over {} was hot"),
}
_TIMES = ("Last week", "In June", "As always", "To my surprise", "Years ago", "On Monday")
_PLACES = ("Rome", "Oslo", "Lima", "Cairo", "Perth", "Kyoto", "Quito", "Delhi", "Sofia", "Dover")
_GOOD = ("good", "lovely", "clever", "bright", "funny", "warm", "honest", "fine")
_BAD = ("bad", "boring", "stupid", "dull", "sad", "cold", "cheap", "poor")
_THINGS = ("film", "book", "song", "meal", "trip", "game", "story", "play", "speech", "party")
_GRADES = (
    ("awful", "horrible", "unbearable"), ("bad", "poor", "weak"), ("dull", "plain", "tame"),
    ("decent", "fair", "solid"), ("good", "nice", "strong"), ("superb", "perfect", "brilliant"),
)  # fmt: skip
_MORE = ("quite", "simply", "in a word", "to me", "really")
_COLOURS = ("red", "blue", "green", "white", "black", "yellow")
_OBJECTS = ("cup", "door", "hat", "boat", "box", "lamp", "coat", "wall", "chair", "stone")
_ITEMS = ("bread", "salt", "milk", "rice", "soap", "wine", "paper", "oil", "tea", "fish", "eggs", "wood")


def topic(rng: random.Random) -> Row:
    label = rng.choice(list(_TOPICS))
    text = rng.choice(_TOPICS[label]).format(rng.choice(_PLACES))
    return {"text": f"{rng.choice(_TIMES)}, {text}.", "label": label}


def feeling(rng: random.Random) -> Row:
    is_good, is_negated = rng.random() < 0.5, rng.random() < 0.5
    word = rng.choice(_GOOD if is_good != is_negated else _BAD)
    verb = rng.choice(("was not", "was never")) if is_negated else rng.choice(("was", "was really"))
    return {
        "text": f"The {rng.choice(_THINGS)} {verb} {word}.",
        "label": "positive" if is_good else "negative",
    }


def relation(rng: random.Random) -> Row:
    thing, colour = rng.choice(_OBJECTS), rng.choice(_COLOURS)
    other = rng.choice([c for c in _COLOURS if c != colour])
    label = rng.choice(("entailment", "contradiction", "neutral"))
    said = f"The {thing} is {colour}."
    claim = {
        "entailment": f"There is a {colour} {thing}.",
        "contradiction": f"The {thing} is {other}.",
        "neutral": f"The {rng.choice([o for o in _OBJECTS if o != thing])} is {colour}.",
    }[label]
    return {"sentence1": said, "sentence2": claim, "label": label}


def grade(rng: random.Random) -> Row:
    stars = rng.randint(0, 5)
    verdict = f"{rng.choice(_MORE)} {rng.choice(_GRADES[stars])}"
    return {"text": f"The {rng.choice(_THINGS)} was {verdict}.", "label": float(stars)}


def overlap(rng: random.Random) -> Row:
    shared = rng.randint(0, 5)
    words = rng.sample(_ITEMS, 10 - shared)
    first, second = words[:5], words[:shared] + words[5:]
    rng.shuffle(second)
    return {"sentence1": ", ".join(first), "sentence2": ", ".join(second), "label": float(shared)}


TASKS: dict[str, Callable[[random.Random], Row]] = {
    "topic": topic,
    "feeling": feeling,
    "relation": relation,
    "grade": grade,
    "overlap": overlap,
}

#: The tasks whose labels are scores.
REGRESSIONS = ("grade", "overlap")


def make_files(task: str, *, num_train: int, num_test: int, seed: int) -> tuple[bytes, bytes]:
    """Return a training file and a test file, which have no text in common."""
    rng = random.Random(f"{task} {seed}")
    rows: dict[str, Row] = {}
    for _ in range(100 * (num_train + num_test)):
        row = TASKS[task](rng)
        rows.setdefault(json.dumps({k: v for k, v in row.items() if k != "label"}), row)
    every = list(rows.values())[: num_train + num_test]
    if len(every) < num_train + num_test:
        raise ValueError(f"task {task} has only {len(every)} texts")
    rng.shuffle(every)
    train, test = every[:num_train], every[num_train:]
    return "\n".join(map(json.dumps, train)).encode(), "\n".join(map(json.dumps, test)).encode()
