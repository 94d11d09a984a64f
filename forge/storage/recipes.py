"""Recipes read from where they are, and validated: all that is wrong is reported at once, with its line."""

import difflib
from typing import Any

import yaml
from pydantic import ValidationError

from forge.core.errors import ForgeError, Problems
from forge.core.recipe import Recipe, Section
from forge.core.settings import load_settings, path_of, shipped
from forge.storage import s3

RECIPES = shipped("recipes")


def read_recipe(recipe: str) -> tuple[str, bytes]:
    """The name and the bytes of a recipe: a shipped one's name, a path, a file:// or s3:// URI, or the YAML itself.

    ForgeError where there is none.
    """
    if "\n" in recipe.strip() or recipe.lstrip().startswith("{"):
        return "given as YAML", recipe.encode()
    names = sorted(path.stem for path in RECIPES.glob("*.yaml"))
    if recipe in names:
        return str(RECIPES / f"{recipe}.yaml"), (RECIPES / f"{recipe}.yaml").read_bytes()
    if recipe.startswith("s3://"):
        bucket, key = s3.split(recipe)
        with s3.connect(f"recipe {recipe}", load_settings()) as client:
            data = s3.read_object(client, bucket, key)
        if data is None:
            raise ForgeError(f"recipe {recipe}: there is no such object; check the bucket and the key")
        return recipe, data
    if "://" in recipe and not recipe.startswith("file://"):
        raise ForgeError(f"recipe {recipe}: only s3:// and file:// URIs are read; copy it to one, or give its text")
    path = path_of(recipe)
    if path.is_file():
        return str(path), path.read_bytes()
    near = difflib.get_close_matches(recipe, names, 1)
    hint = f"Did you mean {near[0]}? " if near else ""
    raise ForgeError(
        f"recipe {recipe}: neither a shipped recipe nor a file here. {hint}Shipped are {', '.join(names)}. On a "
        "cluster, where your files are not, give an s3:// URI or the YAML itself"
    )


def load_recipe(recipe: str) -> Recipe:
    """Read and validate a recipe, given as `read_recipe` takes it.

    Raises ForgeError or Problems naming the file, the line and the fix for each thing that is wrong.
    """
    name, data = read_recipe(recipe)
    try:
        text = data.decode("utf-8")
        document = yaml.safe_load(text)
        lines = _lines(yaml.compose(text, Loader=yaml.SafeLoader))
    except UnicodeDecodeError as error:
        raise ForgeError(f"recipe {name}: not UTF-8 text (byte {error.start})") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{name}:{mark.line + 1}" if mark else name
        raise ForgeError(f"recipe {where}: not valid YAML: {getattr(error, 'problem', error)}") from None
    if not isinstance(document, dict):
        raise ForgeError(f"recipe {name}: must be a mapping of sections; see {RECIPES / 'tiny-cpu.yaml'}")
    try:
        return Recipe.model_validate(document)
    except ValidationError as error:
        raise Problems(
            f"The recipe {name} is wrong:", [_explain(name, finding, lines) for finding in error.errors()]
        ) from None


def _lines(node: yaml.Node | None, prefix: tuple[str, ...] = ()) -> dict[tuple[str, ...], int]:
    """Line number (from 1) of each key of a YAML document, by its path."""
    lines: dict[tuple[str, ...], int] = {}
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            here = (*prefix, str(key.value))
            if here in lines:
                raise yaml.MarkedYAMLError(
                    problem=f"{key.value} is given twice (first in line {lines[here]})", problem_mark=key.start_mark
                )
            lines[here] = key.start_mark.line + 1
            lines |= _lines(value, here)
    return lines


def _explain(name: str, finding: Any, lines: dict[tuple[str, ...], int]) -> str:
    """One of pydantic's findings as a sentence with file, line and fix."""
    loc = tuple(str(part) for part in finding["loc"])
    line = next((lines[loc[:n]] for n in range(len(loc), 0, -1) if loc[:n] in lines), None)
    where = f"{name}:{line}" if line else name
    key = ".".join(loc)
    if finding["type"] == "extra_forbidden":
        section: Any = Recipe
        for part in loc[:-1]:
            section = _section(section, part)
        known = list(section.model_fields) if section else []
        near = difflib.get_close_matches(loc[-1], known, 1)
        return f"{where}: {key}: unknown key; " + (
            f"did you mean {near[0]}?" if near else f"known are {', '.join(known)}"
        )
    if finding["type"] == "missing":
        return f"{where}: {key} is missing; add it"
    message = finding["msg"].removeprefix("Value error, ")
    got = finding["input"]
    return f"{where}: {key or 'recipe'}: {message}" + (f" (got {got!r})" if not isinstance(got, dict) else "")


def _section(section: Any, part: str) -> Any:
    """The class of a section's field, where that is itself a section."""
    if section is None or part not in section.model_fields:
        return None
    annotation = section.model_fields[part].annotation
    options = getattr(annotation, "__args__", (annotation,))
    return next((option for option in options if isinstance(option, type) and issubclass(option, Section)), None)
