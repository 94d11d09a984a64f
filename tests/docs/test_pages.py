"""The README and the pages of docs/: links resolve, commands exist, and the site contains every page."""

import re
import shlex
from pathlib import Path

import click
import pytest

from cli.main import main
from forge.core.recipe import Recipe
from forge.core.settings import Settings

PROJECT = Path(__file__).parents[2]
DOCS = PROJECT / "docs"
PAGES = [
    *(PROJECT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md")),
    *sorted(DOCS.rglob("*.md")),
]
EVERY_PAGE = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(PROJECT)))
FENCED = re.compile(r"^ *```(\w*)\n(.*?)^ *```$", re.M | re.S)
NO_FIELDS = ("json", "sig")  # of files such as training.json
ANNOTATION = "forge/previous"  # looks like a path


def anchor(heading: str) -> str:
    """The anchor that GitHub and MkDocs give a heading."""
    return re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-")


def recipe_fields() -> dict[str, set[str]]:
    """The names of the fields of each section of a recipe."""
    return {
        section: set(field.annotation.model_fields)  # type: ignore[union-attr]
        for section, field in Recipe.model_fields.items()
        if hasattr(field.annotation, "model_fields")
    }


@EVERY_PAGE
def test_links_resolve(page: Path) -> None:
    for file, part in re.findall(r"\]\(([^)#\s]*)(?:#([^)\s]+))?\)", page.read_text()):
        if file.startswith("http"):
            continue
        target = page.parent / file if file else page
        assert target.exists(), file
        if part:
            headings = re.findall(r"^#+ (.*)$", target.read_text(), re.M)
            assert part in {anchor(heading) for heading in headings}, f"{file}#{part}"


@pytest.mark.parametrize("page", sorted(DOCS.rglob("*.md")), ids=lambda page: page.name)
def test_pages_link_only_within_docs(page: Path) -> None:
    # The site has no other files, so `mkdocs build --strict` fails on links to them.
    for file in re.findall(r"\]\(([^)#\s]+)", page.read_text()):
        assert file.startswith("http") or (page.parent / file).resolve().is_relative_to(DOCS), file


@EVERY_PAGE
def test_commands_exist(page: Path) -> None:
    """Each `forge` command parses, and each make target is in the Makefile."""
    targets = set(re.findall(r"^([a-z.-]+):", (PROJECT / "Makefile").read_text(), re.M))
    blocks = [block for language, block in FENCED.findall(page.read_text()) if not language]
    for line in "\n".join(blocks).splitlines():
        program, _, rest = line.strip().partition(" ")
        if program in ("forge", ".venv/bin/forge"):
            name, *arguments = shlex.split(rest, comments=True)
            main.commands[name].make_context(name, arguments, parent=click.Context(main))  # raises click's errors
        elif program == "make":
            assert rest.split()[0] in targets, line


def test_the_readme_shows_every_command() -> None:
    shown = re.findall(r"^\.venv/bin/forge ([a-z-]+)", (PROJECT / "README.md").read_text(), re.M)
    assert sorted(shown) == sorted(main.commands)


@EVERY_PAGE
def test_fields_and_settings_exist(page: Path) -> None:
    text, fields = page.read_text(), recipe_fields()
    for section, name in re.findall(r"`(data|model|training|evaluation|gate|serving)\.([a-z_]+)(?=[`: ])", text):
        if name not in NO_FIELDS:
            assert name in fields[section], f"{section}.{name}"
    for name in re.findall(r"\bFORGE_([A-Z0-9_]+)", text):
        assert name.startswith("TEST_") or name.lower() in Settings.model_fields, f"FORGE_{name}"


@EVERY_PAGE
def test_files_named_in_prose_exist(page: Path) -> None:
    roots = "forge|tasks|workflows|cli|tests|infra|images|recipes|executions|benchmarks"
    for path in re.findall(rf"`((?:{roots})/[\w./-]*)`", page.read_text()):
        assert path == ANNOTATION or (PROJECT / path).exists(), path


def test_the_site_has_every_page() -> None:
    nav = (PROJECT / "mkdocs.yml").read_text().partition("\nnav:\n")[2]
    listed = re.findall(r"([\w/-]+\.md)$", nav, re.M)
    assert sorted(listed) == sorted(str(page.relative_to(DOCS)) for page in DOCS.rglob("*.md"))


def test_decisions_are_numbered_and_listed() -> None:
    folder = DOCS / "decisions"
    records = sorted(path.name for path in folder.glob("0*.md"))
    assert [int(name[:4]) for name in records] == list(range(1, len(records) + 1))
    assert re.findall(r"\]\((0.*\.md)\)", (folder / "README.md").read_text()) == records
    for name in records:
        text = (folder / name).read_text()
        assert re.findall(r"^## (.*)$", text, re.M) == ["Context", "Decision", "Consequences"], name
