"""A package as `make package` writes it: the tasks, workflows and launch plans to register with Flyte."""

import os
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

from flyteidl.admin.launch_plan_pb2 import LaunchPlan
from flyteidl.admin.task_pb2 import TaskSpec
from flyteidl.admin.workflow_pb2 import WorkflowSpec
from flyteidl.core.interface_pb2 import VariableMap
from flyteidl.core.literals_pb2 import Literal
from flyteidl.core.tasks_pb2 import TaskTemplate
from flyteidl.core.workflow_pb2 import WorkflowTemplate

from tests.apart.literals import literal_of

REGISTRY, TAG = "example.org/forge", "abc"


def make_package(project: Path, path: Path) -> "Package":
    """Serialize a project's workflows as `make package` does, with the project's own code in this environment."""
    images = [f"--image={image}={REGISTRY}/forge-{image}:{TAG}" for image in ("pipeline", "trainer")]
    pyflyte = str(Path(sys.executable).with_name("pyflyte"))
    environment = {name: value for name, value in os.environ.items() if not name.startswith("FORGE_")}
    result = subprocess.run(
        [pyflyte, "--pkgs", "workflows", "package", *images, "--force", "--output", str(path)],
        cwd=project,
        env=environment | {"PYTHONPATH": str(project), "PYTHONDONTWRITEBYTECODE": "1"},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return Package(path)


class Package:
    """Tasks, workflows and launch plans by name."""

    def __init__(self, path: Path) -> None:
        self.tasks: dict[str, TaskTemplate] = {}
        self.workflows: dict[str, WorkflowTemplate] = {}
        self.plans: dict[str, LaunchPlan] = {}
        with tarfile.open(path) as archive:
            for member in archive.getmembers():
                file = archive.extractfile(member)
                assert file is not None
                data, kind = file.read(), member.name.removesuffix(".pb")[-1]
                if kind == "1":
                    task = TaskSpec.FromString(data).template
                    self.tasks[task.id.name] = task
                elif kind == "2":
                    workflow = WorkflowSpec.FromString(data).template
                    self.workflows[workflow.id.name] = workflow
                elif kind == "3":
                    plan = LaunchPlan.FromString(data)
                    self.plans[plan.id.name] = plan

    def resolve(self, name: str, inputs: dict[str, Any]) -> tuple[WorkflowTemplate, dict[str, Literal]]:
        """The workflow and all inputs of a launch plan. Each workflow has a launch plan with its name."""
        plan = self.plans[name]
        workflow = self.workflows[plan.spec.workflow_id.name]
        fixed, defaults = plan.spec.fixed_inputs.literals, plan.spec.default_inputs.parameters
        declared: VariableMap = workflow.interface.inputs
        given = {key: literal_of(value, declared.variables[key].type) for key, value in inputs.items()}
        assert not set(given) & set(fixed), f"{name} has fixed inputs {set(given) & set(fixed)}"
        optional = {key: value.default for key, value in defaults.items() if value.HasField("default")}
        bound = {**optional, **fixed, **given}
        assert set(bound) == set(declared.variables), f"{name} needs {set(declared.variables)}, not {set(bound)}"
        return workflow, bound
