"""The manifests in the repository have no problems, and every app is checked."""

import shutil
import subprocess
import sys
from pathlib import Path

from forge.core.settings import PROJECT
from infra.check.__main__ import findings
from infra.check.tree import Tree

INFRA = PROJECT / "infra"


def test_manifests_have_no_problems(tree: Tree) -> None:
    assert sorted(set(findings(tree))) == []


def test_all_apps_are_checked(tree: Tree) -> None:
    folders = {path.parent.relative_to(INFRA / "apps").as_posix() for path in INFRA.glob("apps/**/*.yaml")}
    assert set(tree.apps) == folders
    assert all(tree.apps.values())


def test_each_app_stays_in_its_namespace(tree: Tree) -> None:
    for app, objects in tree.apps.items():
        home = app.split("/")[0]
        namespaces = {one["metadata"]["namespace"] for one in objects if "namespace" in one["metadata"]}
        assert namespaces <= {home, "flux-system"}, app


def test_command_prints_each_problem_on_a_line(tmp_path: Path) -> None:
    copy = shutil.copytree(INFRA, tmp_path / "infra")
    file = copy / "apps" / "ml-inference" / "ollama" / "service.yaml"
    file.write_text(file.read_text().replace("targetPort: http", "targetPort: htp"))
    done = subprocess.run(
        [sys.executable, "-m", "infra.check", str(copy)], cwd=PROJECT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    *lines, last = done.stdout.splitlines()
    assert lines == [
        "infra/apps/ml-inference/ollama: Service ollama: port 11434 targets htp, which "
        "infra/apps/ml-inference/ollama: Deployment ollama does not have"
    ]
    assert last.endswith(": 1 wrong")
