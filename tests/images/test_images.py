"""The images and environments, as far as they can be checked without building them."""

import fnmatch
import importlib.metadata
import json
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterable
from pathlib import Path

import pytest
from flytekit.constants import CopyFileDetection
from flytekit.tools.fast_registration import FastPackageOptions, fast_package
from flytekit.tools.ignore import DockerIgnore, FlyteIgnore, GitIgnore, IgnoreGroup, StandardIgnore
from flytekit.tools.script_mode import ls_files
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

PROJECT = Path(__file__).parents[2]
IMAGES = ("pipeline", "trainer")
CODE = "/opt/forge"  # where the image has the project
SECRET = re.compile(r"secret|token|password|key", re.IGNORECASE)


def instructions(image: str) -> list[tuple[str, str]]:
    """The instructions of a Dockerfile with their arguments, continuation lines joined."""
    text = (PROJECT / "images" / image / "Dockerfile").read_text().replace("\\\n", " ")
    lines = [line.strip() for line in text.splitlines() if line.strip() and not line.startswith("#")]
    return [(name, " ".join(rest.split())) for name, _, rest in (line.partition(" ") for line in lines)]


def values(image: str, name: str) -> list[str]:
    """The arguments of each instruction of one kind."""
    return [rest for found, rest in instructions(image) if found == name]


def variables() -> dict[str, str]:
    """The light image's environment, as the Dockerfile sets it."""
    return dict(pair.split("=", 1) for line in values("pipeline", "ENV") for pair in line.split())


def context() -> list[str]:
    """The tracked files that .dockerignore lets into the build context."""
    rules = [line for line in (PROJECT / ".dockerignore").read_text().splitlines() if line and line[0] != "#"]
    assert rules[0] == "*", "everything else is excluded"
    files = subprocess.run(["git", "ls-files"], cwd=PROJECT, capture_output=True, text=True, check=True).stdout.split(
        "\n"
    )
    included = [rule[1:] for rule in rules if rule.startswith("!")]
    existing = [file for file in files if (PROJECT / file).is_file()]
    return [file for file in existing if any(file == path or file.startswith(f"{path}/") for path in included)]


@pytest.mark.parametrize("image", IMAGES)
def test_dockerfiles_are_linted(image: str) -> None:
    command = [Path(sys.executable).with_name("hadolint"), "--no-color", PROJECT / "images" / image / "Dockerfile"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "")


def test_base_image_is_pinned_by_digest_and_trainer_builds_on_pipeline() -> None:
    (base,) = values("pipeline", "FROM")
    assert re.fullmatch(r"python:3\.11\.\d+-slim-\w+@sha256:[0-9a-f]{64}", base)
    assert values("trainer", "FROM") == ["$PIPELINE"]
    assert re.search(r"PIPELINE=\S+@\$digest", (PROJECT / "images" / "build").read_text())


@pytest.mark.parametrize("image", IMAGES)
def test_images_run_as_the_pods_user(image: str) -> None:
    from tasks.task_pods import HOME, USER

    assert values(image, "USER")[-1] == str(USER)
    if image == "pipeline":
        assert f"FORGE_HOME={HOME} " in " ".join(values(image, "ENV")) + " "
        assert any(f"--uid {USER} " in run and f" {HOME}" in run for run in values(image, "RUN"))


def test_tasks_start_in_an_empty_directory_and_the_code_is_read_only() -> None:
    (work,) = values("pipeline", "WORKDIR")
    assert instructions("pipeline").index(("WORKDIR", work)) > max(
        n for n, (name, _) in enumerate(instructions("pipeline")) if name == "COPY"
    )
    assert variables()["PYTHONPATH"] == f"{work}:{CODE}"
    (command,) = (run for run in values("pipeline", "RUN") if "install -d" in run)
    assert re.search(rf"install -d -o forge -g forge .*{work}(\s|$)", command)
    targets = [copy.split()[-1] for copy in values("pipeline", "COPY") if "--" not in copy]
    assert [target for target in targets if not target.startswith("/tmp/")] == [  # noqa: S108
        f"{CODE}/{source}" for source in ("infra/nodes.yaml", "recipes", "forge", "tasks", "workflows")
    ]
    assert not [
        line for line in (*values("pipeline", "RUN"), *values("pipeline", "COPY")) if CODE in line and "chown" in line
    ]
    assert not [name for name, _ in instructions("trainer") if name in ("WORKDIR", "ENV", "COPY")]


