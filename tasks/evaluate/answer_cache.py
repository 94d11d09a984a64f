"""Answers are kept in the store by what gave them and what was asked, so that no model answers the same twice."""

from dataclasses import asdict, astuple, fields

import pyarrow as pa
import torch
import transformers
from pyarrow import parquet

from forge.core.digest import digest_json
from forge.core.errors import ForgeError
from forge.core.recipe import EvaluationRecipe
from forge.core.settings import Settings
from forge.registry.packages import LocalBase
from forge.serving.vllm_environment import NO_VLLM, vllm_release
from forge.storage import Store
from tasks.evaluate.answer import Answer, Tell, answer_with_transformers, devices_here
from tasks.evaluate.ask import ask_all
from tasks.evaluate.items import Item

FORM = 1  # raise it when an engine's answers change
FILE = "answers.parquet"


def answers_of(
    of: LocalBase,
    digest: str,
    items: list[Item],
    recipe: EvaluationRecipe,
    store: Store,
    settings: Settings,
    engine: str,
    tell: Tell,
) -> list[Answer]:
    """A model's answers to items: those kept, or new ones, which are then kept.

    They are found by the model's digest, the tokens it is given, and what answers, its release included.
    """
    asked = ask_all(of, items)
    drawn = [recipe.samples, recipe.temperature] if recipe.samples else []
    key = digest_json([FORM, digest, [astuple(one) for one in asked], recipe.max_new_tokens, drawn, engine])
    place = f"answers/sha256-{key}"
    if store.exists(place):
        answers = read_answers(store, store.uri(place))
        tell(len(answers))
        return answers
    if engine.startswith("vllm"):
        from tasks.evaluate import vllm_engine

        answers = vllm_engine.answer_with_vllm(of, asked, recipe, settings, tell)
    else:
        answers = answer_with_transformers(of, asked, recipe, devices_here(), tell)
    with store.stage() as staged:
        table = pa.Table.from_pylist([asdict(answer) for answer in answers])
        parquet.write_table(table, staged / FILE, compression="zstd")
        store.publish(staged, "answers", key)
    return answers


def read_answers(store: Store, uri: str) -> list[Answer]:
    """Answers that were kept."""
    rows = parquet.read_table(store.path(uri) / FILE, columns=[field.name for field in fields(Answer)]).to_pylist()
    return [Answer(**{**row, "samples": tuple(row["samples"])}) for row in rows]


def chosen_engine(recipe: EvaluationRecipe, settings: Settings) -> str:
    """What answers here, with its release: the engine that will serve, where both have a GPU, else transformers.

    Raises ForgeError where the recipe asks for vLLM, and it is not installed.
    """
    ours = f"transformers {transformers.__version__}, torch {torch.__version__}"
    if recipe.engine == "transformers" or (recipe.engine == "auto" and devices_here() == ["cpu"]):
        return ours
    installed = vllm_release(settings.serving_python)
    if recipe.engine == "auto":
        return installed if installed.startswith("vllm ") else ours  # not the CPU's build
    if not installed:
        raise ForgeError(f"evaluation.engine vllm: {NO_VLLM.format(settings.serving_python)}")
    return installed
