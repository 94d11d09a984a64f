"""The manifests as they are: nothing is wrong with them, and nothing is left out of what is looked at."""

import shutil
import subprocess
import sys
from pathlib import Path

from forge.core.settings import PROJECT
from infra.check.__main__ import findings
from infra.check.tree import Tree

INFRA = PROJECT / "infra"


def test_nothing_is_wrong(tree: Tree) -> None:
    assert sorted(set(findings(tree))) == []


def test_all_apps_are_looked_at(tree: Tree) -> None:
    folders = {path.parent.relative_to(INFRA / "apps").as_posix() for path in INFRA.glob("apps/**/*.yaml")}
    assert set(tree.apps) == folders
    assert all(tree.apps.values())


def test_every_app_has_all_its_objects_in_one_namespace(tree: Tree) -> None:
    for app, objects in tree.apps.items():
        home = app.split("/")[0]
        spaces = {one["metadata"]["namespace"] for one in objects if "namespace" in one["metadata"]}
        assert spaces <= {home, "flux-system"}, app


def test_the_command_says_what_is_wrong_a_line_each(tmp_path: Path) -> None:
    copy = shutil.copytree(INFRA, tmp_path / "infra")
    file = copy / "apps" / "ml-inference" / "ollama" / "service.yaml"
    file.write_text(file.read_text().replace("targetPort: http", "targetPort: htp"))
    done = subprocess.run(
        [sys.executable, "-m", "infra.check", str(copy)], cwd=PROJECT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    *lines, last = done.stdout.splitlines()
    assert lines == [
        "infra/apps/ml-inference/ollama: Service ollama: port 11434 leads to htp, which "
        "infra/apps/ml-inference/ollama: Deployment ollama does not have"
    ]
    assert last.endswith(": 1 wrong")