def test_fast_registered_code_precedes_the_image_s_own(tmp_path: Path) -> None:
    folders = {"image": tmp_path / "opt", "sent": tmp_path / "sent"}
    for who, folder in folders.items():
        (folder / "tasks").mkdir(parents=True)
        (folder / "tasks" / "__init__.py").write_text(f"WHO = {who!r}")
    (tmp_path / "opt" / "tasks" / "only_in_the_image.py").touch()
    work = tmp_path / "work"
    work.mkdir()
    sent = fast_package(folders["sent"], tmp_path, options=FastPackageOptions([], copy_style=CopyFileDetection.ALL))
    path = (
        variables()["PYTHONPATH"]
        .replace(CODE, str(tmp_path / "opt"))
        .replace(values("pipeline", "WORKDIR")[0], str(work))
    )
    code = "import tasks, os; print(tasks.WHO, os.path.relpath(tasks.__file__))"
    program = Path(sys.executable).with_name("pyflyte-fast-execute")
    for command, output in (
        ([sys.executable, "-c", code], "image ../opt/tasks/__init__.py"),
        (
            [program, "--additional-distribution", sent, "--dest-dir", ".", "--", sys.executable, "-c", code],
            "sent tasks/__init__.py",
        ),
    ):
        done = subprocess.run(
            command, cwd=work, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, check=True
        )
        assert done.stdout.splitlines()[-1] == output


def test_fast_registration_sends_the_code_and_little_else() -> None:
    ignore = IgnoreGroup(str(PROJECT), [GitIgnore, DockerIgnore, StandardIgnore, FlyteIgnore])
    files, _ = ls_files(str(PROJECT), CopyFileDetection.ALL, False, ignore)
    sent = {Path(file).relative_to(PROJECT).as_posix() for file in files}
    assert {"infra/nodes.yaml", "recipes/tiny-cpu.yaml", "workflows/training_pipeline.py"} <= sent
    assert {str(path.relative_to(PROJECT)) for path in (PROJECT / "tasks").rglob("*.py")} <= sent
    assert {name.partition("/")[0] for name in sent} == {
        ".dockerignore", "forge", "images", "infra", "recipes", "tasks", "workflows"
    }  # fmt: skip
    assert sum((PROJECT / name).stat().st_size for name in sent) < 3_000_000


@pytest.mark.parametrize("image", IMAGES)
def test_images_have_labels_and_no_secrets(image: str) -> None:
    (labels,) = values(image, "LABEL")
    for name in ("title", "description", "licenses", "source", "revision"):
        assert f"org.opencontainers.image.{name}=" in labels
    for line in [*values(image, "ARG"), *values(image, "ENV")]:
        assert not SECRET.search(line), line


def test_build_context_is_exactly_the_copied_files() -> None:
    files = context()
    copied = [source for copy in values("pipeline", "COPY") for source in copy.split()[:-1]]
    assert copied
    for source in copied:
        assert any(file == source or file.startswith(f"{source}/") for file in files), source
    for file in files:
        assert any(file == source or file.startswith(f"{source}/") for source in copied), file
    assert sum((PROJECT / file).stat().st_size for file in files) < 3_000_000
    assert not [file for file in files if fnmatch.fnmatch(file, "tests/*")]


