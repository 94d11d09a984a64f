"""Files are in UTF-8, whatever the locale."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PROJECT = Path(__file__).parents[2]


def calls(package: str) -> Iterator[tuple[str, ast.Call, str]]:
    """The calls in a package: the place, the call, and the name of what is called."""
    for path in (PROJECT / package).rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call):
                name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
                yield f"{path.relative_to(PROJECT)}:{node.lineno}", node, name


@pytest.mark.parametrize("package", ["forge", "tasks", "workflows", "cli"])
def test_no_text_is_read_or_written_in_the_encoding_of_the_locale(package: str) -> None:
    wrong = []
    for place, call, name in calls(package):
        given = {keyword.arg for keyword in call.keywords}
        mode = "".join(one.value for one in call.args if isinstance(one, ast.Constant) and isinstance(one.value, str))
        opens = name in ("open", "fdopen") and "b" not in mode and not ast.unparse(call.func).startswith("os.open")
        runs = name in ("run", "Popen", "check_output") and given & {"text", "universal_newlines"}
        if (name in ("read_text", "write_text") or opens or runs) and "encoding" not in given:
            wrong.append(f"{place} {ast.unparse(call)[:80]}")
    assert wrong == []
