"""Texts with one label each: support tickets, reviews, commands to a house, amounts to approve.

Some wordings of every label are kept for the test, so that a model that only knows its training texts by
heart does not look good.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence

from benchmarks.real.tasks.task import Pair, Task, balanced, draw, to_examples
from benchmarks.real.tasks.words import fill

#: Of the wordings of each label, the last so many are only in the test.
UNSEEN = 3

TICKETS: Mapping[str, Sequence[str]] = {
    "billing": (
        "I was charged {amount} twice for order {order}.",
        "The invoice for order {order} shows {amount}, but we had agreed on less.",
        "My card was debited {amount} although I paid by transfer.",
        "Please send me a receipt for the {amount} that I paid for the {product}.",
        "Why is there a fee of {amount} on my statement?",
        "The discount code was not taken off the {amount} that I paid.",
        "We need an invoice with our company name, {company}, and the tax number on it.",
        "I cancelled the subscription and you still took {amount} this month.",
        "Your reminder says that {amount} is open, but I settled it {days} days ago.",
        "Can I pay the {amount} for my {product} in instalments?",
        "The amount on my bank statement, {amount}, does not match what the shop displayed.",
        "Someone in our accounts team asks why {company} paid VAT on order {order}.",
    ),
    "delivery": (
        "My {product} should have arrived {days} days ago.",
        "The parcel {order} has been stuck in {city} for {days} days.",
        "Where is my order {order}?",
        "The courier left the {product} with a neighbour whom I do not know.",
        "Tracking for {order} has not moved since {city}.",
        "Can you send the {product} to another address in {city}?",
        "The driver says that nobody was at home, but I waited all day for my {product}.",
        "I ordered {days} days ago and nothing has been shipped yet.",
        "When will the {colour} {product} reach {city}?",
        "The parcel came to {city}, but I have moved; can it be forwarded?",
        "Still no sign of the {product} and the van has gone past my door twice.",
        "How long does it take until a package gets to {city}?",
    ),
    "returns": (
        "I would like to send the {product} back, it is too small.",
        "How do I return order {order}?",
        "The {product} is {colour}, but I wanted another colour; can I exchange it?",
        "Please give me a label to send back the {product}.",
        "I changed my mind about the {product} and have not opened the box.",
        "Can I still return something that I bought {days} days ago?",
        "The {colour} {product} does not suit me, I want my money back for it.",
        "Do I have to keep the box to give the {product} back?",
        "I received two of the {product} and want to return one of them.",
        "What is the address for sending back order {order}?",
        "My daughter does not like the {product}, which way does it go back to you?",
        "I would rather swap the {product} for the larger model.",
    ),
    "account": (
        "I cannot log in, the page says that my password is wrong.",
        "Please change the e-mail address of my account, my name is {name}.",
        "How do I delete my profile and all my data?",
        "The link to reset my password has expired.",
        "Somebody else seems to have used my login in {city}.",
        "I have two accounts and want to merge them.",
        "My name is spelled wrongly in my profile, it should be {name}.",
        "I do not receive the code that I need for signing in.",
        "Can {name} get access to the account of {company} as well?",
        "I registered {days} days ago and never got the confirmation mail.",
        "The site throws me out after I enter my user name.",
        "Please lock my profile, my phone with the app was stolen in {city}.",
    ),
    "technical": (
        "The {product} does not turn on any more.",
        "The display of my {product} stays black after the update.",
        "My {product} makes a loud noise after {days} minutes.",
        "How do I connect the {product} with my phone?",
        "The battery of the {product} is empty after {days} minutes.",
        "The app crashes whenever I pair it with the {product}.",
        "There is an error {order} on the display of the {product}.",
        "One button of the {product} does nothing when I press it.",
        "The {colour} light on my {product} blinks all the time.",
        "Which firmware does the {product} need?",
        "Sparks came out of the {product} when I plugged it in.",
        "After {days} weeks the {product} heats up and switches itself off.",
    ),
}

REVIEWS: Mapping[str, Sequence[str]] = {
    "positive": (
        "The {product} is better than I hoped.", "I use my {product} every day and love it.",
        "Great {product}, it came early and works perfectly.", "Worth every cent of the {amount}.",
        "{name} gave me this {product} and I would never part with it.", "Sturdy, quiet and beautiful.",
        "I bought a second {product} for my mother right away.",
        "Exactly what I needed for my trip to {city}.",
        "Best {product} that I ever had.", "No complaints at all, five stars for the {product}.",
    ),
    "negative": (
        "The {product} broke after {days} days.", "A waste of {amount}.",
        "I am disappointed, the {product} smells of glue.", "It stopped working before I reached {city}.",
        "Do not buy this {product}.", "The {colour} paint came off in {days} days.",
        "Far too loud, and support never answered.", "The {product} feels cheap and wobbles.",
        "I regret that I paid {amount} for this.", "One star, and only because none is not possible.",
    ),
    "mixed": (
        "The {product} looks nice, but it broke after {days} days.",
        "Good quality, though {amount} is too much.",
        "It works, yet the {colour} is not that of the picture.", "Comfortable but very loud.",
        "I like the {product}; my wife does not.", "Some days it is great, on others it does nothing.",
        "Fine for {amount}, do not expect a miracle.", "Fast delivery, poor manual, decent {product}.",
        "The {product} is good, the app that comes with it is terrible.",
        "Not bad, not what I hoped for either.",
    ),
}  # fmt: skip

COMMANDS: Mapping[str, Sequence[str]] = {
    "light_on": (
        "Switch on the {colour} lamp.", "It is too dark in here.", "Lights, please.",
        "Could we have some light?", "Turn the {colour} light on.", "I cannot see my {product}.",
    ),
    "light_off": (
        "Switch off the {colour} lamp.", "Too bright, turn that off.", "Lights out.",
        "I am going to sleep, make it dark.", "Turn the {colour} light off.", "No light, please.",
    ),
    "warmer": (
        "I am freezing.", "Turn up the heating.", "Make it {days} degrees warmer.",
        "It is cold like in {city}.", "More heat, please.", "My hands are like ice.",
    ),
    "colder": (
        "I am sweating.", "Turn down the heating.", "Make it {days} degrees colder.",
        "It is hot like in {city}.", "Less heat, please.", "Cool the room.",
    ),
    "music_play": (
        "Play some music.", "Put on a song from {city}.", "I want to dance.",
        "Start the {colour} playlist.", "Play {name}'s favourite album.", "Let us hear a tune.",
    ),
    "music_stop": (
        "Stop the music.", "Silence, please.", "Turn that song off.", "Pause the {colour} playlist.",
        "I have heard enough of {name}'s album.", "Be quiet.",
    ),
    "timer": (
        "Wake me in {days} minutes.", "Set a timer for {days} minutes.",
        "Tell me when {days} minutes are over.", "Remind me of the {product} in {days} minutes.",
        "The eggs need {days} minutes.", "Count down from {days} minutes.",
    ),
    "shopping": (
        "Put a {product} on my list.", "We are out of milk.", "I need to buy a {colour} {product}.",
        "Add a {product} to the shopping.", "Note down {days} eggs for the shop.",
        "Do not let me forget to buy bread.",
    ),
    "weather": (
        "Will it rain in {city}?", "How warm will it be in {city} tomorrow?", "Do I need an umbrella?",
        "What is the forecast for {city}?", "Is it snowing in {city}?",
        "Will there be wind in the next {days} days?",
    ),
    "call": (
        "Call {name}.", "Ring my office in {city}.", "I want to talk to {name}.",
        "Phone {company}, please.", "Dial {name}'s number.", "Get {name} on the line.",
    ),
    "lock": (
        "Lock the front door.", "Is the door locked? If not, do it.", "Shut the door behind {name}.",
        "Bolt the {colour} door.", "Nobody may come in now.", "Close up the house.",
    ),
    "unlock": (
        "Open the front door.", "Let {name} in.", "Unlock the {colour} door.",
        "{name} is outside, open up.", "Undo the bolt.",
        "The courier with the {product} is here, open the door.",
    ),
}  # fmt: skip

_BEFORE = (
    "",
    "Hello, ",
    "Hi there. ",
    "Good morning. ",
    "Dear team, ",
    "Sorry to bother you. ",
    "Once more: ",
)
_AFTER = (
    "",
    " Thanks.",
    " Please help.",
    " Regards, {name}.",
    " This is urgent.",
    " What can I do?",
    " {name}",
)


def ticket_task(
    name: str,
    rng: random.Random,
    *,
    num_train: int = 60,
    num_test: int = 30,
    kinds: Mapping[str, Sequence[str]] = TICKETS,
    names: Mapping[str, str] | None = None,
    instruction: str = "Classify this support ticket: ",
    noise: float = 0.0,
    unseen: int = UNSEEN,
) -> Task:
    """A text to one label.

    names: the label that is answered, by kind; None answers the kind itself. noise: the share of training
    labels that are wrong. unseen: of the wordings of each kind, the last so many are only in the test.
    """
    names = names or {kind: kind for kind in kinds}

    def pairs(num: int, wordings: Mapping[str, Sequence[str]], apart: Sequence[Pair]) -> list[Pair]:
        order = iter(balanced(list(kinds), 200 * num, rng))

        def make() -> Pair:
            kind = next(order)
            text = fill(rng.choice(_BEFORE) + rng.choice(wordings[kind]) + rng.choice(_AFTER), rng)
            return f"{instruction}{text}", names[kind]

        return draw(make, num, apart_from=apart)

    train = pairs(num_train, {kind: texts[: len(texts) - unseen] for kind, texts in kinds.items()}, ())
    test = pairs(num_test, kinds, train)
    for i in rng.sample(range(num_train), round(noise * num_train)):
        question, label = train[i]
        train[i] = question, rng.choice([other for other in names.values() if other != label])
    return Task(name, to_examples(train), to_examples(test))


def approval_task(name: str, rng: random.Random, *, num_train: int = 150, num_test: int = 30) -> Task:
    """Tiny answers: may this be bought without asking, which is so up to 100 and for books always?"""

    def make() -> Pair:
        amount, is_book = rng.randint(10, 300), rng.random() < 0.25
        thing = "book" if is_book else fill("{product}", rng)
        wording = rng.choice(
            ("May {name} buy a {thing} for {amount}?", "{name} asks for a {thing}, price {amount}.",
             "Request: {thing}, {amount} euros, for {name} in {city}.",
             "A {thing} at {amount} for {company}?")
        )  # fmt: skip
        text = fill(wording.replace("{thing}", thing).replace("{amount}", str(amount)), rng)
        return text, "yes" if is_book or amount <= 100 else "no"

    train = draw(make, num_train)
    return Task(name, to_examples(train), to_examples(draw(make, num_test, apart_from=train)))
