"""The stand-in for Flyte and its pods do what Flyte does, on a small package."""

import shutil
import signal
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from flyteidl.core.literals_pb2 import Literal, LiteralCollection, Primitive, Scalar
from flyteidl.core.tasks_pb2 import TaskTemplate
from minio import Minio

from tests.apart.flyte import Flyte, is_named
from tests.apart.images import Image
from tests.apart.literals import cache_key, rotated
from tests.apart.manifests import Manifests
from tests.apart.package import make_package
from tests.apart.pods import Interrupt, Pods
from tests.storage.servers import KEY, SECRET, client_of, rclone

pytestmark = pytest.mark.long  # the long tests of this folder are what needs them
FORGE = Path(__file__).parents[2]
SMALL = '''
import os
import sys
import time
from pathlib import Path
from typing import Annotated, NamedTuple

from flytekit import Cache, HashMethod, PodTemplate, Resources, conditional, dynamic, map_task, task, workflow
from flytekit.exceptions.user import FlyteRecoverableException
from flytekit.types.error.error import FlyteError
from kubernetes import client
from pydantic import BaseModel

from workflows.origin import ORIGIN

IMAGE = {"container_image": "example.org/forge/forge-pipeline:abc"}


def template(**more):
    container = client.V1Container(
        name="primary",
        env_from=[client.V1EnvFromSource(config_map_ref=client.V1ConfigMapEnvSource(name="forge-settings"))],
        env=[client.V1EnvVar(name="FORGE_GPUS", value="2")],
    )
    return PodTemplate(primary_container_name="primary", pod_spec=client.V1PodSpec(containers=[container], **more))


class Part(BaseModel):
    size: int
    share: float = 0.5
    words: list[str] = []


class Plan(BaseModel):
    name: str
    part: Part


class Made(NamedTuple):
    plan: Plan
    part: Annotated[Part, HashMethod(lambda part: str(part.size))]
    size: int


@task(**IMAGE)
def make(size: int) -> Made:
    part = Part(size=size, words=[str(time.time())])
    return Made(Plan(name="it", part=part), part, size)


@task(cache=Cache(version="1"), **IMAGE)
def by_attribute(part: Part) -> int:
    return part.size


@task(cache=Cache(version="1"), **IMAGE)
def by_whole(part: Part) -> int:
    return part.size


@workflow
def caching(size: int) -> tuple[int, int]:
    made = make(size=size)
    return by_attribute(part=made.plan.part), by_whole(part=made.part)


@task(**IMAGE)
def square(number: int, plus: int) -> int:
    return number * number + plus


@task(**IMAGE)
def add(numbers: list[int]) -> int:
    return sum(numbers)


@dynamic(**IMAGE)
def spread(size: int) -> int:
    from functools import partial
    return add(numbers=map_task(partial(square, plus=1))(number=list(range(size))))


@workflow
def spreading(size: int = 2) -> int:
    return spread(size=size)


@task(retries=1, **IMAGE)
def flaky(fails: int) -> int:
    attempt = int(os.environ["FLYTE_ATTEMPT_NUMBER"])
    print("attempt", attempt, flush=True)
    if attempt < fails:
        raise FlyteRecoverableException("not yet")
    return attempt


@task(**IMAGE)
def cleanup(fails: int, err: FlyteError | None = None) -> None:
    print("cleanup of", err.failed_node_id, "not yet" in err.message)


@task(**IMAGE)
def quick() -> int:
    return 7


@workflow(on_failure=cleanup)
def failing(fails: int) -> int:
    first = quick()
    second = flaky(fails=fails)
    return conditional("many").if_(second == first).then(quick()).elif_(second == 1).then(flaky(fails=0)).else_().fail(
        "neither")


@task(**IMAGE)
def slow() -> str:
    print("working", flush=True)
    if os.environ["FLYTE_ATTEMPT_NUMBER"] == "0":
        time.sleep(60)
    return "done"


@task(pod_template=template(service_account_name="forge-rollout"), secret_requests=[], **IMAGE)
def inspect_pod(modules: list[str]) -> dict[str, str]:
    found = {name: value for name, value in os.environ.items()}
    for name in modules:
        try:
            __import__(name)
        except ImportError as error:
            found[name] = str(error)
    found["home"] = str(sorted(os.listdir(os.environ["HOME"])))
    (Path(os.environ["HOME"]) / "mine").write_text("x")
    found["origin"] = ORIGIN
    found["path"] = str(sys.path)
    return found


@workflow
def inspecting(modules: list[str]) -> dict[str, str]:
    return inspect_pod(modules=modules)


@workflow
def slowly() -> str:
    return slow()


@task(**IMAGE)
def write() -> None:
    (Path(__file__).parent / "mine.py").write_text("x")


@workflow
def writing() -> None:
    write()


@task(pod_template=template(automount_service_account_token=False), requests=Resources(gpu="5"), **IMAGE)
def large() -> None:
    pass


@workflow
def requesting() -> None:
    large()


@task(retries=1, **IMAGE)
def outputs_and_error() -> int:
    """Leave an error next to the outputs, like a job that was suspended and then resumed in the same attempt."""
    if os.environ["FLYTE_ATTEMPT_NUMBER"] == "0":
        from flyteidl.core.errors_pb2 import ContainerError, ErrorDocument
        from flytekit import FlyteContextManager
        prefix = sys.argv[sys.argv.index("--output-prefix") + 1]
        error = ErrorDocument(error=ContainerError(message="stopped", kind=ContainerError.RECOVERABLE))
        Path("error.pb").write_bytes(error.SerializeToString())
        FlyteContextManager.current_context().file_access.put_data("error.pb", f"{prefix}/error.pb")
    return 1


@workflow
def leaving() -> int:
    return outputs_and_error()
'''

