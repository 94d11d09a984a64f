"""Update the schemas that infra/schemas/sources.yaml lists: `python -m infra.check.vendor FOLDER`.

FOLDER holds clones of the repositories, as OWNER+NAME or OWNER+NAME/repo. Descriptions are left out: they
make up most of a schema, and no check uses them.
"""

import argparse
import json
import subprocess
from pathlib import Path
from typing import Any

import yaml

from infra.check.schemas import SCHEMAS


def main() -> None:
    """Rewrite each file of the list."""
    parser = argparse.ArgumentParser(prog="python -m infra.check.vendor", description=__doc__)
    parser.add_argument("folder", type=Path, help="clones, as OWNER+NAME")
    clones = parser.parse_args().folder
    for one in yaml.safe_load((SCHEMAS / "sources.yaml").read_text())["sources"]:
        clone = clone_of(one, clones)
        show = ["git", "-C", str(clone), "show", f"{one['ref']}:{one['path']}"]
        text = subprocess.run(show, capture_output=True, text=True, check=True).stdout
        target = SCHEMAS / one["file"]
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(convert(one, text))


def clone_of(one: dict[str, Any], folder: Path) -> Path:
    """The clone of a source's repository."""
    clone = folder / one["repository"].replace("/", "+")
    return clone / "repo" if (clone / "repo").is_dir() else clone


def convert(one: dict[str, Any], text: str) -> str:
    """The part of a source that is kept: one version of a CRD's schema, a chart's values, or their schema."""
    lines = text if one["file"].startswith("charts") else "\n".join(
        line for line in text.splitlines() if "{{" not in line  # Helm's conditions around a CRD
    )  # fmt: skip
    read = json.loads(text) if one["path"].endswith(".json") else list(yaml.safe_load_all(lines))
    if one["file"].startswith("crds"):
        found = next(document for document in read if document and document["kind"] == "CustomResourceDefinition")
        version = Path(one["file"]).stem.rpartition("_")[2]
        schema = next(each for each in found["spec"]["versions"] if each["name"] == version)["schema"]
        return json.dumps(plain(schema["openAPIV3Schema"]), separators=(",", ":"), sort_keys=True) + "\n"
    if one["file"].endswith(".schema.json"):
        return json.dumps(plain(read if isinstance(read, dict) else read[0]), separators=(",", ":")) + "\n"
    return yaml.safe_dump(read[0], sort_keys=True, allow_unicode=True, width=120)


def plain(schema: Any) -> Any:
    """A schema without descriptions; pod templates within it are left open, since they are checked separately."""
    if isinstance(schema, list):
        return [plain(one) for one in schema]
    if not isinstance(schema, dict):
        return schema
    spec = (schema.get("properties") or {}).get("spec")
    if isinstance(spec, dict) and "containers" in (spec.get("properties") or {}):
        return {"type": "object", "x-kubernetes-preserve-unknown-fields": True}
    return {
        name: {key: plain(value) for key, value in one.items()} if name == "properties" else plain(one)
        for name, one in schema.items()
        if name != "description" or not isinstance(one, str)
    }


if __name__ == "__main__":
    main()
