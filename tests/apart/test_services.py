"""The services of the test cluster let each user do exactly what infra/ grants."""

import contextlib
import io
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import urllib3
from minio import Minio
from minio.commonconfig import CopySource
from minio.deleteobjects import DeleteObject
from minio.error import MinioException
from pydantic import SecretStr

from forge.core.errors import ForgeError
from forge.core.settings import PROJECT, Settings
from forge.serving.desired import Failed
from forge.serving.kubernetes_target import ConfigMapDocument, KubernetesServer, open_cluster
from forge.storage import open_store
from tests.apart.manifests import Manifests
from tests.apart.s3 import BUCKETS, S3, Policy, serve
from tests.apart.services import services
from tests.apart.serving import Serving
from tests.serving.fake_cluster import DOCUMENT, ENGINE, NAMESPACE, NEW, wanted, write_package
from tests.serving.models import publish, write_base

MANIFESTS = Manifests(PROJECT)
USERS = {"pipeline", "reader", "flyte", "mlflow"}
CALLS: dict[str, Callable[[Minio, str], object]] = {
    "GetObject": lambda client, bucket: client.get_object(bucket, "forge/some"),
    "PutObject": lambda client, bucket: client.put_object(bucket, "forge/new", io.BytesIO(b"new"), 3),
    "DeleteObject": lambda client, bucket: client.remove_object(bucket, "forge/new"),
    "ListBucket": lambda client, bucket: list(client.list_objects(bucket)),
    "GetBucketLocation": lambda client, bucket: client._execute("GET", bucket, query_params={"location": ""}),
    "ListBucketMultipartUploads": lambda client, bucket: client._list_multipart_uploads(bucket),
    "AbortMultipartUpload": lambda client, bucket: client._abort_multipart_upload(bucket, "forge/some", "1"),
    "ListMultipartUploadParts": lambda client, bucket: client._list_parts(bucket, "forge/some", "1"),
}


@pytest.fixture(scope="module")
def s3(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3]:
    """The S3 server, with an object in each bucket."""
    directory = tmp_path_factory.mktemp("s3")
    with serve(MANIFESTS, directory) as server:
        for bucket in BUCKETS:
            (directory / bucket / "forge").mkdir()
            (directory / bucket / "forge" / "some").write_text("some")
        yield server


def denied(call: Callable[[], object]) -> bool:
    """Whether a call is denied. It may fail for another reason."""
    try:
        call()
    except MinioException as error:
        return "AccessDenied" in str(error)
    return False


def changed_manifests(folder: Path, file: str, *changes: tuple[str, str]) -> Manifests:
    """The manifests with some texts replaced in a file."""
    shutil.copytree(PROJECT / "infra", folder / "infra")
    path = folder / "infra" / file
    for before, after in changes:
        assert before in path.read_text()
        path.write_text(path.read_text().replace(before, after))
    return Manifests(folder)


# --- S3


@pytest.mark.parametrize(
    ("user", "bucket", "allowed"),
    [
        ("pipeline", "models", CALLS.keys() - {"ListMultipartUploadParts"}),
        ("pipeline", "datasets", {"GetObject", "ListBucket", "GetBucketLocation"}),
        ("pipeline", "mlflow", set()),
        ("reader", "models", {"GetObject", "ListBucket", "GetBucketLocation"}),
        ("reader", "datasets", set()),
        ("flyte", "flyte", {"GetObject", "PutObject", "DeleteObject", "ListBucket", "GetBucketLocation"}),
        ("flyte", "models", set()),
        ("mlflow", "mlflow", {"GetObject", "PutObject", "DeleteObject", "ListBucket", "GetBucketLocation"}),
        ("mlflow", "models", set()),
    ],
)
def test_users_may_do_what_their_policies_allow(s3: S3, user: str, bucket: str, allowed: set[str]) -> None:
    client = s3.client(user)
    s3.denied.clear()
    assert {name for name, call in CALLS.items() if not denied(lambda call=call: call(client, bucket))} == allowed  # type: ignore[misc]
    assert {name for _, name, _ in s3.denied} == CALLS.keys() - allowed
    assert {(who, resource.partition("/")[0]) for who, _, resource in s3.denied} <= {(user, bucket)}


def test_a_permission_on_a_folder_covers_only_that_folder(s3: S3) -> None:
    client = s3.client("reader")
    client.put_object("models", "forge/leases/one", io.BytesIO(b"1"), 1)
    assert denied(lambda: client.put_object("models", "forge/identity", io.BytesIO(b"1"), 1))
    assert s3.denied[-1] == ("reader", "PutObject", "models/forge/identity")


def test_a_copy_needs_read_permission_on_its_source(s3: S3) -> None:
    for bucket, is_denied in (("models", False), ("mlflow", True)):
        copy = CopySource(bucket, "forge/some")
        assert denied(lambda copy=copy: s3.client("pipeline").copy_object("models", "forge/copy", copy)) == is_denied  # type: ignore[misc]


