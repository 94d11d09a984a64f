"""Every object is valid by its schema: Kubernetes' own, those of custom resources, and charts' values."""

import functools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate

from infra.check.tree import Object, Tree, key, load, name_of

KUBERNETES = "1.34"  # the version of k3s
NO_SCHEMA = "there is no schema for"
SCHEMAS = Path(__file__).parent.parent / "schemas"
CORE = ("", ".k8s.io")  # suffixes of Kubernetes' own API groups, except for CUSTOM
CUSTOM = ("gateway.networking.k8s.io", "x-k8s.io")
# Mappings in charts' values whose keys the user chooses.
FREE = {
    "annotations", "labels", "nodeSelector", "podAnnotations", "podLabels", "matchLabels", "extraFiles", "config",
    "inline", "data", "env", "extraEnv", "extraConfig", "resources", "limits", "requests", "securityContext",
    "podSecurityContext", "containerSecurityContext", "affinity", "additionalLabels", "grafana.ini",
    "volumeClaimTemplate", "default-for-task-types", "kubespawner_override",
}  # fmt: skip


def check_schemas(tree: Tree) -> Iterator[str]:
    """What is invalid in the forge cluster's and studio's objects."""
    for where, one in [*tree.objects, *(("infra/studio", one) for one in tree.studio)]:
        for finding in invalid(json.dumps(one, sort_keys=True, default=str)):
            yield f"{name_of(where, one)}: {finding}"
    for release in tree.releases.values():
        for finding in _values(tree, release):
            yield f"HelmRelease {key(release)}: {finding}"


@functools.cache
def invalid(text: str) -> tuple[str, ...]:
    """What is wrong with an object, given as JSON."""
    one = json.loads(text)
    version, kind = str(one.get("apiVersion")), str(one.get("kind"))
    group = version.rpartition("/")[0]
    if not (one.get("metadata") or {}).get("name"):
        return ("it has no name",)
    file = SCHEMAS / "crds" / f"{group}_{kind.lower()}_{version.rpartition('/')[2]}.json"
    if file.is_file():
        found = [f"{_path(error)}: {error.message}" for error in _schema(file).iter_errors(one)]
        return (*found, *_templates(one))
    try:
        kubernetes_validate.validate(one, KUBERNETES, strict=True)
    except kubernetes_validate.ValidationError as error:
        return (f"{_path(error)}: {error.message}",)
    except Exception as error:  # it raises various errors if it has no schema
        return (f"{NO_SCHEMA} {version} {kind} ({error}); add it to infra/schemas/crds",)
    return ()


def _path(error: Any) -> str:
    return ".".join(str(part) for part in error.path) or "the object"


@functools.cache
def _schema(file: Path) -> jsonschema.Draft202012Validator:
    schema = json.loads(file.read_text())
    whole: Object = {name: {} for name in ("apiVersion", "kind", "metadata")}  # some schemas leave these out
    schema["properties"] = {**whole, **schema["properties"]}
    return jsonschema.Draft202012Validator(_strict(schema))


def _strict(schema: Any) -> Any:
    """Convert an OpenAPI schema to JSON Schema that rejects the fields which an API server would silently drop."""
    if isinstance(schema, list):
        return [_strict(one) for one in schema]
    if not isinstance(schema, dict):
        return schema
    made = {name: _strict(one) for name, one in schema.items() if name != "properties"}
    if isinstance(schema.get("properties"), dict):
        made["properties"] = {name: _strict(one) for name, one in schema["properties"].items()}
        if not schema.get("x-kubernetes-preserve-unknown-fields") and schema.get("type") == "object":
            made.setdefault("additionalProperties", False)
    if schema.get("nullable") and isinstance(schema.get("type"), str):
        made["type"] = [schema["type"], "null"]
    if schema.get("x-kubernetes-embedded-resource"):
        made.pop("additionalProperties", None)
    for name in ("default", "format", "nullable", "example"):
        made.pop(name, None)
    return made


def _templates(one: Object) -> Iterator[str]:
    """What is wrong with the pod templates within a custom resource."""
    for role, part in ((one.get("spec") or {}).get("pytorchReplicaSpecs") or {}).items():
        template = {"apiVersion": "v1", "kind": "PodTemplate", "metadata": {"name": "x"}, "template": part["template"]}
        for finding in invalid(json.dumps(template, sort_keys=True)):
            yield f"spec.pytorchReplicaSpecs.{role}.{finding}"


def _values(tree: Tree, release: Object) -> Iterator[str]:
    """Values of a release that its chart does not have."""
    chart = next((one for one in tree.lists["versions"] if one.get("release") == key(release)), None)
    if chart is None:
        return  # reported by references.py
    values = release["spec"].get("values") or {}
    file = SCHEMAS / "charts" / f"{chart['schema']}.yaml"
    if not file.is_file():
        yield f"infra/schemas/charts/{chart['schema']}.yaml is missing: the chart's default values"
        return
    defaults = load(file.read_text())[0]
    for part, subchart in (chart.get("subcharts") or {}).items():
        more = load((SCHEMAS / "charts" / f"{subchart}.yaml").read_text())[0]
        defaults[part] = merge(more, defaults.get(part) or {})
    yield from _unknown(values, defaults, "", set(chart.get("also") or []))
    schema = file.with_suffix(".schema.json")
    if schema.is_file():
        for error in jsonschema.Draft202012Validator(json.loads(schema.read_text())).iter_errors(
            merge(defaults, values)
        ):
            yield f"values.{_path(error)}: {error.message[:200]}"


def merge(below: Any, above: Any) -> Any:
    """Merge values as Helm does: mappings key by key, everything else replaced."""
    if not isinstance(below, dict) or not isinstance(above, dict):
        return above
    return {**below, **{name: merge(below.get(name), value) for name, value in above.items()}}


def _unknown(values: Object, defaults: Object, path: str, also: set[str]) -> Iterator[str]:
    """Keys that a chart's default values do not have, and values of another type than the default.

    `also` lists paths that its templates read although the defaults lack them.
    """
    for name, value in values.items():
        here = f"{path}.{name}" if path else name
        default = defaults.get(name)
        if here in also or name in FREE:
            continue
        if name not in defaults:
            yield f"values.{here}: the chart has no such value"
        elif isinstance(value, dict) and default:
            if isinstance(default, dict):
                yield from _unknown(value, default, here, also)
            else:
                yield f"values.{here}: the chart has {json.dumps(default)} there, not a mapping"
        elif isinstance(default, dict) and default and value is not None and not isinstance(value, dict):
            yield f"values.{here}: the chart has a mapping there, not {json.dumps(value)}"
