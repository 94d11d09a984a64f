"""The manifests, read once."""

import shutil

import pytest

from forge.core.settings import PROJECT
from infra.check.__main__ import KUBECTL
from infra.check.tree import Tree, read_tree


@pytest.fixture(scope="session")
def tree() -> Tree:
    """All of infra/."""
    if shutil.which("kubectl") is None:
        pytest.skip(f"kubectl is missing. {KUBECTL}")
    return read_tree(PROJECT / "infra")