def test_every_requirement_is_hashed_and_verified() -> None:
    for lock in ("images/uv.lock", "images/pipeline/requirements.lock"):
        text = (PROJECT / lock).read_text().replace("\\\n", " ")
        packages = [line for line in text.splitlines() if "==" in line and not line.strip().startswith("#")]
        assert packages
        assert all("--hash=sha256:" in line for line in packages), lock
    installs = [run for run in values("pipeline", "RUN") if " -r " in run]
    assert len(installs) == 2
    assert all("--require-hashes" in run for run in installs)


def test_development_has_the_images_packages_and_tools() -> None:
    def pins(folder: str) -> set[str]:
        return set(re.findall(r"^[\w.-]+==\S+", (PROJECT / "images" / folder / "requirements.lock").read_text(), re.M))

    assert pins("pipeline") < pins("development")
    tools = {"pytest", "moto", "mypy", "ruff", "ipykernel", "hypothesis"}
    assert not tools & {pin.partition("==")[0] for pin in pins("pipeline")}


def test_dependencies_are_the_direct_requirements_of_the_images() -> None:
    def names(requirements: Iterable[str]) -> set[str]:
        return {canonicalize_name(Requirement(line.partition("#")[0]).name) for line in requirements}

    project = tomllib.loads((PROJECT / "pyproject.toml").read_text())["project"]
    direct, of_torch = (PROJECT / "images/pipeline/requirements.in").read_text().split("# torch's own requirements\n")
    lines = [line for line in direct.splitlines() if not line.startswith("#")]
    assert names(project["dependencies"]) == names([*lines, "torch"])
    assert "filelock" in of_torch


def test_the_project_is_installed_in_editable_mode() -> None:
    (entry,) = importlib.metadata.entry_points(group="console_scripts", name="forge")
    assert entry.value == "cli.main:main"
    origin = json.loads(importlib.metadata.distribution("forge").read_text("direct_url.json") or "")
    assert origin["dir_info"] == {"editable": True}


def test_images_have_the_torch_version_of_set_up(tmp_path: Path) -> None:
    (torch,) = re.findall(r"torch=(torch==[\d.]+)", (PROJECT / "images" / "install").read_text())
    calls = tmp_path / "calls"
    docker = tmp_path / "docker"
    docker.write_text(
        f'#!/bin/bash\nprintf "%s\\n" "$*" >> {calls}\n'
        'while [ $# -gt 0 ]; do if [ "$1" = --metadata-file ]; then\n'
        '  echo "{\\"containerimage.digest\\": \\"sha256:0a\\"}" > "$2"; fi; shift; done\n'
    )
    docker.chmod(0o755)
    done = build("example.org/forge", "0123456789ab", path=f"{tmp_path}:{os.environ['PATH']}")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [f"example.org/forge/forge-{image}:0123456789ab@sha256:0a" for image in IMAGES]
    _, pipeline, trainer = calls.read_text().splitlines()
    for call in (pipeline, trainer):
        assert "--platform linux/amd64 --push --sbom=true --provenance=mode=max" in call
        assert "REVISION=0123456789ab" in call
    assert f"--build-arg TORCH={torch} " in trainer
    assert "PIPELINE=example.org/forge/forge-pipeline:0123456789ab@sha256:0a" in trainer


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "Give the registry"),
        (("example.org/forge",), "Give the revision"),
        (("example.org/forge", "0123-dirty"), "commit them"),
        (("example.org/forge", "0123"), "docker buildx is not installed"),
    ],
)
def test_build_reports_what_is_missing(arguments: tuple[str, ...], message: str, tmp_path: Path) -> None:
    for program in ("bash", "dirname"):
        found = subprocess.run(["which", program], capture_output=True, text=True, check=True).stdout.strip()
        (tmp_path / program).symlink_to(found)
    done = build(*arguments, path=str(tmp_path))
    assert done.returncode == 1
    assert message in done.stderr


def build(*arguments: str, path: str) -> subprocess.CompletedProcess[str]:
    """Run images/build with a PATH."""
    command = [str(PROJECT / "images" / "build"), *arguments]
    return subprocess.run(["/bin/bash", *command], env={"PATH": path}, capture_output=True, text=True)
