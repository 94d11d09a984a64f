"""Whatever a recipe's file holds, it is a recipe or one clear error."""

import json
from typing import Any

import yaml
from hypothesis import strategies as st

from forge.core.errors import ForgeError
from forge.core.recipe import Recipe
from forge.storage.recipes import RECIPES, parse_recipe
from tests.preprocess.fuzzing import ABSENT, changed, cut_or_spliced, fuzz

SHIPPED = [path.read_text() for path in sorted(RECIPES.glob("*.yaml"))]
BOMB = "a0: &a0 [x]\n" + "".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 12))
MERGES = "b0: &b0 {x: 1}\n" + "".join(f"b{n}: &b{n} {{<<: [*b{n - 1}, *b{n - 1}]}}\n" for n in range(1, 30))
SNIPPETS = [
    "&a ", "*a", "&a {b: *a}", "&a [*a]", "<<: *a\n", "<<: {x: 1}\n", "!!int x", "!!bool x", "!!float x",
    "!!timestamp x", "!!timestamp 2024-01-01", "!!python/object/apply:os.system [ls]", "!!set {a, b}", "!!binary AAA=",
    "!!omap [a: 1]", "!<tag:yaml.org,2002:int> ''", "!local x", "? [a, b]\n: c\n", "? {a: b}\n: c\n", "? \n", "\t",
    "%YAML 9.9\n---\n", "---\n", "...\n", "- ", "[" * 2000, "{" * 2000, "- " * 2000, "a: " * 50, "[" * 400 + "]" * 400,
    "\x00", "\x85", "\u2028", "\ufeff", '"\\ud83d"', '"\\ud83d": 1\n', "'\\ud83d'", "9" * 5000, "0x" + "f" * 9000,
    "-0b" + "1" * 9000, "1" + ":59" * 3000, ".inf", "-.inf", ".nan", "1e999", "1:30", "010", "2024-13-45", "2024-01-01",
    "2024-01-01T25:61:61Z", "~", "null", "yes", "no", "=", "|\n", ">9\n", "|-99\n", "'", '"', "#", "@", "`",
    "{a: 1, a: 2}", "name: x\n", "data: {}\n", "x" * 70_000, "\n" * 3000, BOMB, MERGES, f"{BOMB}name: *a11\n",
    f"{BOMB}data: {{source: *a11}}\n",
]  # fmt: skip
CHECKS = [
    {"kind": "regex", "pattern": "(" * 3000 + ")" * 3000},
    {"kind": "regex", "pattern": "a{99999999999}"},
    {"kind": "number", "tolerance": 1e308},
]
ATOMS: list[Any] = [
    ABSENT, None, True, False, 0, 1, -1, 0.5, 1e308, float("inf"), float("nan"), 2**63, 10**40, "", " ", "x", "10",
    "9" * 5000, "1e999", "\ud83d", "\x00", [], {}, [[]], [{}], {"a": 1}, [None], {1: 2}, {None: 1}, *CHECKS,
]  # fmt: skip
NEW = st.sampled_from(ATOMS) | st.integers() | st.floats() | st.text(max_size=6)
MUTATED = st.lists(st.tuples(st.integers(0, 60), NEW), min_size=1, max_size=3)
SPLICED = st.lists(
    st.tuples(
        st.integers(0, 2000),
        st.integers(0, 30),
        st.sampled_from(SNIPPETS).map(lambda text: text.encode("utf-8")) | st.binary(max_size=4),
    ),
    max_size=3,
)


@st.composite
def files(draw: st.DrawFn) -> bytes:
    text = draw(st.sampled_from(SHIPPED))
    document = yaml.safe_load(text)
    for place, atom in draw(MUTATED) if draw(st.booleans()) else ():
        document = changed(document, place, atom)
        text = yaml.safe_dump(document) if draw(st.booleans()) else json.dumps(document, skipkeys=True)
    data = text.encode(draw(st.sampled_from(["utf-8"] * 9 + ["utf-16", "utf-8-sig"])), "surrogatepass")
    for place, size, new in draw(SPLICED) if draw(st.booleans()) else ():
        data = cut_or_spliced(data, place, size, new)
    return data


def check_file(data: bytes) -> None:
    try:
        recipe = parse_recipe("r.yaml", data)
    except ForgeError as error:
        assert "r.yaml" in error.message
        assert len(error.message.encode()) < 200_000
    else:
        assert Recipe.model_validate_json(recipe.model_dump_json()) == recipe


def test_any_file_is_a_recipe_or_a_clear_error() -> None:
    fuzz(check_file, files(), 60)
