"""docs/operate.md can be followed: what it names exists, and programs accept its commands."""

import re
import shlex
import subprocess
from pathlib import Path

import click
import yaml
from flytekit.clis.sdk_in_container.run import run
from flytekit.constants import CopyFileDetection

from forge.storage.recipes import load_recipe

PROJECT = Path(__file__).parents[2]
PAGE = (PROJECT / "docs" / "operate.md").read_text()
PAGES = ("operate", "runbooks", "troubleshooting")
SHIPPED = yaml.safe_load((PROJECT / "executions" / "training_pipeline.yaml").read_text())["inputs"]["recipe"]


def blocks(text: str) -> str:
    """The contents of the blocks of commands."""
    return "\n".join(re.findall(r"^ *```\n(.*?)^ *```$", text, re.M | re.S))


def parsed(arguments: list[str]) -> click.Context:
    """The options of `pyflyte run`; raises click's error for an unknown one."""
    return run.make_context("run", arguments)


def assert_uploads_all(context: click.Context) -> None:
    """The command runs on the cluster, with the whole tree, in images with the tasks' names."""
    assert context.params["remote"]
    assert context.params["copy"] == CopyFileDetection.ALL
    assert {"pipeline", "trainer"} <= {image.name for image in context.params["image_config"].images}


def test_targets_and_jobs_exist() -> None:
    targets = set(re.findall(r"^([a-z.-]+):", (PROJECT / "Makefile").read_text(), re.M))
    assert set(re.findall(r"\bmake ([a-z-]+)", blocks(PAGE))) <= targets
    files = {path.name for path in (PROJECT / "executions").glob("*.yaml")}
    assert set(re.findall(r"^\| `(\w+\.yaml)` \|", PAGE, re.M)) == files
    for page in PAGES:
        jobs = re.findall(r"JOB=(\w+)", (PROJECT / "docs" / f"{page}.md").read_text())
        assert {f"{job}.yaml" for job in jobs} <= files


def test_flytectl_accepts_each_way_to_give_a_recipe() -> None:
    given = {
        path.stem: yaml.safe_load(path.read_text())["inputs"].get("recipe", "")
        for path in (PROJECT / "executions").glob("*.yaml")
    }
    assert load_recipe(given["training_pipeline"]).name == "llama-3-1-8b-lora"
    assert given["recipe_in_store"].startswith("s3://")
    own = load_recipe(given["own_recipe"])
    assert own.name == "first-run"
    assert own.training.nodes * own.training.nproc_per_node == 1, "every domain has that many GPUs"


def test_pyflyte_accepts_each_way_to_give_a_recipe() -> None:
    commands = [shlex.split(line, comments=True) for line in blocks(PAGE).splitlines() if "pyflyte run" in line]
    images = ["--image", "pipeline=example.org/forge-pipeline:1", "--image", "trainer=example.org/forge-trainer:1"]
    recipes = []
    for command in commands:
        at = command.index("$IMAGES")
        context = parsed([*command[2:at], *images, *command[at + 1 :]])
        assert_uploads_all(context)
        recipes.append(command[command.index("--recipe") + 1])
    assert recipes == [SHIPPED, "s3://datasets/recipes/mine.yaml", "$(cat my.yaml)"]


def test_plans_are_activated_without_a_prompt() -> None:
    for page in PAGES:
        for line in (PROJECT / "docs" / f"{page}.md").read_text().splitlines():
            if "flytectl update launchplan" in line:
                assert "--force" in line


def test_one_section_lists_what_was_run() -> None:
    text, _, table = PAGE.partition("## 9. ")
    assert not re.search(r"\*run\*|\*not run\*", text, re.I)
    assert "| not run |" in table


def test_make_try_uploads_the_tree_and_passes_the_recipe_text(tmp_path: Path) -> None:
    program = tmp_path / "pyflyte"
    program.write_text(f'#!/bin/sh\nprintf "%s\\0" "$@" > {tmp_path}/arguments\n')
    program.chmod(0o755)
    recipe = PROJECT / "recipes" / "tiny-cpu.yaml"
    command = ["make", "try", f"BIN={tmp_path}", "REGISTRY=example.org/forge", "TAG=0123456789ab"]
    command.append(f'ARGS=--recipe "$$(cat {recipe})"')
    subprocess.run(command, cwd=PROJECT, check=True, capture_output=True)
    arguments = (tmp_path / "arguments").read_text().split("\0")[:-1]
    assert arguments[-1] == recipe.read_text().rstrip("\n")
    context = parsed(arguments[1:])
    assert_uploads_all(context)
    assert (context.params["project"], context.params["domain"]) == ("homelab", "development")
    refused = subprocess.run([*command[:4], "TAG=0123-dirty"], cwd=PROJECT, capture_output=True, text=True, check=False)
    assert "Uncommitted changes have no images" in refused.stderr