JOB = """
import os

import torch
from flytekit import task, workflow
from flytekitplugins.kfpytorch import Elastic


@task(task_config=Elastic(nnodes=2, nproc_per_node=1, increase_shared_mem=False, monitor_interval=0.1),
      container_image="example.org/forge/forge-trainer:abc")
def join() -> int:
    torch.distributed.init_process_group("gloo")
    number = torch.ones(1)
    torch.distributed.all_reduce(number)
    return int(number)


@workflow
def joining() -> int:
    return join()
"""


@dataclass
class S3Only:
    """The only service that these pods need: an S3 server."""

    url: str
    urls: dict[str, str] = field(default_factory=dict)
    secrets: dict[str, dict[str, str]] = field(default_factory=dict)

    def s3(self, user: str) -> Minio:
        """A client of the server, the same for all users."""
        return client_of(self.url)

    def kubeconfig(self, namespace: str, account: str) -> Path:
        """A path that shows the account; there is no file."""
        return Path(f"/{namespace}/{account}")


def small_project(project: Path) -> Path:
    """A project with the small package, and everything else from Forge."""
    project.mkdir()
    for name in ("images", "infra", "recipes"):
        (project / name).symlink_to(FORGE / name)
    for name in ("forge", "tasks", "workflows"):
        (project / name).mkdir()
        (project / name / "__init__.py").touch()
    (project / "workflows" / "small.py").write_text(SMALL)
    (project / "workflows" / "job.py").write_text(JOB)
    (project / "workflows" / "origin.py").write_text('ORIGIN = "image"\n')
    return project


@pytest.fixture(scope="module")
def flyte(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Flyte]:
    folder = tmp_path_factory.mktemp("apart")
    project = small_project(folder / "project")
    (folder / "s3").mkdir()
    with rclone(folder / "s3") as url:
        services = S3Only(url, dict.fromkeys(SERVICES, url), Manifests(FORGE).secrets)
        credentials = {"FLYTE_AWS_ACCESS_KEY_ID": KEY, "FLYTE_AWS_SECRET_ACCESS_KEY": SECRET}
        services.secrets["homelab-production/flyte-task-storage"] = credentials
        services.s3("flyte").make_bucket("flyte")
        yield Flyte(make_package(project, folder / "package.tgz"), Pods(project, services, folder / "pods"))