def test_a_bulk_delete_needs_permission_for_each_object(s3: S3) -> None:
    for name in ("forge/leases/two", "forge/some"):
        is_denied = denied(lambda name=name: list(s3.client("reader").remove_objects("models", [DeleteObject(name)])))  # type: ignore[misc]
        assert is_denied == (name == "forge/some")


def test_large_objects_and_unusual_names_arrive_intact(s3: S3) -> None:
    data = bytes(range(256)) * (12 << 12)
    s3.client("pipeline").put_object("models", "ü ~+ä/x", io.BytesIO(data), len(data), part_size=5 << 20)
    assert s3.client("reader").get_object("models", "ü ~+ä/x").data == data


def test_unknown_users_are_denied(s3: S3) -> None:
    endpoint = s3.url.removeprefix("http://")
    assert denied(lambda: Minio(endpoint, secure=False, region="us-east-1").get_object("models", "forge/some"))
    stranger = Minio(endpoint, "reader", "wrong", secure=False, region="us-east-1")
    with pytest.raises(MinioException, match="SignatureDoesNotMatch"):
        stranger.get_object("models", "forge/some")


def test_policies_come_from_the_project(tmp_path: Path) -> None:
    manifests = changed_manifests(tmp_path, "apps/data-ml/minio/policies.yaml", ('"s3:PutObject", ', ""))
    with serve(manifests, tmp_path / "s3") as s3:
        client = s3.client("pipeline")
        assert denied(lambda: CALLS["PutObject"](client, "models"))
        assert not denied(lambda: CALLS["ListBucket"](client, "models"))


def test_wildcards_and_denials_follow_aws() -> None:
    def statement(action: str, resource: str, effect: str = "Allow") -> dict:
        return {"Effect": effect, "Action": action, "Resource": [f"arn:aws:s3:::{resource}"]}

    policy = Policy([statement("s3:Get*", "models/a?/*"), statement("s3:*", "models/ab/no", "Deny")])
    assert policy.allows(("GetObject", "models/ab/c/d"))
    assert not policy.allows(("PutObject", "models/ab/c"))
    assert not policy.allows(("GetObject", "models/abc/d"))
    assert not policy.allows(("GetObject", "models/ab/no"))
    with pytest.raises(AssertionError, match="Condition"):
        Policy([statement("s3:*", "*") | {"Condition": {}}])


# --- Secrets


def test_secrets_match() -> None:
    users, tasks = MANIFESTS.secrets["data-ml/minio-users"], MANIFESTS.secrets["homelab-production/forge-secrets"]
    assert users.keys() == USERS
    assert tasks == {"s3-access-key": "pipeline", "s3-secret-key": users["pipeline"]}, (
        "values to be filled in are left out"
    )
    container = MANIFESTS.find("Deployment", NAMESPACE, "vllm-reconciler")["spec"]["template"]["spec"]["containers"][0]
    environment = MANIFESTS.environment(container, NAMESPACE)
    assert environment["FORGE_S3_SECRET_KEY"] == users["reader"]
    assert environment["FORGE_STORE"] == "s3://models/forge"
    assert "HF_TOKEN" not in environment


def test_a_missing_key_or_setting_is_an_error(tmp_path: Path) -> None:
    manifests = changed_manifests(
        tmp_path, "external.yaml", ("s3-secret-key: same as data-ml/minio-users/reader, ", "")
    )
    container = MANIFESTS.find("Deployment", NAMESPACE, "vllm-reconciler")["spec"]["template"]["spec"]["containers"][0]
    with pytest.raises(LookupError, match="forge-secrets has no key s3-secret-key"):
        manifests.environment(container, NAMESPACE)
    with pytest.raises(LookupError, match="no ConfigMap elsewhere/forge-settings"):
        manifests.environment({"envFrom": [{"configMapRef": {"name": "forge-settings"}}]}, "elsewhere")


# --- the API server


@contextlib.contextmanager
def serving_of(manifests: Manifests, folder: Path, vllm: str = "") -> Iterator[Serving]:
    """The namespace of vLLM without a reconciler; `vllm` is a script that stands in for vLLM."""
    python = folder / "python"
    python.write_text(f"#!/bin/sh\n{vllm}\n")
    python.chmod(0o755)
    (folder / "serving").mkdir()
    serving = Serving(manifests, folder / "serving", {}, python)
    try:
        yield serving
    finally:
        serving.close()


def document_of(serving: Serving, account: tuple[str, str], monkeypatch: pytest.MonkeyPatch) -> ConfigMapDocument:
    """The document of what should be served, as a ServiceAccount opens it."""
    monkeypatch.setenv("KUBECONFIG", str(serving.kubeconfig(*account)))
    return ConfigMapDocument(open_cluster(patience=0), NAMESPACE, DOCUMENT)


def rollout_account(manifests: Manifests) -> tuple[str, str]:
    """The ServiceAccount that rolls out."""
    subject = manifests.find("RoleBinding", NAMESPACE, "forge-rollout")["subjects"][0]
    return subject["namespace"], subject["name"]


