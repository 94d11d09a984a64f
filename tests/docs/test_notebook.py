"""The notebook runs as committed, in its own kernel."""

import json
from collections import OrderedDict
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import nbformat
import pytest
import torch
from flyteidl.admin import execution_pb2, launch_plan_pb2, workflow_pb2
from flyteidl.core import compiler_pb2
from flyteidl.service.admin_pb2_grpc import AdminServiceServicer, add_AdminServiceServicer_to_server
from flytekit.configuration import Image, ImageConfig, SerializationSettings
from flytekit.models.task import TaskSpec
from flytekit.tools.translator import get_serializable
from nbclient import NotebookClient

from forge.core.recipe import Recipe
from forge.core.settings import Settings
from forge.storage import open_store
from tasks.evaluate.record import record_evaluation
from tests.register.packages import inputs
from workflows.launch_plans import ROWS, nightly_fine_tune

NOTEBOOK = Path(__file__).parents[2] / "docs" / "notebooks" / "first-steps.ipynb"


@pytest.fixture(autouse=True)
def _user_without_configuration(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("FLYTECTL_CONFIG", raising=False)


def run(*cells: str, replace: tuple[str, str] = ("", "")) -> dict[str, str]:
    """The output of the cells with these IDs, or of all cells, by ID, after replacing one text with another."""
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    notebook.cells = [cell for cell in notebook.cells if cell.id in cells or not cells]
    for cell in notebook.cells:
        cell.source = cell.source.replace(*replace)
    NotebookClient(notebook, timeout=120, resources={"metadata": {"path": str(NOTEBOOK.parent)}}).execute()
    return {cell.id: "".join(map(text_of, cell.outputs)) for cell in notebook.cells if cell.cell_type == "code"}


def text_of(output: Any) -> str:
    shown = output.get("data", {})
    return output.get("text", "") + shown.get("text/plain", "") + shown.get("text/html", "")


def test_it_is_committed_without_outputs() -> None:
    notebook = nbformat.read(NOTEBOOK, as_version=nbformat.NO_CONVERT)
    nbformat.validate(notebook)
    assert (notebook.nbformat, notebook.nbformat_minor, notebook.metadata.kernelspec.name) == (4, 5, "python3")
    for cell in notebook.cells:
        assert not cell.get("outputs")
        assert cell.get("execution_count") is None


def test_it_runs_without_flyte_and_mlflow(tmp_path: Path) -> None:
    shown = run()
    if torch.cuda.is_available():
        assert torch.cuda.get_device_name(0) in shown["gpus"]
    else:
        assert shown["gpus"].startswith("No GPU: this notebook has CPUs only.")
    (card_file,) = (tmp_path / "home" / "store" / "datasets").glob("sha256-*/dataset.json")
    card = json.loads(card_file.read_text())
    assert card["rows"] == 1200
    assert "{train:,} rows to train on, {heldout:,} held out".format(**card["documents"]) in shown["stage"]
    assert f"report: {card_file.with_name('report.html')}" in shown["stage"]
    assert "trained  '{" in shown["row"]
    assert "srcdoc=" in shown["report"]
    assert "&lt;h1" in shown["report"]
    assert f"there is no {tmp_path}/.flyte/config.yaml. Set FLYTECTL_CONFIG" in shown["launch"]
    assert "set FORGE_MLFLOW_URI" in shown["registry"]
    assert shown["evaluation"].startswith("No evaluation")


def test_it_shows_registered_models_and_their_evaluation(tmp_path: Path, recipe: Recipe) -> None:
    settings = Settings(home=tmp_path / "home")
    run_inputs = inputs(tmp_path, settings, recipe)
    run_inputs.register(settings)
    report = open_store(settings).path(run_inputs.evaluation.report)
    record_evaluation(settings, "dates", run_inputs.evaluation, {}, {}, report)
    shown = run("project", "stage", "report", "registry", "evaluation")
    assert "Registered models: 1" in shown["registry"]
    assert "challenger" in shown["registry"]
    assert "dates: passed: better" in shown["evaluation"]
    assert "score           0.75" in shown["evaluation"]
    assert "srcdoc=" in shown["evaluation"]


class Admin(AdminServiceServicer):
    """The part of Flyte's admin service that starts a launch plan. It knows the project's registered entities."""

    def __init__(self) -> None:
        images = ImageConfig(images=[Image(name, f"example.org/{name}", "1") for name in ("pipeline", "trainer")])
        known: OrderedDict[Any, Any] = OrderedDict()
        settings = SerializationSettings(images, "homelab", "development", "0123456789ab")
        plan = get_serializable(known, settings, nightly_fine_tune).to_flyte_idl()
        self.plan = launch_plan_pb2.LaunchPlan(id=plan.id, spec=plan.spec, closure=plan.closure)
        workflow = known[nightly_fine_tune.workflow]
        self.workflow = workflow_pb2.Workflow(id=workflow.template.id.to_flyte_idl())
        compiled = self.workflow.closure.compiled_workflow
        compiled.primary.template.CopyFrom(workflow.template.to_flyte_idl())
        for template in workflow.sub_workflows:
            compiled.sub_workflows.append(compiler_pb2.CompiledWorkflow(template=template.to_flyte_idl()))
        for task in known.values():
            if isinstance(task, TaskSpec):
                compiled.tasks.append(compiler_pb2.CompiledTask(template=task.template.to_flyte_idl()))
        self.started: list[Any] = []

    def ListLaunchPlans(self, request: Any, context: Any) -> Any:
        return launch_plan_pb2.LaunchPlanList(launch_plans=[self.plan] if request.id.name == self.plan.id.name else [])

    def GetLaunchPlan(self, request: Any, context: Any) -> Any:
        assert request.id == self.plan.id
        return self.plan

    def GetWorkflow(self, request: Any, context: Any) -> Any:
        assert request.id == self.workflow.id
        return self.workflow

    def CreateExecution(self, request: Any, context: Any) -> Any:
        self.started.append(request)
        return execution_pb2.ExecutionCreateResponse(
            id={"project": request.project, "domain": request.domain, "name": "f0123"}
        )

    def GetExecution(self, request: Any, context: Any) -> Any:
        return execution_pb2.Execution(id=request.id, spec=self.started[-1].spec)


@pytest.fixture
def admin(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Admin]:
    """An admin service, and a Flyte configuration with its address."""
    servicer, server = Admin(), grpc.server(ThreadPoolExecutor(1))
    add_AdminServiceServicer_to_server(servicer, server)
    port = server.add_insecure_port("127.0.0.1:0")
    config = tmp_path / "flyte.yaml"
    config.write_text(f"admin:\n  endpoint: dns:///127.0.0.1:{port}\n  insecure: true\n")
    monkeypatch.setenv("FLYTECTL_CONFIG", str(config))
    server.start()
    yield servicer
    server.stop(None)


def test_it_starts_nothing_by_default(admin: Admin) -> None:
    shown = run("project", "launch")
    assert f"Set LAUNCH = True to start nightly_fine_tune on {ROWS} in homelab/development." in shown["launch"]
    assert admin.started == []


def test_it_starts_the_launch_plan_and_prints_the_console_url(admin: Admin) -> None:
    shown = run("project", "launch", replace=("LAUNCH = False", "LAUNCH = True"))
    assert "/console/projects/homelab/domains/development/executions/f0123" in shown["launch"]
    (started,) = admin.started
    assert started.spec.launch_plan == admin.plan.id
    assert {name: value.scalar.primitive.string_value for name, value in started.inputs.literals.items()} == {
        "data_path": ROWS
    }
    # Flyte rejects inputs that the plan fixes.
    assert set(started.inputs.literals) <= set(nightly_fine_tune.parameters.parameters)
