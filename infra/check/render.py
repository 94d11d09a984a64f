"""`python -m infra.check.render FOLDER`: render the charts with Helm, and compare them with infra/charts.yaml.

Run it after upgrading a chart. FOLDER holds clones of the repositories, as for infra/check/vendor.py. Pods that
operators create from custom resources, and what Linkerd injects (`made_by` in the list), are not in any chart.
"""

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from infra.check.schemas import KUBERNETES, NO_SCHEMA, SCHEMAS, invalid
from infra.check.tree import WORKLOADS, Object, Tree, at, load, name_of, read_tree
from infra.check.vendor import clone_of

LEVEL = "pod-security.kubernetes.io/enforce"
PARTIALS = "charts/partials"  # Linkerd's library chart, used by its other charts


def main() -> int:
    """Print each difference on a line."""
    parser = argparse.ArgumentParser(prog="python -m infra.check.render", description=__doc__)
    parser.add_argument("folder", type=Path, help="clones, as OWNER+NAME")
    clones = parser.parse_args().folder
    if shutil.which("helm") is None:
        parser.error("helm is missing: https://helm.sh/docs/intro/install/")
    tree, found = read_tree(Path(__file__).parent.parent), 0
    with tempfile.TemporaryDirectory(prefix="forge-charts-") as folder:
        for chart in tree.lists["versions"]:
            if "release" in chart:
                objects = render(tree, chart, clones, Path(folder) / chart["schema"])
                print(f"{chart['release']} {chart['version']}: {len(objects)} objects")
                for finding in differences(tree, chart["release"], objects):
                    print(f"  {finding}")
                    found += 1
    return 1 if found else 0


def render(tree: Tree, chart: Object, clones: Path, folder: Path) -> list[Object]:
    """The objects that a release's chart renders from its values; subcharts that are not vendored are left out."""
    sources = {one["file"]: one for one in yaml.safe_load((SCHEMAS / "sources.yaml").read_text())["sources"]}
    source = sources[f"charts/{chart['schema']}.yaml"]
    place = check_out(source, str(Path(source["path"]).parent), clones, folder)
    about = yaml.safe_load((place / "Chart.yaml").read_text())
    dependencies = {one["name"] for one in about.pop("dependencies", [])}
    if (place / "requirements.yaml").is_file():
        dependencies |= {one["name"] for one in load((place / "requirements.yaml").read_text())[0]["dependencies"]}
    for name in dependencies & {*(chart.get("subcharts") or {}), "partials"}:
        of = sources[f"charts/{chart['subcharts'][name]}.yaml"] if name in (chart.get("subcharts") or {}) else source
        path = PARTIALS if name == "partials" else str(Path(of["path"]).parent)
        shutil.copytree(check_out(of, path, clones, folder / name), place / "charts" / name, dirs_exist_ok=True)
        cut(place / "charts" / name)
    cut(place)
    namespace, release = chart["release"].split("/")
    values = folder / "values.yaml"
    values.write_text(yaml.safe_dump(tree.releases[chart["release"]]["spec"].get("values") or {}))
    command = ["helm", "template", release, str(place), "--namespace", namespace, "--values", str(values)]
    command += ["--kube-version", f"{KUBERNETES}.0", "--api-versions", "monitoring.coreos.com/v1", "--skip-crds"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{chart['release']}: Helm rejects it: {done.stderr.strip()}")
    return [one for one in load(done.stdout) if one]


def check_out(source: dict[str, Any], path: str, clones: Path, folder: Path) -> Path:
    """Extract a folder of a repository at a source's ref."""
    folder.mkdir(parents=True)
    archive = ["git", "-C", str(clone_of(source, clones)), "archive", source["ref"], path]
    files = subprocess.run(archive, capture_output=True, check=True).stdout
    subprocess.run(["tar", "-x", "-C", str(folder)], input=files, check=True)
    return folder / path


def cut(place: Path) -> None:
    """Remove a chart's dependencies, and give it a valid version: some charts only get theirs when released."""
    about = yaml.safe_load((place / "Chart.yaml").read_text())
    about |= {"version": "0.0.0", "dependencies": []}
    (place / "Chart.yaml").write_text(yaml.safe_dump(about))
    for name in ("requirements.yaml", "requirements.lock", "Chart.lock"):
        (place / name).unlink(missing_ok=True)


def differences(tree: Tree, release: str, objects: list[Object]) -> Iterator[str]:
    """What an API server would reject, and what differs from infra/charts.yaml."""
    for one in objects:
        for finding in invalid(json.dumps(one, sort_keys=True, default=str)):
            if not finding.startswith(NO_SCHEMA):
                yield f"{name_of(release, one)}: {finding}"
    templates = {}
    for one in objects:
        if one["kind"] in WORKLOADS:
            spec = one["spec"]["jobTemplate"]["spec"] if one["kind"] == "CronJob" else one["spec"]
            templates[f"{one['kind']} {one['metadata']['name']}"] = spec["template"]
    namespace = release.split("/")[0]
    levels = {one["metadata"]["name"]: one["metadata"].get("labels", {}).get(LEVEL) for _, one in tree.of("Namespace")}
    for name, template in templates.items():
        if levels.get(namespace) == "restricted":
            yield from (f"{name}: {finding}" for finding in refused(template["spec"]))
    listed: Object = next((chart for chart in tree.lists["charts"] if chart["release"] == release), {})
    for pod in listed.get("pods", []):
        if "made_by" in pod:
            continue
        hits = [one for one in templates.values() if pod["labels"].items() <= one["metadata"].get("labels", {}).items()]
        if not hits:
            yield f"{pod['name']}: no pod template has the labels {pod['labels']}"
        for one in hits:
            ports = [port for container in one["spec"]["containers"] for port in container.get("ports", [])]
            has = {port.get("name", str(port["containerPort"])): port["containerPort"] for port in ports}
            if not pod.get("ports", {}).items() <= has.items():
                yield f"{pod['name']}: its ports are {has}, not {pod['ports']}"


def refused(spec: Object) -> Iterator[str]:
    """Why Pod Security's level `restricted` rejects a pod."""
    above = spec.get("securityContext") or {}
    for one in [*spec.get("initContainers", []), *spec["containers"]]:
        own = one.get("securityContext") or {}
        if own.get("allowPrivilegeEscalation") is not False:
            yield f"{one['name']}: allowPrivilegeEscalation is not false"
        if at(own, "capabilities.drop") != ["ALL"]:
            yield f"{one['name']}: capabilities do not drop ALL"
        if not own.get("runAsNonRoot", above.get("runAsNonRoot")):
            yield f"{one['name']}: runAsNonRoot is not true"
        if not (own.get("seccompProfile") or above.get("seccompProfile")):
            yield f"{one['name']}: seccompProfile is not set"


if __name__ == "__main__":
    sys.exit(main())