def test_accounts_may_do_what_their_roles_allow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with serving_of(MANIFESTS, tmp_path) as serving:
        document = document_of(serving, rollout_account(MANIFESTS), monkeypatch)
        desired, revision = document.read()
        assert desired.generation == serving.desired()["generation"]
        document.write(desired.model_copy(update={"generation": 7}), revision)
        assert serving.desired()["generation"] == 7
        with pytest.raises(ForgeError, match='cannot get resource "deployments"'):
            document.cluster.get("deployments", NAMESPACE, "vllm")
        with pytest.raises(ForgeError, match='"another" is forbidden'):
            document.cluster.get("configmaps", NAMESPACE, "another")
        with pytest.raises(ForgeError, match='in the namespace "elsewhere"'):
            document.cluster.get("configmaps", "elsewhere", DOCUMENT)
        reconciler = document_of(serving, (NAMESPACE, "vllm-reconciler"), monkeypatch)
        assert reconciler.cluster.find("pods", NAMESPACE, {"any": "label"}) == []
        with pytest.raises(ForgeError, match="cannot get resource"):
            document_of(serving, ("homelab-production", "default"), monkeypatch).read()
        with pytest.raises(LookupError, match="ServiceAccount homelab-production/nobody"):
            serving.kubeconfig("homelab-production", "nobody")
        monkeypatch.setenv("KUBECONFIG", str(serving.server.kubeconfig(tmp_path / "kubeconfig", "no token")))
        with pytest.raises(ForgeError, match="401"):
            open_cluster().get("configmaps", NAMESPACE, DOCUMENT)


def test_roles_come_from_the_project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    manifests = changed_manifests(tmp_path, "apps/ml-inference/vllm/rbac.yaml", ("verbs: [get, patch]", "verbs: [get]"))
    with serving_of(manifests, tmp_path) as serving:
        document = document_of(serving, rollout_account(manifests), monkeypatch)
        desired, revision = document.read()
        with pytest.raises(ForgeError, match="cannot patch resource"):
            document.write(desired, revision)


# --- vLLM and the reconciler


def ensure_until(server: KubernetesServer, package: str, condition: Callable[[str], bool]) -> None:
    """Repeat `ensure` until what it waits for meets a condition."""
    deadline = time.monotonic() + 60
    while not condition(server.ensure(NEW, package, ENGINE)):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def server_of(serving: Serving, monkeypatch: pytest.MonkeyPatch) -> KubernetesServer:
    """vLLM's Deployment, as the reconciler controls it."""
    cluster = document_of(serving, (NAMESPACE, "vllm-reconciler"), monkeypatch).cluster
    return KubernetesServer(cluster, NAMESPACE, "vllm", serving.vllm_url)


def test_a_vllm_that_exits_is_a_crashing_container(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with serving_of(MANIFESTS, tmp_path, 'echo "not a model: $*"; exit 3') as serving:
        server, package = server_of(serving, monkeypatch), write_package(tmp_path)
        with pytest.raises(Failed, match=f"not a model: -m vllm.* --host 127.0.0.1 .*--model {package}"):
            ensure_until(server, package, lambda reason: False)


def test_deleting_a_pod_ends_its_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with serving_of(MANIFESTS, tmp_path, "env; ls $PYTHONPATH; sleep 600") as serving:
        server, package = server_of(serving, monkeypatch), write_package(tmp_path)
        ensure_until(server, package, lambda reason: "forge" in serving.api.log.splitlines())
        node = serving.folder / "node" / "var" / "lib" / "forge"
        assert f"SERVED_NAMES={node}/serving/names.json" in serving.api.log, "where the reconciler writes it"
        assert serving.vllm is not None
        process = serving.vllm.process
        server.stop()
        assert process.wait(60) != 0


@pytest.mark.long
def test_the_reconciler_serves_a_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with services(PROJECT, tmp_path / "services") as running:
        settings = Settings(
            home=tmp_path / "home",
            store="s3://models/forge",
            s3_endpoint=running.urls["http://minio.data-ml:30063"],
            s3_access_key=SecretStr("pipeline"),
            s3_secret_key=SecretStr(running.secrets["homelab-production/forge-secrets"]["s3-secret-key"]),
        )
        base = publish(open_store(settings), write_base(tmp_path / "base"), "dates", 1)
        document = document_of(running.serving, rollout_account(MANIFESTS), monkeypatch)
        desired, revision = document.read()
        document.write(wanted(base, desired.generation + 1), revision)
        deadline = time.monotonic() + 300
        while ask(f"{running.serving.reconciler_url}/status")["names"] != {"dates": base.versioned}:
            assert time.monotonic() < deadline, running.serving.reconciler_log.read_text()
            time.sleep(0.5)
        question = {"model": "dates", "prompt": "NL: 20 juni 1969", "max_tokens": 4, "temperature": 0}
        url = running.urls["http://vllm.ml-inference.svc:8000"]
        assert ask(f"{url}/v1/completions", question)["model"] == base.versioned
        assert running.denied == []


def ask(url: str, body: dict | None = None) -> dict:
    """The JSON that a server responds with."""
    return dict(urllib3.request("POST" if body else "GET", url, json=body, timeout=60).json())
