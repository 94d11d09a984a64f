"""`python -m infra.check.secrets`: print the Secrets of infra/external.yaml, to be encrypted (infra/secrets/README.md).

Random values are new each time. Values that you must supply read "GIVE: description".
"""

import re
import secrets
import string
import sys
from pathlib import Path
from typing import Any

import yaml

from infra.check.tree import read_lists

LETTERS = string.ascii_letters + string.digits
SAME = "same as "


def make_secrets(external: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Secret objects, except for those that are created in another way (`by`)."""
    listed = [one for one in external if one["kind"] == "Secret" and "by" not in one]
    values = {
        f"{one['namespace']}/{one['name']}/{key}": value_of(str(rule))
        for one in listed
        for key, rule in one["keys"].items()
    }

    def other(name: str) -> str:
        return values[name]

    for name, value in values.items():
        if value.startswith(SAME):
            values[name] = other(value.removeprefix(SAME))
    for name, value in values.items():
        values[name] = re.sub(r"<([a-z-]+/[a-z-]+/[a-z-]+)>", lambda found: other(found[1]), value)
    return [
        {
            "apiVersion": "v1",
            "kind": "Secret",
            "metadata": {"name": one["name"], "namespace": one["namespace"]},
            "stringData": {key: values[f"{one['namespace']}/{one['name']}/{key}"] for key in one["keys"]},
        }
        for one in listed
    ]


def value_of(rule: str) -> str:
    """The value that a key's rule gives, before references to other values are replaced."""
    if rule == "random":
        return "".join(secrets.choice(LETTERS) for _ in range(32))
    for word in ("is ", "text "):
        if rule.startswith(word):
            return rule.removeprefix(word)
    return rule if rule.startswith(SAME) else f"GIVE: {rule}"


if __name__ == "__main__":
    found = read_lists(Path(__file__).parent.parent, [])["external"]
    yaml.safe_dump_all(make_secrets(found), sys.stdout, sort_keys=False)
