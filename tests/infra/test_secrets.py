"""Generated Secrets are complete and consistent, and none is in git unencrypted."""

import json
import re
import subprocess
from typing import Any

import yaml

from forge.core.settings import PROJECT
from infra.check.secrets import make_secrets
from infra.check.tree import Tree, key, read_lists


def by_name() -> dict[str, dict[str, str]]:
    """The generated Secrets by namespace/name."""
    secrets = make_secrets(read_lists(PROJECT / "infra", [])["external"])
    return {f"{one['metadata']['namespace']}/{one['metadata']['name']}": one["stringData"] for one in secrets}


def test_shared_passwords_are_equal() -> None:
    made = by_name()
    users, postgres = made["data-ml/minio-users"], made["ml-platform/postgres"]
    assert len({*users.values(), *postgres.values()}) == len(users) + len(postgres)
    assert all(re.fullmatch("[A-Za-z0-9]{32}", value) for value in (*users.values(), *postgres.values()))
    assert made["homelab-production/forge-secrets"]["s3-secret-key"] == users["pipeline"]
    assert made["ml-inference/forge-secrets"]["s3-secret-key"] == users["reader"]
    assert made["ml-platform/flyte-database"]["password"] == postgres["flyte-password"]
    assert made["ml-platform/mlflow-database"] == {"username": "mlflow", "password": postgres["mlflow-password"]}
    flyte = yaml.safe_load(made["ml-platform/flyte-storage"]["200-storage.yaml"])["storage"]["stow"]["config"]
    assert (flyte["access_key_id"], flyte["secret_key"]) == ("flyte", users["flyte"])


def test_values_are_new_each_time() -> None:
    assert by_name()["data-ml/minio-users"] != by_name()["data-ml/minio-users"]


def test_values_that_cannot_be_generated_are_marked() -> None:
    given = {f"{name}/{key}" for name, one in by_name().items() for key, value in one.items() if value[:5] == "GIVE:"}
    assert "homelab-production/forge-secrets/hf-token" in given
    assert not any("same as" in value or "<" in value for one in by_name().values() for value in one.values())


def test_no_unencrypted_secret_is_in_git() -> None:
    for path in (PROJECT / "infra").rglob("*.yaml"):
        for one in yaml.safe_load_all(path.read_text()):
            if isinstance(one, dict) and one.get("kind") == "Secret":
                assert "sops" in one, path


def test_each_store_user_has_a_policy_and_a_key(tree: Tree) -> None:
    found = next(one["data"] for _, one in tree.of("ConfigMap") if one["metadata"]["name"] == "minio-policies")
    policies = {name.removesuffix(".json"): json.loads(text) for name, text in found.items() if name.endswith(".json")}
    assert set(policies) == set(by_name()["data-ml/minio-users"])
    script = found["set-up.sh"]
    subprocess.run(["sh", "-n"], input=script, text=True, check=True)
    assert set(re.findall(r"for user in ([a-z ]+);", script)[0].split()) == set(policies)
    buckets = set(re.findall(r"for bucket in ([a-z ]+);", script)[0].split())
    for name, policy in policies.items():
        for statement in policy["Statement"]:
            assert {one.removeprefix("arn:aws:s3:::").partition("/")[0] for one in statement["Resource"]} <= buckets
            assert not any("*" in action or "DeleteBucket" in action for action in statement["Action"]), name


def test_reconciler_writes_only_leases_and_tasks_cannot_change_data_sets(tree: Tree) -> None:
    data = {key(one): one["data"] for _, one in tree.of("ConfigMap")}
    policies = {name: json.loads(text) for name, text in data["data-ml/minio-policies"].items() if ".json" in name}
    store = data["ml-inference/forge-settings"]["FORGE_STORE"].removeprefix("s3://")
    assert written(policies["reader.json"]) == {f"arn:aws:s3:::{store}/leases/*"}
    assert written(policies["pipeline.json"]) == {"arn:aws:s3:::models/*", "arn:aws:s3:::flyte/*"}


def written(policy: dict[str, Any]) -> set[str]:
    """The resources that a policy allows its user to write or delete."""
    return {
        one
        for statement in policy["Statement"]
        if {"s3:PutObject", "s3:DeleteObject"} & {*statement["Action"]}
        for one in statement["Resource"]
    }
