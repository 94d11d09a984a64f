"""Changes that a machine with one disk, one process tree and one user would not notice: each shows on a cluster."""

import shutil
import time
from pathlib import Path

import pytest

from tests.apart.conftest import PIPELINE, Cluster, recipe, without
from tests.apart.flyte import Flyte
from tests.apart.manifests import Manifests
from tests.apart.pods import Pods
from tests.apart.serving import Serving

pytestmark = pytest.mark.long
Change = tuple[str, str, str]  # a file, a text in it, and what takes its place
CHECKS, SETTINGS = "tasks/preflight/checks.py", "infra/apps/homelab-production/forge/settings.yaml"
ANOTHER_REPORT: Change = ("tasks/evaluate/evaluation_files.py", "results.engine,", "results.engine + '!',")
MARKED: Change = (CHECKS, "problems: list[str] = []", 'problems: list[str] = []; print("sent code")')
# From which task on the first run is run again, up to which, and what it then says.
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
    "a quota below the shape that the settings know of": (
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
def test_it_is_caught(name: str, story: Cluster) -> None:
    changes, first, last, says = CAUGHT[name]
    _, flyte = story.changed(name.replace(" ", "-"), *changes)
    ran = flyte.recover(without(story.ran["first"], first), until=last)
    assert ran.phase == "FAILED", f"{name} was not caught"
    assert says in ran.error


def test_an_attribute_access_before_a_cached_task_is_caught(story: Cluster) -> None:
    file = "workflows/training_pipeline.py"
    for kept, data in (("HIT", "plan.data"), ("POPULATED", "plan.recipe.data")):
        _, flyte = story.changed(f"attribute-{kept}", (file, "data=plan.data,", f"data={data},"))
        for cache in ("POPULATED", kept):
            ran = flyte.run(PIPELINE, {"data_path": "", "recipe": recipe()}, until="preprocess_data")
            assert ran.phase == "STOPPED", ran.error
            assert ran.of("preprocess_data").cache == cache


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("PYTHONPATH=/home/forge/work:/opt/forge", "PYTHONPATH=/opt/forge"),
        ("WORKDIR /home/forge/work", "WORKDIR /opt/forge"),
    ],
)
def test_sent_code_that_the_image_shadows_or_has_no_place_for_is_caught(old: str, new: str, story: Cluster) -> None:
    name = new.replace("/", "-").replace(" ", "").replace("=", "")
    images, flyte = story.changed(f"images{name}", ("images/pipeline/Dockerfile", old, new))
    sent, _ = story.changed(f"sent{name}", MARKED)
    shutil.copy(story.project / ".dockerignore", sent)
    flyte = Flyte(flyte.package, Pods(images, story.services, story.folder / f"pods{name}"))
    ran = flyte.run(PIPELINE, {"data_path": "", "recipe": recipe()}, sent=sent, until="preflight")
    assert ran.phase == "FAILED" or "sent code" not in ran.of("preflight").log


@pytest.mark.parametrize("writes", [False, True])
def test_a_write_under_the_readers_policy_is_caught(writes: bool, story: Cluster) -> None:
    store, place = "s3://models/forge-new", "infra/apps/ml-inference"
    package = f"{store}/models/dates/sha256-{'0' * 64}"
    changes: list[Change] = [
        (f"{place}/vllm/settings.yaml", "FORGE_STORE: s3://models/forge\n", f"FORGE_STORE: {store}\n"),
        (f"{place}/vllm-base/desired.yaml", '"hugging-quants/Meta-Llama-3.1-70B-Instruct-AWQ-INT4",', f'"{package}",'),
    ]
    if writes:
        body = "self.bucket, self.prefix = s3.split(root)\n"
        changes.append(("forge/storage/bucket_store.py", body, f"{body}        self.put('opened', b'')\n"))
    copy, _ = story.changed(f"reader-{writes}", *changes)
    before = len(story.services.denied)
    manifests = Manifests(copy)
    manifests.__dict__["secrets"] = story.services.secrets  # the same users, with the same keys
    (story.folder / f"serving-{writes}").mkdir()
    serving = Serving(manifests, story.folder / f"serving-{writes}", story.services.urls, Path("/nowhere/python"))
    try:
        serving.start_reconciler()
        says = "AccessDenied" if writes else "is gone"
        deadline = time.monotonic() + 60
        while says not in serving.reconciler_log.read_text() and time.monotonic() < deadline:
            time.sleep(0.1)
        assert says in serving.reconciler_log.read_text()
    finally:
        serving.close()
    denied = story.services.denied[before:]
    del story.services.denied[before:]
    assert denied == ([("reader", "PutObject", "models/forge-new/opened")] * len(denied) if writes else [])
    assert bool(denied) is writes
