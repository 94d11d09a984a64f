"""What tasks are told on the cluster is what the manifests have there."""

from urllib.parse import urlsplit

import pytest

from infra.check.tree import Tree, key
from tasks.pods import CHECKPOINTS, METRICS, PRIORITY, SECRETS, SETTINGS, VARIABLES
from tasks.settings import load_settings

DOMAINS = ("development", "staging", "production")


@pytest.mark.parametrize("domain", DOMAINS)
def test_settings_are_those_that_there_are_and_lead_to_services(
    tree: Tree, domain: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = {key(one): one["data"] for _, one in tree.of("ConfigMap")}[f"homelab-{domain}/{SETTINGS}"]
    for name, value in found.items():
        monkeypatch.setenv(name, value)
    settings = load_settings()  # raises for one that is unknown, or wrong
    assert settings.metrics_port == METRICS
    services = {(key(one), port["port"]) for _, one in tree.services for port in one["spec"]["ports"]}
    urls = [settings.s3_endpoint, settings.mlflow_uri, settings.serving_url, settings.reconciler_url]
    for url in urls:
        name, namespace = str(urlsplit(url).hostname).split(".")
        assert (f"{namespace}/{name}", urlsplit(url).port) in services


@pytest.mark.parametrize("domain", DOMAINS)
def test_what_pods_of_tasks_name_is_there(tree: Tree, domain: str) -> None:
    assert f"homelab-{domain}/{CHECKPOINTS}" in {key(one) for _, one in tree.of("PersistentVolumeClaim")}
    assert PRIORITY in {one["metadata"]["name"] for _, one in tree.of("PriorityClass")}
    keys = {f"{one['namespace']}/{one['name']}": set(one["keys"]) for one in tree.lists["external"]}
    assert keys[f"homelab-{domain}/{SECRETS}"] == set(VARIABLES)
    ports = [pod.ports for pod in tree.pods if pod.namespace == f"homelab-{domain}"]
    assert ports == [{"metrics": METRICS}]


def test_serving_goes_before_training_and_training_before_notebooks(tree: Tree) -> None:
    values = {one["metadata"]["name"]: one["value"] for _, one in tree.of("PriorityClass")}
    assert values["forge-serving"] > values["forge-training"] > 0 > values["forge-notebooks"]
