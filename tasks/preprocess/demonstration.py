"""The built-in data set: convert dates in several languages to JSON.

The answer to `NL: 20 juni 1969` is `{"date":"1969-06-20"}`. Babel's CLDR data gives the spellings.
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
VERSION = 1  # increase it when the rows change


def check(recipe: Demonstration) -> None:
    """Raise ForgeError if a locale is unknown or too many rows are requested."""
    unknown = [locale for locale in recipe.locales if not babel.localedata.exists(locale)]
    if unknown:
        raise ForgeError(
            f"Babel does not know {', '.join(unknown)}",
            where="data.demonstration.locales",
            fix="use codes such as en, de, pt",
        )
    if recipe.rows > max_rows(recipe):
        raise ForgeError(
            f"only {max_rows(recipe)} rows can be drawn from these locales",
            where="data.demonstration.rows",
            fix="request fewer rows, or add locales",
        )


def max_rows(recipe: Demonstration) -> int:
    """The number of distinct rows to draw from."""
    return DAYS * len(recipe.locales) * len(FORMATS)


def digest(recipe: Demonstration) -> str:
    """Digest of the rows that `rows` yields."""
    return digest_json(["demonstration", VERSION, babel.__version__, recipe.model_dump(mode="json")])


def rows(recipe: Demonstration) -> Iterator[dict[str, Any]]:
    """Chat rows drawn with a fixed seed, grouped by date and sliced by locale; no prompt repeats."""
    rng = random.Random(20)  # noqa: S311 (sampling, no secret)
    seen: set[str] = set()
    for number in rng.sample(range(max_rows(recipe)), recipe.rows):
        day, rest = divmod(number, len(recipe.locales) * len(FORMATS))
        locale, form = recipe.locales[rest // len(FORMATS)], FORMATS[rest % len(FORMATS)]
        date = FIRST + datetime.timedelta(days=day)
        prompt = f"{locale.upper()}: {format_date(date, form, locale=locale)}"
        if prompt in seen:  # in some languages two formats are the same
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
