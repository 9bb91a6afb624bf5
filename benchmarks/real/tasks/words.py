"""Names, things, places, and numbers that the makers put into their texts."""

from __future__ import annotations

import random

FIRST = (
    "Ada", "Bruno", "Chiara", "Dmitri", "Elif", "Farid", "Greta", "Hugo", "Ines", "Jonas", "Keiko", "Liam",
    "Mira", "Nadia", "Oskar", "Priya", "Quentin", "Rosa", "Samir", "Tilda", "Uma", "Viktor", "Wanda", "Yusuf",
)  # fmt: skip
LAST = (
    "Abbott", "Bergman", "Castillo", "Dufour", "Eklund", "Ferrari", "Gupta", "Haddad", "Ivanov", "Jensen",
    "Kowalski", "Lindqvist", "Moreau", "Nakamura", "Okafor", "Petrov", "Quinn", "Rossi", "Schmidt", "Tanaka",
    "Ueda", "Vargas", "Weber", "Zhang",
)  # fmt: skip
PRODUCTS = (
    "desk lamp", "coffee grinder", "rain jacket", "wireless mouse", "yoga mat", "water kettle", "bike helmet",
    "office chair", "phone case", "sleeping bag", "blender", "backpack", "headphones", "standing desk",
    "toaster", "camping stove", "keyboard", "picture frame", "garden hose", "wall clock", "tablet stand",
    "winter boots", "notebook", "hand mixer", "air purifier",
)  # fmt: skip
COLOURS = ("black", "white", "red", "green", "blue", "grey", "yellow", "brown", "silver", "orange")
CITIES = (
    "Lisbon", "Oslo", "Leeds", "Turin", "Ghent", "Porto", "Bergen", "Lyon", "Graz", "Malmo", "Cork", "Basel",
    "Gdansk", "Seville", "Utrecht", "Tartu", "Bremen", "Split", "Brno", "Nantes",
)  # fmt: skip
COMPANIES = (
    "Northwind", "Helios Labs", "Blue Harbor", "Acme Tools", "Granite Works", "Juniper Foods", "Kestrel Air",
    "Lumen Press", "Maple Bank", "Orchid Care", "Pioneer Rail", "Silverline",
)  # fmt: skip
MONTHS = (
    "January", "February", "March", "April", "May", "June", "July", "August", "September", "October",
    "November", "December",
)  # fmt: skip
NUMBERS = ("two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")


def order_number(rng: random.Random) -> str:
    return f"{rng.choice('ABCDEFGH')}{rng.randint(1000, 9999)}"


def full_name(rng: random.Random) -> str:
    return f"{rng.choice(FIRST)} {rng.choice(LAST)}"


def fill(template: str, rng: random.Random) -> str:
    """Replace the names in braces, such as {product} or {order}, by random words."""
    return template.format(
        product=rng.choice(PRODUCTS),
        order=order_number(rng),
        name=rng.choice(FIRST),
        city=rng.choice(CITIES),
        colour=rng.choice(COLOURS),
        days=rng.randint(2, 21),
        amount=f"{rng.randint(5, 240)}.{rng.choice(('00', '50', '90', '99'))}",
        company=rng.choice(COMPANIES),
    )
