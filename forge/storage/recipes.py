"""Recipes, read from files, S3 or the packaged ones, and validated: all errors are reported together, with lines."""

import difflib
import reprlib
from typing import Any

import yaml
from pydantic import ValidationError

from forge.core.errors import ForgeError, Problems, printable
from forge.core.recipe import Recipe, Section
from forge.core.settings import load_settings, path_of, shipped
from forge.storage import s3

RECIPES = shipped("recipes")
EXAMPLE = f"see {RECIPES / 'tiny-cpu.yaml'}"
MAX_SIZE = 64 << 10  # bytes
MAX_VALUES = 10_000
MAX_DEPTH = 50
TAG = "tag:yaml.org,2002:"
TAGS = {TAG + name for name in ("str", "int", "float", "bool", "null", "seq", "map")}


def read_recipe(recipe: str) -> tuple[str, bytes]:
    """The name and the bytes of a recipe, which is given by its name, path, file:// or s3:// URI, or as YAML.

    Raises ForgeError if it does not exist.
    """
    if "\n" in recipe.strip() or recipe.lstrip().startswith("{"):
        return "given as YAML", recipe.encode("utf-8", "surrogatepass")
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
    try:
        if path.is_file():
            return str(path), path.read_bytes()
    except OSError as error:
        raise ForgeError(
            f"cannot be read ({error.strerror})", where=f"recipe {path}", fix="check the path and its permissions"
        ) from None
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
    where = f"recipe {name}"
    if len(data) > MAX_SIZE:
        raise ForgeError(f"{len(data):,} bytes are too many for a recipe", where=where, fix=EXAMPLE)
    try:
        node = yaml.compose(data.decode("utf-8"), Loader=_Loader)
        lines = _lines(node)
        document = None if node is None else _Loader("").construct_document(node)
    except UnicodeDecodeError as error:
        raise ForgeError(f"not UTF-8 text (byte {error.start + 1})", where=where, fix="save it as UTF-8") from None
    except RecursionError:
        raise ForgeError("not valid YAML: nested too deeply", where=where, fix=EXAMPLE) from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{where}:{mark.line + 1}" if mark else where
        problem = getattr(error, "problem", None) or str(error).partition("\n")[0]
        raise ForgeError(f"not valid YAML: {printable(problem)}", where=where) from None
    if not isinstance(document, dict):
        raise ForgeError("must be a mapping of sections", where=where, fix=EXAMPLE)
    try:
        return Recipe.model_validate(document)
    except ValidationError as error:
        raise Problems(
            f"The recipe {name} is wrong:", [_explain(name, finding, lines) for finding in error.errors()]
        ) from None


class _Loader(yaml.SafeLoader):
    """Reads the scalars, lists and mappings of JSON: dates are texts, and what no recipe needs is an error."""

    yaml_implicit_resolvers = {  # noqa: RUF012
        first: [(tag, pattern) for tag, pattern in resolvers if tag != f"{TAG}timestamp"]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        if node.tag not in TAGS:
            raise _wrong(f"{node.tag.replace(TAG, '!!')} is not read; remove it", node)
        try:
            value = super().construct_object(node, deep)
        except (ValueError, LookupError):  # such as "!!int x", or too many digits
            raise _wrong(f"not {node.tag.replace(TAG, 'of type ')}", node) from None
        if isinstance(value, int) and value.bit_length() > 63:
            raise _wrong("the number is out of range", node)
        return value


def _wrong(problem: str, node: yaml.Node) -> yaml.MarkedYAMLError:
    return yaml.MarkedYAMLError(problem=problem, problem_mark=node.start_mark)


def _lines(root: yaml.Node | None) -> dict[tuple[str, ...], int]:
    """The line number (from 1) of each key of a YAML document, by its path.

    Raises YAMLError if a key is given twice or is no text, or the document is too large with its aliases written out.
    """
    lines: dict[tuple[str, ...], int] = {}
    waiting: list[tuple[yaml.Node, tuple[str, ...]]] = [] if root is None else [(root, ())]
    count = 0
    while waiting:
        node, prefix = waiting.pop()
        count += 1
        if len(prefix) > MAX_DEPTH:
            raise _wrong("nested too deeply", node)
        if count > MAX_VALUES:
            raise _wrong(f"more than {MAX_VALUES:,} values are too many for a recipe", node)
        if isinstance(node, yaml.ScalarNode) and node.value != printable(node.value):
            raise _wrong("the text holds half a character (a lone surrogate)", node)
        if isinstance(node, yaml.SequenceNode):
            waiting += [(entry, (*prefix, str(number))) for number, entry in enumerate(node.value)]
        if not isinstance(node, yaml.MappingNode):
            continue
        for key, value in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise _wrong("a key must be a word", key)
            here = (*prefix, key.value)
            if here in lines:
                raise _wrong(f"{key.value} is given twice (first in line {lines[here]})", key)
            lines[here] = key.start_mark.line + 1
            waiting += [(key, here), (value, here)]
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
    fix = "; put it in quotes" if finding["type"] == "string_type" and isinstance(got, int | float) else ""
    shown = "" if isinstance(got, dict) else f" (got {reprlib.repr(got)})"
    return f"{where}: {key or 'recipe'}: {message}{shown}{fix}"


def _section(section: Any, part: str) -> Any:
    """The class of a field that is itself a section, or None."""
    if section is None or part not in section.model_fields:
        return None
    annotation = section.model_fields[part].annotation
    options = getattr(annotation, "__args__", (annotation,))
    return next((option for option in options if isinstance(option, type) and issubclass(option, Section)), None)
