"""A project's infra/: the objects of the cluster, its Secrets, and the environment that a container gets."""

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from infra.check.secrets import make_secrets

Object = dict[str, Any]
PLACEHOLDER = "GIVE:"  # begins a value that an operator must supply; such values are left out


@dataclass(frozen=True)
class Manifests:
    """The objects of a project's infra/apps. Secrets get generated values, as infra/external.yaml defines."""

    project: Path

    @functools.cached_property
    def objects(self) -> list[Object]:
        """All objects."""
        files = sorted((self.project / "infra" / "apps").rglob("*.yaml"))
        found = [item for file in files for item in yaml.load_all(file.read_text(), yaml.CSafeLoader)]
        return [item for item in found if isinstance(item, dict) and "metadata" in item]

    def all(self, kind: str, namespace: str) -> list[Object]:
        """The objects of a kind in a namespace."""
        return [
            item for item in self.objects if item["kind"] == kind and item["metadata"].get("namespace") == namespace
        ]

    def find(self, kind: str, namespace: str, name: str) -> Object:
        """One object; raises LookupError if there is none."""
        for item in self.all(kind, namespace):
            if item["metadata"]["name"] == name:
                return item
        raise LookupError(f"infra/apps has no {kind} {namespace}/{name}")

    @functools.cached_property
    def secrets(self) -> dict[str, dict[str, str]]:
        """The content of Secrets, by namespace/name."""
        listed = yaml.safe_load((self.project / "infra" / "external.yaml").read_text())["external"]
        return {
            f"{secret['metadata']['namespace']}/{secret['metadata']['name']}": {
                key: value for key, value in secret["stringData"].items() if not value.startswith(PLACEHOLDER)
            }
            for secret in make_secrets(listed)
        }

    def environment(self, container: Object, namespace: str) -> dict[str, str]:
        """A container's variables, as a kubelet sets them; raises LookupError if a source or key is missing."""
        found: dict[str, str] = {}
        for source in container.get("envFrom") or []:
            for kind, reference in source.items():
                found |= self._data(kind.removesuffix("Ref"), namespace, reference) or {}
        for variable in container.get("env") or []:
            value = variable.get("value", "")
            for kind, reference in (variable.get("valueFrom") or {}).items():
                value = (self._data(kind.removesuffix("KeyRef"), namespace, reference) or {}).get(reference["key"])
                if value is None and not reference.get("optional"):
                    raise LookupError(
                        f"{variable['name']}: {namespace}/{reference['name']} has no key {reference['key']}"
                    )
            if value is not None:
                found[variable["name"]] = value
        return found

    def _data(self, kind: str, namespace: str, reference: Object) -> dict[str, str] | None:
        """The content of a ConfigMap or Secret; None if it is optional and missing."""
        try:
            if kind == "secret":
                return self.secrets[f"{namespace}/{reference['name']}"]
            if kind == "configMap":
                return dict(self.find("ConfigMap", namespace, reference["name"])["data"])
        except LookupError:
            if reference.get("optional"):
                return None
            raise
        raise LookupError(f"{kind} is not supported as a source of variables")
