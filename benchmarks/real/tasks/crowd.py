"""Users from whom a basis can be learned, and who are never judged.

They do what the judged tasks do, in their own way: other names of labels, keys and marks, other voices, other
canned replies, all put together from the words below. None of the judged answers is among theirs.
"""

from __future__ import annotations

import random
from collections.abc import Callable

from benchmarks.real.tasks.extraction import CONTACT_KEYS, ORDER_KEYS, json_task, redaction_task
from benchmarks.real.tasks.labels import COMMANDS, REVIEWS, TICKETS, ticket_task
from benchmarks.real.tasks.personas import crowd_style, persona_task
from benchmarks.real.tasks.task import Task

WORDS = (
    "amber", "anchor", "apple", "arrow", "aspen", "badger", "bamboo", "barley", "basket", "beacon", "berry",
    "bishop", "blanket", "bottle", "breeze", "bridge", "bronze", "button", "cactus", "candle", "canyon",
    "carrot", "castle", "cedar", "cherry", "circle", "cloud", "clover", "comet", "copper", "coral", "cotton",
    "cradle", "crystal", "dagger", "dancer", "desert", "diamond", "dolphin", "dragon", "eagle", "ember",
    "falcon", "feather", "fern", "flint", "forest", "fossil", "garden", "ginger", "glacier", "hammer",
    "harbour", "hazel", "heron", "honey", "island", "ivory", "jasmine", "jungle", "lantern", "lemon",
    "lizard", "marble", "meadow", "mirror", "mountain", "needle", "oak", "ocean", "olive", "onion", "orchid",
    "otter", "pebble", "pepper", "pillow", "planet", "prairie", "quartz", "rabbit", "raven", "ribbon",
    "river", "rocket", "saddle", "salmon", "shadow", "silk", "spider", "spruce", "tiger", "tulip", "valley",
    "velvet", "walnut", "willow", "window", "winter", "zebra",
)  # fmt: skip


def crowd(num_users: int, *, seed: int = 0, num_train: int = 60) -> list[Task]:
    """Return `num_users` tasks, the kinds by turns. A user's texts follow from the seed and the index."""
    kinds: tuple[Callable[[str, random.Random, int], Task], ...] = (
        _labels,
        _json,
        _persona,
        _replies,
        _marks,
    )
    users = []
    for i in range(num_users):
        rng = random.Random(f"crowd/{seed}/{i}")
        users.append(kinds[i % len(kinds)](f"user-{i}", rng, num_train))
    return users


def _labels(name: str, rng: random.Random, num_train: int) -> Task:
    texts = {**TICKETS, **REVIEWS, **COMMANDS}
    kinds = rng.sample(sorted(texts), rng.randint(3, 6))
    labels = dict(zip(kinds, rng.sample(WORDS, len(kinds)), strict=True))
    instruction = rng.choice(("", f"{rng.choice(WORDS).capitalize()}: ", "Which one? ", "Label: "))
    return ticket_task(
        name, rng, num_train=num_train, num_test=10, kinds={kind: texts[kind] for kind in kinds},
        names=labels, instruction=instruction, unseen=0,
    )  # fmt: skip


def _json(name: str, rng: random.Random, num_train: int) -> Task:
    kind = rng.choice(("order", "contact"))
    fields = sorted(ORDER_KEYS if kind == "order" else CONTACT_KEYS)
    chosen = rng.sample(fields, rng.randint(3, len(fields)))
    keys = dict(zip(chosen, rng.sample(WORDS, len(chosen)), strict=True))
    return json_task(name, rng, num_train=num_train, num_test=10, kind=kind, keys=keys, unseen=0)


def _persona(name: str, rng: random.Random, num_train: int) -> Task:
    style = crowd_style(rng, WORDS)
    return persona_task(name, rng, style=style, num_answers=num_train // 2, wordings=2, num_test=10)


def _replies(name: str, rng: random.Random, num_train: int) -> Task:
    kinds = rng.sample(sorted(TICKETS), 4)
    replies = {}
    for kind in kinds:
        a, b, c, d, e = rng.sample(WORDS, 5)
        replies[kind] = f"The {a} thanks you for your {b}. Turn to {c} and ask for {d}, or wait for the {e}."
    return ticket_task(
        name, rng, num_train=num_train, num_test=10, kinds={kind: TICKETS[kind] for kind in kinds},
        names=replies, instruction="", unseen=0,
    )  # fmt: skip


def _marks(name: str, rng: random.Random, num_train: int) -> Task:
    a, b, c = (word.upper() for word in rng.sample(WORDS, 3))
    return redaction_task(name, rng, num_train=num_train, num_test=10, marks=(f"<{a}>", f"<{b}>", f"<{c}>"))
