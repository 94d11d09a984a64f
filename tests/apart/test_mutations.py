"""Mistakes that do not show on a machine with one disk, one process tree and one user, but fail on a cluster."""

import shutil
import time
from pathlib import Path

import pytest

from tests.apart.conftest import PIPELINE, Cluster, recipe, truncated_before
from tests.apart.flyte import Flyte
from tests.apart.manifests import Manifests
from tests.apart.pods import Pods
from tests.apart.serving import Serving

pytestmark = pytest.mark.long
Change = tuple[str, str, str]  # a file, a text in it, and its replacement
CHECKS, SETTINGS = "tasks/preflight/checks.py", "infra/apps/homelab-production/forge/settings.yaml"
ANOTHER_REPORT: Change = ("tasks/evaluate/evaluation_files.py", "results.engine,", "results.engine + '!',")
MARKED: Change = (CHECKS, "problems: list[str] = []", 'problems: list[str] = []; print("sent code")')
# The changes, the first and the last task to run again, and a text in the error.
CAUGHT: dict[str, tuple[list[Change], str, str, str]] = {
    "a local path in a contract": (
        [
            ANOTHER_REPORT,
            ("forge/core/contracts.py", 'isinstance(value, str) and value.startswith("/")', "False"),
            ("tasks/evaluate/evaluate.py", 'report=f"{uri}/{REPORT}"', "report=str(store.path(uri) / REPORT)"),
        ],
        "evaluate_model",
        "register_model",
        "report.html is not in s3://models/forge",
    ),
    "a report read from the wrong pod": (
        [
            ANOTHER_REPORT,
            (
                "tasks/register/register.py",
                "str(store.path(evaluation.report))",
                'str(store.copies.root / "evaluations" / evaluation.report.split("/evaluations/")[1])',
            ),
        ],
        "evaluate_model",
        "register_model",
        "No such file or directory",
    ),
    "a missing module in an image": (
        [("images/pipeline/requirements.lock", "\nminio==", "\n# minio==")],
        "preflight",
        "preflight",
        "No module named 'minio'",
    ),
    "a setting missing from the ConfigMap": (
        [(SETTINGS, "  FORGE_MLFLOW_URI: http://mlflow.ml-platform:5000\n", "")],
        "preflight",
        "preflight",
        "lack FORGE_MLFLOW_URI",
    ),
    "a key missing from the Secret": (
        [
            (
                "infra/external.yaml",
                "s3-access-key: is pipeline, s3-secret-key: same as data-ml/minio-users/pipeline",
                "s3-access-key: is pipeline",
            )
        ],
        "preflight",
        "preflight",
        "set FORGE_S3_SECRET_KEY",
    ),
    "a quota below the shape": (
        [("infra/apps/homelab-production/namespace/quota.yaml", 'gpu: "4"', 'gpu: "1"')],
        "train_on_1x2",
        "train_on_1x2",
        "exceeded quota",
    ),
    "a quota setting below the shape": (
        [(SETTINGS, 'FORGE_GPU_QUOTA: "4"', 'FORGE_GPU_QUOTA: "1"')],
        "preflight",
        "preflight",
        "needs 2 GPUs, and the quota of this namespace allows 1",
    ),
    "a torch import in a light task": (
        [("tasks/register/task.py", "from flytekit import task\n", "import torch\nfrom flytekit import task\n")],
        "register_model",
        "register_model",
        "No module named 'torch'",
    ),
    "a task without its service account": (
        [("tasks/rollout/task.py", "rolls_out=True", "rolls_out=False")],
        "roll_out",
        "roll_out",
        "the cluster cannot be reached",
    ),
}


@pytest.mark.parametrize("name", CAUGHT)
def test_a_mutation_is_caught(name: str, used_cluster: Cluster) -> None:
    changes, first, last, message = CAUGHT[name]
    _, flyte = used_cluster.changed_copy(name.replace(" ", "-"), *changes)
    execution = flyte.recover(truncated_before(used_cluster.executions["first"], first), until=last)
    assert execution.phase == "FAILED", f"{name} was not caught"
    assert message in execution.error


def test_an_attribute_as_input_of_a_cached_task_is_caught(used_cluster: Cluster) -> None:
    file = "workflows/training_pipeline.py"
    for status, data in (("HIT", "plan.data"), ("POPULATED", "plan.recipe.data")):
        _, flyte = used_cluster.changed_copy(f"attribute-{status}", (file, "data=plan.data,", f"data={data},"))
        for expected in ("POPULATED", status):
            execution = flyte.run(PIPELINE, {"data_path": "", "recipe": recipe()}, until="preprocess_data")
            assert execution.phase == "STOPPED", execution.error
            assert execution.node("preprocess_data").cache_status == expected


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("PYTHONPATH=/home/forge/work:/opt/forge", "PYTHONPATH=/opt/forge"),
        ("WORKDIR /home/forge/work", "WORKDIR /opt/forge"),
    ],
)
def test_an_image_that_hides_or_cannot_hold_uploaded_code_is_caught(old: str, new: str, used_cluster: Cluster) -> None:
    name = new.replace("/", "-").replace(" ", "").replace("=", "")
    images, flyte = used_cluster.changed_copy(f"images{name}", ("images/pipeline/Dockerfile", old, new))
    uploaded, _ = used_cluster.changed_copy(f"uploaded{name}", MARKED)
    shutil.copy(used_cluster.project / ".dockerignore", uploaded)
    flyte = Flyte(flyte.package, Pods(images, used_cluster.services, used_cluster.folder / f"pods{name}"))
    execution = flyte.run(PIPELINE, {"data_path": "", "recipe": recipe()}, upload=uploaded, until="preflight")
    assert execution.phase == "FAILED" or "sent code" not in execution.node("preflight").log


@pytest.mark.parametrize("writes", [False, True])
def test_a_write_by_the_reader_is_caught(writes: bool, used_cluster: Cluster) -> None:
    store, folder = "s3://models/forge-new", "infra/apps/ml-inference"
    package = f"{store}/models/dates/sha256-{'0' * 64}"
    changes: list[Change] = [
        (f"{folder}/vllm/settings.yaml", "FORGE_STORE: s3://models/forge\n", f"FORGE_STORE: {store}\n"),
        (f"{folder}/vllm-base/desired.yaml", '"hugging-quants/Meta-Llama-3.1-70B-Instruct-AWQ-INT4",', f'"{package}",'),
    ]
    if writes:
        body = "self.bucket, self.prefix = s3.split(root)\n"
        changes.append(("forge/storage/bucket_store.py", body, f"{body}        self.put('opened', b'')\n"))
    copy, _ = used_cluster.changed_copy(f"reader-{writes}", *changes)
    before = len(used_cluster.services.denied)
    manifests = Manifests(copy)
    manifests.__dict__["secrets"] = used_cluster.services.secrets  # the same users, with the same keys
    (used_cluster.folder / f"serving-{writes}").mkdir()
    serving = Serving(
        manifests, used_cluster.folder / f"serving-{writes}", used_cluster.services.urls, Path("/nowhere/python")
    )
    try:
        serving.start_reconciler()
        message = "AccessDenied" if writes else "is gone"
        deadline = time.monotonic() + 60
        while message not in serving.reconciler_log.read_text() and time.monotonic() < deadline:
            time.sleep(0.1)
        assert message in serving.reconciler_log.read_text()
    finally:
        serving.close()
    denied = used_cluster.services.denied[before:]
    del used_cluster.services.denied[before:]
    assert denied == ([("reader", "PutObject", "models/forge-new/opened")] * len(denied) if writes else [])
    assert bool(denied) is writes