SERVICES = (
    "http://minio.data-ml:30063",
    "http://mlflow.ml-platform:5000",
    "http://vllm.ml-inference:8000",
    "http://vllm-reconciler.ml-inference:8001",
)
NAME = "workflows.small."


def test_the_cache_misses_on_an_attribute_and_hits_on_a_hash(flyte: Flyte) -> None:
    first, second = (flyte.run(NAME + "caching", {"size": 3}) for _ in range(2))
    assert (first.phase, second.phase) == ("SUCCEEDED", "SUCCEEDED"), first.error + second.error
    assert first.cache_status() == {"n1": "POPULATED", "n2": "POPULATED"}
    assert second.cache_status() == {"n1": "POPULATED", "n2": "HIT"}
    assert second.value("o0") == second.value("o1") == 3
    assert second.node("by_whole").attempts == 0


@pytest.mark.parametrize("code", ["image", "uploaded"])
def test_dynamic_tasks_and_map_tasks_run(flyte: Flyte, code: str) -> None:
    execution = flyte.run(NAME + "spreading", upload=flyte.pods.project / "workflows" if code == "uploaded" else None)
    assert execution.phase == "SUCCEEDED", execution.error
    assert execution.value() == 3
    assert [run.value() for path, run in execution.nodes.items() if is_named("square", path, run)] == [1, 2]
    assert execution.node("add").phase == "SUCCEEDED"
    spread = execution.node("spread")
    assert spread.attempts == 1
    assert spread.job is not None
    assert {task.container.args[0] == "pyflyte-fast-execute" for task in spread.job.tasks} == {code == "uploaded"}


def test_recoverable_errors_are_retried_and_conditions_choose_a_branch(flyte: Flyte) -> None:
    execution = flyte.run(NAME + "failing", {"fails": 1})
    assert execution.phase == "SUCCEEDED", execution.error
    assert execution.nodes["n1"].attempts == 2
    assert execution.nodes["n1"].log.count("attempt 1") == 1
    assert {path: run.phase for path, run in execution.nodes.items()} == {
        "n0": "SUCCEEDED", "n1": "SUCCEEDED", "n2": "SUCCEEDED", "n2/n0": "SKIPPED", "n2/n1": "SUCCEEDED",
    }  # fmt: skip
    neither = flyte.run(NAME + "failing", {"fails": 0})
    assert (neither.phase, neither.error) == ("FAILED", "neither")


def test_a_failure_node_runs_once_and_is_recovered(flyte: Flyte) -> None:
    failed = flyte.run(NAME + "failing", {"fails": 3})
    assert failed.phase == "FAILED"
    assert "not yet" in failed.error
    assert failed.nodes["n1"].attempts == 2
    assert "cleanup of n1 True" in failed.node("cleanup").log
    recovery = flyte.recover(failed)
    assert recovery.phase == "FAILED"
    assert {path: run.phase for path, run in recovery.nodes.items()} == {
        "n0": "RECOVERED", "n1": "FAILED", "fn0": "RECOVERED",
    }  # fmt: skip
    assert recovery.node("cleanup").log == ""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_task_is_retried_when_its_pod_is_killed(flyte: Flyte, number: int) -> None:
    execution = flyte.run(NAME + "slowly", interrupt={"slow": Interrupt("working", number)})
    assert (execution.phase, execution.node("slow").attempts) == ("SUCCEEDED", 2), execution.error
    assert execution.value() == "done"


def test_an_error_next_to_outputs_counts(flyte: Flyte) -> None:
    execution = flyte.run(NAME + "leaving")
    assert (execution.phase, execution.node("outputs_and_error").attempts) == ("SUCCEEDED", 2), execution.error


