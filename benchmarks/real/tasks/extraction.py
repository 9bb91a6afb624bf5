"""Texts to be brought into another form: JSON, dates, SQL, redacted text, minutes of a meeting."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Mapping

from benchmarks.real.tasks.task import Pair, Task, draw, to_examples
from benchmarks.real.tasks.words import (
    CITIES,
    COLOURS,
    FIRST,
    LAST,
    MONTHS,
    NUMBERS,
    PRODUCTS,
    fill,
    full_name,
)

ORDER_TEXTS = (
    "Please send {count} {product}s in {colour} to {name}, {city}.",
    "{name} from {city} wants {count} {colour} {product}s.",
    "Hi, this is {name}. I need {count} of the {product}, colour {colour}, delivered to {city}.",
    "Order for {city}: {count} x {product} ({colour}), contact {name}.",
    "We are short of {product}s here in {city}, could we have {count} more? {colour} if possible. {name}",
    "{count} {colour} {product}s, please. The address is in {city}, ask for {name}.",
    "Could you put {name} down for {count} {product}s? The {colour} ones, to {city}.",
    "To {city} please, {product}, {colour}, {count} pieces. Yours, {name}",
)
CONTACT_TEXTS = (
    "I am {first} {last}, you reach me at {phone} or {mail}.",
    "{first} {last} called from {city}, number {phone}, please write to {mail}.",
    "New contact: {last}, {first}, {city}, {mail}, {phone}.",
    "Met {first} {last} at the fair in {city}. Phone {phone}, mail {mail}.",
    "Write to {mail} and ask for {first} {last}, or ring {phone}.",
    "This is {first}, {first} {last}. My mail is {mail} and my phone {phone}; I live in {city}.",
)
ORDER_KEYS: Mapping[str, str] = {
    "product": "product", "count": "count", "colour": "colour", "name": "name", "city": "city",
}  # fmt: skip
CONTACT_KEYS: Mapping[str, str] = {
    "first": "first_name", "last": "last_name", "phone": "phone", "mail": "email",
}  # fmt: skip


def json_task(
    name: str,
    rng: random.Random,
    *,
    num_train: int = 60,
    num_test: int = 20,
    kind: str = "order",
    keys: Mapping[str, str] | None = None,
    instruction: str = "",
    unseen: int = 2,
) -> Task:
    """Free text to a JSON object. keys: from what the text holds to the keys of the answer, in their order.

    kind: order or contact. unseen: so many of the wordings are only in the test.
    """
    is_order = kind == "order"
    texts = ORDER_TEXTS if is_order else CONTACT_TEXTS
    keys = keys or (ORDER_KEYS if is_order else CONTACT_KEYS)

    def maker(num_texts: int) -> Callable[[], Pair]:
        def make() -> Pair:
            values = _order(rng) if is_order else _contact(rng)
            question = instruction + rng.choice(texts[:num_texts]).format(**values)
            answer = json.dumps({key: values[field] for field, key in keys.items()})
            return question, answer

        return make

    train = draw(maker(len(texts) - unseen), num_train)
    return Task(name, to_examples(train), to_examples(draw(maker(len(texts)), num_test, apart_from=train)))


def _order(rng: random.Random) -> dict[str, object]:
    return {
        "product": rng.choice(PRODUCTS), "count": rng.randint(2, 60), "colour": rng.choice(COLOURS),
        "name": full_name(rng), "city": rng.choice(CITIES),
    }  # fmt: skip


def _contact(rng: random.Random) -> dict[str, object]:
    first, last, city = rng.choice(FIRST), rng.choice(LAST), rng.choice(CITIES)
    mail = rng.choice((f"{first}.{last}", f"{first[0]}{last}", last)).lower()
    return {
        "first": first, "last": last, "city": city,
        "mail": f"{mail}@{rng.choice(('mail', 'post', 'home'))}.example",
        "phone": f"0{rng.randint(10, 99)} {rng.randint(100000, 999999)}",
    }  # fmt: skip


DATE_TEXTS = (
    "The meeting is on {date}.", "Your passport expires {date}, {name}.", "We moved to {city} on {date}.",
    "Please pay before {date}.", "{name} was born on {date} in {city}.",
    "The offer of {company} ends {date}.",
    "On {date} the shop is closed.", "Delivery of the {product} is planned for {date}.",
)  # fmt: skip


def dates_task(name: str, rng: random.Random, *, num_train: int = 60, num_test: int = 30) -> Task:
    """A date in prose to its ISO form: 3rd of May 2021 → 2021-05-03."""

    def make() -> Pair:
        year, month, day = rng.randint(1960, 2039), rng.randint(1, 12), rng.randint(1, 28)
        word = MONTHS[month - 1]
        form = rng.choice(
            (f"{day} {word} {year}", f"{word} {day}, {year}", f"the {_ordinal(day)} of {word}, {year}",
             f"{day}. {month}. {year}", f"{word[:3]} {_ordinal(day)} {year}",
             f"{day} {word[:3]} '{year % 100:02}")
        )  # fmt: skip
        text = fill(rng.choice(DATE_TEXTS).replace("{date}", form), rng)
        return text, f"{year:04}-{month:02}-{day:02}"

    train = draw(make, num_train)
    return Task(name, to_examples(train), to_examples(draw(make, num_test, apart_from=train)))


def _ordinal(day: int) -> str:
    suffix = {1: "st", 2: "nd", 3: "rd"}.get(day % 10, "th") if day not in (11, 12, 13) else "th"
    return f"{day}{suffix}"


def sql_task(name: str, rng: random.Random, *, num_train: int = 60, num_test: int = 20) -> Task:
    """A question about a table to a query of one line."""
    tables = {
        "orders": ("amount", "city", PRODUCTS), "customers": ("age", "city", FIRST),
        "stock": ("count", "colour", PRODUCTS), "staff": ("salary", "city", LAST),
    }  # fmt: skip

    def make() -> Pair:
        table = rng.choice(sorted(tables))
        number, column, _ = tables[table]
        value = rng.choice(COLOURS if column == "colour" else CITIES)
        limit = rng.randint(2, 900)
        return rng.choice(
            (
                (f"How many {table} are there with {column} {value}?",
                 f"SELECT COUNT(*) FROM {table} WHERE {column} = '{value}';"),
                (f"Show all {table} whose {number} is above {limit}.",
                 f"SELECT * FROM {table} WHERE {number} > {limit};"),
                (f"What is the average {number} of {table} with {column} {value}?",
                 f"SELECT AVG({number}) FROM {table} WHERE {column} = '{value}';"),
                (f"List the {limit} {table} with the highest {number}.",
                 f"SELECT * FROM {table} ORDER BY {number} DESC LIMIT {limit};"),
                (f"Which {table} with {column} {value} have a {number} of less than {limit}?",
                 f"SELECT * FROM {table} WHERE {column} = '{value}' AND {number} < {limit};"),
            )
        )  # fmt: skip

    train = draw(make, num_train)
    return Task(name, to_examples(train), to_examples(draw(make, num_test, apart_from=train)))


REDACTION_TEXTS = (
    "{name} from {city} called about order {order}.", "Please refund order {order} to {name}.",
    "The {product} of {name} went to {city} by mistake.", "{name} and {other} live in {city}.",
    "Order {order} was paid by {name}, not by {other}.", "Tell {name} that the {product} is ready in {city}.",
    "I met {other} in {city} and gave the {product} to {name}.",
    "Neither {name} nor {other} knows order {order}.",
)  # fmt: skip


def redaction_task(
    name: str,
    rng: random.Random,
    *,
    num_train: int = 60,
    num_test: int = 20,
    marks: tuple[str, str, str] = ("[NAME]", "[CITY]", "[ORDER]"),
) -> Task:
    """A sentence to the same sentence with names, places, and numbers blacked out."""

    def make() -> Pair:
        text = rng.choice(REDACTION_TEXTS).replace("{product}", rng.choice(PRODUCTS))
        order = f"{rng.choice('ABCDEFGH')}{rng.randint(1000, 9999)}"
        question = text.format(
            name=full_name(rng), other=full_name(rng), city=rng.choice(CITIES), order=order
        )
        answer = text.format(name=marks[0], other=marks[0], city=marks[1], order=marks[2])
        return question, answer

    train = draw(make, num_train)
    return Task(name, to_examples(train), to_examples(draw(make, num_test, apart_from=train)))


def minutes_task(name: str, rng: random.Random, *, num_train: int = 60, num_test: int = 20) -> Task:
    """A note to long minutes in a fixed form, about 100 tokens each."""

    def make() -> Pair:
        chair, writer = full_name(rng), full_name(rng)
        city, product, num = rng.choice(CITIES), rng.choice(PRODUCTS), rng.choice(NUMBERS)
        weekday = rng.choice(("Monday", "Tuesday", "Wednesday", "Thursday", "Friday"))
        question = rng.choice(
            (f"{weekday} in {city}: {chair} led, {writer} wrote, we will order {num} pallets of {product}s.",
             f"We met in {city} on {weekday}, {chair} in the chair and {writer} with the pen; {num} pallets "
             f"of {product}s will be bought.")
        )  # fmt: skip
        answer = (
            f"MINUTES OF THE MEETING\nPlace: {city}\nDay: {weekday}\nChair: {chair}\nSecretary: {writer}\n\n"
            f"1. The chair opened the meeting and thanked everybody for coming to {city}.\n"
            f"2. The meeting resolved to order {num} pallets of the {product}.\n"
            f"3. There being no other business, the meeting was closed by {chair}.\n\n"
            f"Signed: {writer}, Secretary"
        )
        return question, answer

    train = draw(make, num_train)
    return Task(name, to_examples(train), to_examples(draw(make, num_test, apart_from=train)))
