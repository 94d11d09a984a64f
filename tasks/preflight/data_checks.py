"""Checks of the rows."""

from forge.cluster.gpus import on_cluster
from forge.core.errors import ForgeError
from forge.core.recipe import DataRecipe
from forge.core.settings import path_of
from forge.models.chat_format import ChatFormat
from tasks.preprocess.sample import check_source
from tasks.preprocess.sources import DEMONSTRATION, digest_source, pin


def absolute_uri(source: str) -> str:
    """A local path as an absolute file:// URI; other sources unchanged."""
    if source in ("", DEMONSTRATION) or ("://" in source and not source.startswith("file://")):
        return source
    return path_of(source).expanduser().absolute().as_uri()


def check_data(recipe: DataRecipe, form: ChatFormat | None = None) -> tuple[DataRecipe, str]:
    """Check the sources and the first rows of each file; returns the recipe with pinned sources, and their digest.

    `form` is the base model's, if it is known.
    """
    sources = {name: getattr(recipe, name) for name in ("source", "heldout_source")}
    for source in sources.values():
        if on_cluster() and source.startswith("file://"):
            raise not_shared("data", str(path_of(source)))
    sample = check_source(recipe, recipe.source, form)
    if recipe.heldout_source:
        sample = check_source(recipe, recipe.heldout_source, form)
    if sample.row_format == "text":
        raise ForgeError(
            "plain texts contain no answers that can be scored",
            where=f"data {recipe.heldout_source or recipe.source}",
            fix="give conversations in data.heldout_source",
        )
    if not sample.scorable:
        raise ForgeError(
            "no row has an answer that can be scored: all end with a tool call, with reasoning or with an answer of "
            "weight 0",
            where=f"data {recipe.heldout_source or recipe.source}",
            fix="name other rows in data.heldout_source",
        )
    recipe = recipe.model_copy(update={name: pin(recipe, source)[0] for name, source in sources.items() if source})
    return recipe, digest_source(recipe)


def not_shared(what: str, path: str) -> ForgeError:
    """The error for a path on a cluster, which only the pod of preflight would have."""
    return ForgeError(
        "is a path, and the pods of a cluster share no disk",
        where=f"{what} {path}",
        fix="copy it to the store and give its s3:// URI, or use one on the Hugging Face Hub",
    )
