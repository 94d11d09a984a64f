"""The values that stages pass on contain nothing that only one machine has."""

import importlib
import typing
from collections.abc import Iterator
from pathlib import Path, PurePath
from typing import Any

import pytest
from flytekit import PythonFunctionTask
from flytekit.types.error.error import FlyteError
from pydantic import BaseModel, ValidationError

from forge.core.contracts import Artifact, Contract, Dataset
from forge.core.recipe import Section

TASKS = sorted(path for path in (Path(__file__).parents[2] / "tasks").glob("*/task.py"))
PLAIN = (str, int, float, bool, type(None), FlyteError)


def task_types() -> Iterator[tuple[str, Any]]:
    """The type of each input and output of each task."""
    for path in TASKS:
        stage = importlib.import_module(f"tasks.{path.parent.name}.task")
        for task in vars(stage).values():
            if isinstance(task, PythonFunctionTask):
                for name, kind in {**task.python_interface.inputs, **task.python_interface.outputs}.items():
                    yield f"{task.name}: {name}", kind


def parts(kind: Any) -> Iterator[Any]:
    """A type and the types of its parts."""
    if inner := typing.get_args(kind):
        for one in inner if typing.get_origin(kind) is not typing.Annotated else inner[:1]:
            if one is not Ellipsis and typing.get_origin(kind) is not typing.Literal:
                yield from parts(one)
        return
    yield kind
    if isinstance(kind, type) and issubclass(kind, BaseModel):
        for field in kind.model_fields.values():
            yield from parts(field.annotation)


def test_no_task_has_an_input_or_output_type_with_a_path() -> None:
    found = {kind: where for where, whole in task_types() for kind in parts(whole)}
    for kind, where in found.items():
        assert isinstance(kind, type), f"{where}: {kind}"
        assert not issubclass(kind, PurePath), where
        assert issubclass(kind, (Contract, Section, *PLAIN)), f"{where}: {kind}"
    assert Dataset in found
    assert len([kind for kind in found if issubclass(kind, Contract)]) >= 8


@pytest.mark.parametrize("field", ["uri", "digest", "store", "report"])
def test_a_path_in_a_contract_is_an_error(field: str) -> None:
    values = {"uri": "s3://models/x", "digest": "d", "store": "s", "report": "s3://models/x/report.html"}
    rows = {"train_rows": 1, "heldout_rows": 1}
    assert Dataset(**values, **rows).report == "s3://models/x/report.html"
    with pytest.raises(ValidationError, match=f"{field} is the path /var/lib/forge/x"):
        Dataset(**{**values, field: "/var/lib/forge/x"}, **rows)
    with pytest.raises(ValidationError, match="other machines don't have"):
        Artifact(uri="/x", digest="d", store="s")
