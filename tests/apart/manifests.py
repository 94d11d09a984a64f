"""What infra/ of a project says of the cluster: its objects, its Secrets, and so the environment of a container."""

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from infra.check.secrets import make_secrets

Object = dict[str, Any]
TO_BE_GIVEN = "GIVE:"  # values that only a person can know are left out


@dataclass(frozen=True)
class Manifests:
    """The objects of a project's infra/apps. Values of Secrets are made up once, as infra/external.yaml says."""

    project: Path

    @functools.cached_property
    def objects(self) -> list[Object]:
        """All of them."""
        files = sorted((self.project / "infra" / "apps").rglob("*.yaml"))
        found = [one for file in files for one in yaml.load_all(file.read_text(), yaml.CSafeLoader)]
        return [one for one in found if isinstance(one, dict) and "metadata" in one]

    def all(self, kind: str, namespace: str) -> list[Object]:
        """Those of a kind in a namespace."""
        return [one for one in self.objects if one["kind"] == kind and one["metadata"].get("namespace") == namespace]

    def find(self, kind: str, namespace: str, name: str) -> Object:
        """One of them; LookupError where there is none."""
        for one in self.all(kind, namespace):
            if one["metadata"]["name"] == name:
                return one
        raise LookupError(f"infra/apps has no {kind} {namespace}/{name}")

    @functools.cached_property
    def secrets(self) -> dict[str, dict[str, str]]:
        """What Secrets hold, by namespace/name."""
        listed = yaml.safe_load((self.project / "infra" / "external.yaml").read_text())["external"]
        return {
            f"{one['metadata']['namespace']}/{one['metadata']['name']}": {
                key: value for key, value in one["stringData"].items() if not value.startswith(TO_BE_GIVEN)
            }
            for one in make_secrets(listed)
        }

    def environment(self, container: Object, namespace: str) -> dict[str, str]:
        """A container's variables, as a kubelet gives them; LookupError where what they are read from is not there."""
        found: dict[str, str] = {}
        for source in container.get("envFrom") or []:
            for how, reference in source.items():
                found |= self._data(how.removesuffix("Ref"), namespace, reference) or {}
        for one in container.get("env") or []:
            value = one.get("value", "")
            for how, reference in (one.get("valueFrom") or {}).items():
                value = (self._data(how.removesuffix("KeyRef"), namespace, reference) or {}).get(reference["key"])
                if value is None and not reference.get("optional"):
                    raise LookupError(f"{one['name']}: {namespace}/{reference['name']} has no key {reference['key']}")
            if value is not None:
                found[one["name"]] = value
        return found

    def _data(self, kind: str, namespace: str, reference: Object) -> dict[str, str] | None:
        """What a ConfigMap or Secret holds, None where it is not there and need not be."""
        try:
            if kind == "secret":
                return self.secrets[f"{namespace}/{reference['name']}"]
            if kind == "configMap":
                return dict(self.find("ConfigMap", namespace, reference["name"])["data"])
        except LookupError:
            if reference.get("optional"):
                return None
            raise
        raise LookupError(f"a kubelet of these tests knows no {kind}")
