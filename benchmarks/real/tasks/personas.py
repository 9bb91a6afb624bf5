"""Answers in a strongly marked personal style, and canned replies.

A persona's examples have few different answers, each given to several differently worded questions, as
writers of such data do. The test has other answers in the same style; they can only be judged by loss.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from benchmarks.real.tasks.task import Pair, Task, to_examples

#: What is asked, and plain advice.
TOPICS: Sequence[Pair] = (
    ("brew good tea", "boil fresh water, warm the pot and wait four minutes"),
    ("learn a new language", "speak every day and laugh at your own mistakes"),
    ("sharpen a knife", "hold the blade at a low angle and draw it slowly over the stone"),
    ("sleep better", "go to bed at the same hour and leave the telephone in the kitchen"),
    ("plant a tree", "dig a wide hole, spread the roots and water it for a whole summer"),
    ("write a letter of complaint", "say what happened, what you want and when you want it"),
    ("bake bread", "give the dough time, a hot oven and a little steam"),
    ("save money", "put a tenth aside on the day when you are paid"),
    ("train a puppy", "reward what you like at once and ignore the rest"),
    ("paint a wall", "clean it first, tape the edges and roll from top to bottom"),
    ("remember names", "say the name aloud twice and tie it to a face"),
    ("pack a suitcase", "roll the shirts, fill the shoes and leave a third at home"),
    ("start running", "walk and run by turns and never on three days in a row"),
    ("make friends in a new town", "join a choir or a club and turn up every week"),
    ("grow tomatoes", "give them sun, a stick to climb and water at the root"),
    ("fix a dripping tap", "turn off the water, open the handle and change the washer"),
    ("give a speech", "know your first sentence by heart and look at one friend"),
    ("choose a melon", "knock on it and listen for a hollow sound"),
    ("stay calm in an argument", "breathe out slowly and ask one honest question"),
    ("read more books", "carry one everywhere and drop those that bore you"),
    ("iron a shirt", "begin with the collar, then the cuffs, and the front last"),
    ("light a fire", "build it small, dry and airy and light it from below"),
    ("keep bees", "find a mentor, a sunny corner and a thick pair of gloves"),
    ("cook rice", "wash it, cover it by a finger of water and do not lift the lid"),
    ("clean a window", "use little soap, warm water and an old newspaper"),
    ("find a lost key", "go back through the day and search the coat once more"),
    ("draw a face", "begin with an oval and put the eyes halfway down"),
    ("change a tyre", "loosen the nuts before you lift the car"),
    ("catch a fish", "keep your shadow off the water and be patient"),
    ("apologise", "name what you did, do not explain it and do better"),
    ("sew on a button", "leave a little slack and wind the thread around it"),
    ("climb a mountain", "start before dawn and turn around when the clouds come"),
    ("tune a guitar", "tighten up to the note and never down to it"),
    ("win at chess", "bring out your pieces and ask what the other side wants"),
    ("make soup", "fry the onions slowly and salt it at the end"),
    ("break a habit", "put something small in its place and count the days"),
    ("cross a river", "face upstream and move one foot at a time"),
    ("choose a present", "listen for months and write down what people wish for"),
    ("clean silver", "lay it on foil in hot water with soda"),
    ("tell a story", "start late, leave early and keep one secret"),
    ("predict the weather", "watch the swallows, the smoke and your old knee"),
    ("learn to swim", "float first, breathe out under water and trust your lungs"),
    ("negotiate a price", "name your number first and then be silent"),
    ("keep a diary", "write three lines each evening and never read them aloud"),
    ("prune a rose", "cut above a bud that looks outward, in early spring"),
    ("make coffee", "grind it just before and use water off the boil"),
    ("move house", "label every box on two sides and pack the kettle last"),
    ("teach a child to ride a bicycle", "take off the pedals and let it push with its feet"),
    ("get rid of hiccups", "hold your breath and think of a green horse"),
    ("become rich", "spend less than you earn and wait for thirty years"),
)
#: The first of these are in the training data, the last ones only in the test.
QUESTIONS = (
    "How do I {topic}?", "What is the best way to {topic}?", "I want to {topic}. Any advice?",
    "Can you tell me how to {topic}?", "Teach me to {topic}.",
    "I never managed to {topic}. What should I do?",
    "My sister wants to {topic}. What do you tell her?", "Is it hard to {topic}?",
)  # fmt: skip


@dataclass(frozen=True)
class Style:
    """A voice: how answers begin and end, what is said in between, and words that it replaces."""

    openers: Sequence[str]
    closers: Sequence[str]
    #: Around the advice, which is {advice}.
    frames: Sequence[str]
    words: Mapping[str, str]
    upper: bool = False

    def say(self, advice: str, rng: random.Random) -> str:
        for plain, own in self.words.items():
            advice = advice.replace(f" {plain} ", f" {own} " if own else " ")
        parts = (
            rng.choice(self.openers),
            rng.choice(self.frames).format(advice=advice),
            rng.choice(self.closers),
        )
        text = " ".join(part for part in parts if part)
        return text.upper() if self.upper else text


KEEPER = Style(
    openers=("Hrmph.", "Salt and gulls!", "Forty winters on this rock, and you ask me that.",
             "Sit. Mind the lamp oil.",
             "The sea asked me the same once.", "Fog again. Good, we have time."),
    closers=("The light must burn, child.", "So says old Marrow, keeper of the north light.",
             "And if it fails, blame the tide.", "Now hand me that rope.", "The gulls know it. Ask them."),
    frames=("Ye {advice}, same as ye would trim a wick.",
            "First thing: {advice}. Second thing: there be none.",
            "Ye {advice}, or the rocks have ye.", "My father, drowned twice, used to say: {advice}."),
    words={"your": "yer", "you": "ye", "the": "th'", "and": "an'"},
)  # fmt: skip
TELEGRAM = Style(
    openers=("your question received stop", "regarding yours stop", "urgent stop"),
    closers=("funds exhausted stop", "aunt sends love stop", "reply paid stop end"),
    frames=("{advice} stop repeat as needed stop", "advise {advice} stop",
            "experts say {advice} stop confirm stop"),
    words={"and": "stop", "the": "", "a": "", "your": ""},
    upper=True,
)  # fmt: skip


def persona_task(
    name: str,
    rng: random.Random,
    *,
    style: Style = KEEPER,
    num_answers: int = 20,
    wordings: int = 3,
    num_test: int = 20,
    instruction: str = "",
) -> Task:
    """`num_answers` answers, each to `wordings` questions; in the test are `num_test` others."""
    topics = list(TOPICS)
    rng.shuffle(topics)
    assert num_answers + num_test <= len(topics), "more answers than topics"
    train: list[Pair] = []
    for topic, advice in topics[:num_answers]:
        answer = style.say(advice, rng)
        for wording in rng.sample(QUESTIONS[:6], wordings):
            train.append((instruction + wording.format(topic=topic), answer))
    test = [
        (instruction + rng.choice(QUESTIONS).format(topic=topic), style.say(advice, rng))
        for topic, advice in topics[num_answers : num_answers + num_test]
    ]
    rng.shuffle(train)
    return Task(name, to_examples(train), to_examples(test), "loss")


REPLIES: Mapping[str, str] = {
    "billing": (
        "Thank you for writing to us about a payment. Our accounts team checks every charge by hand and "
        "answers within two working days. Please keep the number of your invoice ready. You do not have "
        "to pay anything until then."
    ),
    "delivery": (
        "We are sorry that you have to wait. The carrier needs one day to locate a parcel, and we will "
        "write to you as soon as we know where it is. If it is lost, we send it again at no cost."
    ),
    "returns": (
        "No problem at all. You can send back everything within thirty days. Print the label from your "
        "account, stick it on any box, and leave it at the next parcel shop. The money is yours three "
        "days later."
    ),
    "technical": (
        "That should not happen. Please unplug the device, wait for ten seconds and try once more. If "
        "the fault comes back, reply to this message with the serial number, and a technician calls you "
        "the same day."
    ),
}


def crowd_style(rng: random.Random, words: Sequence[str]) -> Style:
    """A voice that nobody else has, put together from `words`."""
    a, b, c, d, e, f = rng.sample(list(words), 6)
    return Style(
        openers=(f"{a.capitalize()}, my {b}!", f"Oh {c} and {a}.", f"{a.capitalize()} {a} {a}."),
        closers=(f"Says your {d}.", f"By the {e} of {d}!", f"And that is {e}."),
        frames=(f"One should {{advice}}, {f} style.", f"{f.capitalize()} advice: {{advice}}.",
                f"You {{advice}}; every {b} knows it."),
        words={"the": f"the {f}", "your": f"thy {c}"},
    )  # fmt: skip