def test_a_pod_has_only_its_image_and_its_environment(flyte: Flyte, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORGE_MINE", "1")
    absent = ["torch", "pytest", "moto", "vllm", "tests", "hypothesis"]
    for _ in range(2):
        execution = flyte.run(NAME + "inspecting", {"modules": [*absent, "minio", "mlflow", "transformers"]})
        assert execution.phase == "SUCCEEDED", execution.error
        found = execution.value()
        assert "mine" not in found["home"], "each pod has a home directory of its own"
    for name in absent:
        assert "No module named" in found[name]
    assert not {"minio", "mlflow", "transformers", "FORGE_MINE", "VIRTUAL_ENV", "PYTEST_VERSION"} & set(found)
    assert found["origin"] == "image"
    assert str(FORGE) not in found["path"]
    assert found["FORGE_STORE"] == "s3://models/forge"
    assert found["FORGE_S3_ENDPOINT"] == found["FLYTE_AWS_ENDPOINT"] == flyte.pods.services.urls[SERVICES[0]]
    assert found["FORGE_GPUS"] == "0"
    assert found["KUBECONFIG"] == "/homelab-production/forge-rollout"


def test_uploaded_code_replaces_that_of_the_image(flyte: Flyte, tmp_path: Path) -> None:
    uploaded = tmp_path / "uploaded"
    shutil.copytree(flyte.pods.project / "workflows", uploaded / "workflows")
    (uploaded / "workflows" / "origin.py").write_text('ORIGIN = "uploaded"\n')
    execution = flyte.run(NAME + "inspecting", {"modules": []}, upload=uploaded)
    assert execution.phase == "SUCCEEDED", execution.error
    assert execution.value()["origin"] == "uploaded"


def test_writes_into_the_image_and_requests_over_quota_fail(flyte: Flyte) -> None:
    written = flyte.run(NAME + "writing")
    assert (written.phase, written.node("write").attempts) == ("FAILED", 1)
    assert written.error == "PermissionError: user 1000 may not write /opt/forge/workflows/mine.py, which the image has"
    large = flyte.run(NAME + "requesting")
    assert (large.phase, large.node("large").attempts) == ("FAILED", 1)
    assert "exceeded quota: gpus, requested: requests.nvidia.com/gpu=5" in large.error


def test_the_workers_of_a_job_find_each_other(flyte: Flyte) -> None:
    execution = flyte.run("workflows.job.joining")
    assert execution.phase == "SUCCEEDED", execution.error
    assert execution.value() == 2


def test_only_the_trainer_image_has_torch(tmp_path: Path) -> None:
    for name, code in (("pipeline", 1), ("trainer", 0)):
        image = Image(FORGE, name, tmp_path / name)
        command = [tmp_path / name / "opt/venv/bin/python", "-c", "import transformers; import torch"]
        result = subprocess.run(command, env={}, cwd=tmp_path, capture_output=True, text=True)
        assert result.returncode == code, result.stderr
        assert "torch" in result.stderr or code == 0
        assert image.undo_writes() == []


def literal(text: str, hashed: str = "") -> Literal:
    return Literal(scalar=Scalar(primitive=Primitive(string_value=text)), hash=hashed)


def test_a_cache_key_uses_hashes_or_else_bytes() -> None:
    task = TaskTemplate()
    task.metadata.cache_ignore_input_vars.append("ignored")

    def keys(*values: Literal, **more: Literal) -> set[str]:
        return {cache_key(task, {"counted": value, **more}) for value in values}

    def collection(*values: Literal) -> Literal:
        return Literal(collection=LiteralCollection(literals=values))

    assert len(keys(literal("a", "x"), literal("b", "x"), literal("b", "x"))) == 1
    assert len(keys(literal("a"), literal("b"), literal("a", "x"))) == 3
    assert len(keys(collection(literal("a", "x")), collection(literal("b", "x")))) == 1
    assert len(keys(collection(literal("a")), collection(literal("a"), literal("a")))) == 2
    assert keys(literal("a"), ignored=literal("b")) == keys(literal("a"), ignored=literal("c"))


def test_the_keys_of_nested_maps_are_rotated() -> None:
    value = {"a": 1, "b": [{"c": 2, "d": {"e": 3, "f": 4}}]}
    assert rotated(value, 1) == value
    assert str(rotated(value, 1)) == "{'b': [{'d': {'f': 4, 'e': 3}, 'c': 2}], 'a': 1}"
