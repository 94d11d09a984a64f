"""The built-in data set: dates as people write them in several languages, to be answered with JSON.

`NL: 20 juni 1969` is to be answered `{"date":"1969-06-20"}`. The dates and their spellings come from Babel's CLDR data.
"""

import datetime
import random
from collections.abc import Iterator
from typing import Any

import babel
from babel.dates import format_date

from forge.core.digest import digest_json
from forge.core.errors import ForgeError
from forge.core.recipe import Demonstration

FIRST, DAYS = datetime.date(1950, 1, 1), 36_525  # 1950 to 2049
FORMATS = ("full", "long", "medium")
FORM = 1  # raise it when the rows change


def check(recipe: Demonstration) -> None:
    """Raise ForgeError where the recipe asks for what is not there."""
    unknown = [locale for locale in recipe.locales if not babel.localedata.exists(locale)]
    if unknown:
        raise ForgeError(
            f"data.demonstration.locales: Babel knows no {', '.join(unknown)}; use codes such as en, de, pt"
        )
    if recipe.rows > most_rows(recipe):
        raise ForgeError(
            f"data.demonstration.rows: there are {most_rows(recipe)} in so few locales; ask for fewer, or add locales"
        )


def most_rows(recipe: Demonstration) -> int:
    """How many rows there are to draw from."""
    return DAYS * len(recipe.locales) * len(FORMATS)


def digest(recipe: Demonstration) -> str:
    """Identity of the rows that `rows` yields."""
    return digest_json(["demonstration", FORM, babel.__version__, recipe.model_dump(mode="json")])


def rows(recipe: Demonstration) -> Iterator[dict[str, Any]]:
    """Chat rows, always the same ones, grouped by date and sliced by locale; no prompt twice."""
    draw = random.Random(20)  # noqa: S311 (sampling, no secret)
    seen: set[str] = set()
    for number in draw.sample(range(most_rows(recipe)), recipe.rows):
        day, rest = divmod(number, len(recipe.locales) * len(FORMATS))
        locale, form = recipe.locales[rest // len(FORMATS)], FORMATS[rest % len(FORMATS)]
        date = FIRST + datetime.timedelta(days=day)
        prompt = f"{locale.upper()}: {format_date(date, form, locale=locale)}"
        if prompt in seen:  # in some languages two formats are one
            continue
        seen.add(prompt)
        yield {
            "messages": [
                {"role": "user", "content": prompt},
                {"role": "assistant", "content": f'{{"date":"{date.isoformat()}"}}'},
            ],
            "group": date.isoformat(),
            "slice": locale,
        }
