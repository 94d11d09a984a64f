"""Recipes, read from files, S3 or the packaged ones, and validated: all errors are reported together, with lines."""

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
    """The name and the bytes of a recipe, which is given by its name, path, file:// or s3:// URI, or as YAML.

    Raises ForgeError if it does not exist.
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
            raise ForgeError("there is no such object", where=f"recipe {recipe}", fix="check the bucket and the key")
        return recipe, data
    if "://" in recipe and not recipe.startswith("file://"):
        raise ForgeError(
            "only s3:// and file:// URIs are read", where=f"recipe {recipe}", fix="copy it to one, or give its text"
        )
    path = path_of(recipe)
    if path.is_file():
        return str(path), path.read_bytes()
    near = difflib.get_close_matches(recipe, names, 1)
    hint = f"Did you mean {near[0]}? " if near else ""
    raise ForgeError(
        f"neither a shipped recipe nor a file here. {hint}Shipped are {', '.join(names)}",
        where=f"recipe {recipe}",
        fix="on a cluster, which cannot read your files, give an s3:// URI or the YAML itself",
    )


def load_recipe(recipe: str) -> Recipe:
    """Read and validate a recipe, given as for `read_recipe`; raises what that and `parse_recipe` raise."""
    return parse_recipe(*read_recipe(recipe))


def parse_recipe(name: str, data: bytes) -> Recipe:
    """Validate a recipe's YAML; `name` is for messages.

    Raises ForgeError or Problems with the file, the line and the fix of each error.
    """
    try:
        text = data.decode("utf-8")
        document = yaml.safe_load(text)
        lines = _lines(yaml.compose(text, Loader=yaml.SafeLoader))
    except UnicodeDecodeError as error:
        raise ForgeError(f"not UTF-8 text (byte {error.start})", where=f"recipe {name}") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{name}:{mark.line + 1}" if mark else name
        raise ForgeError(f"not valid YAML: {getattr(error, 'problem', error)}", where=f"recipe {where}") from None
    if not isinstance(document, dict):
        raise ForgeError(
            "must be a mapping of sections", where=f"recipe {name}", fix=f"see {RECIPES / 'tiny-cpu.yaml'}"
        )
    try:
        return Recipe.model_validate(document)
    except ValidationError as error:
        raise Problems(
            f"The recipe {name} is wrong:", [_explain(name, finding, lines) for finding in error.errors()]
        ) from None


def _lines(node: yaml.Node | None, prefix: tuple[str, ...] = ()) -> dict[tuple[str, ...], int]:
    """The line number (from 1) of each key of a YAML document, by its path."""
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
    """A finding of pydantic as a sentence with file, line and fix."""
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
    """The class of a field that is itself a section, or None."""
    if section is None or part not in section.model_fields:
        return None
    annotation = section.model_fields[part].annotation
    options = getattr(annotation, "__args__", (annotation,))
    return next((option for option in options if isinstance(option, type) and issubclass(option, Section)), None)
