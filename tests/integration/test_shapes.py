"""Every shape of training through the whole workflow, on CPU processes of this machine."""

from pathlib import Path

import pytest

from forge.cluster.nodes import SHAPES, TrainingShape
from tests.integration.harness import Home, ended_at_last

pytestmark = pytest.mark.long


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_recipe_of_each_shape_runs(shape: TrainingShape, tmp_path: Path) -> None:
    with ended_at_last(Home(tmp_path / "home")) as home:
        home.write_recipe(
            data={"demonstration": {"rows": 1200}},
            training={"nodes": shape.nodes, "nproc_per_node": shape.nproc_per_node, "parallelism": "auto"},
            gate={"min_score": 0.99},  # held back: nothing is served
        )
        status, output = home.run()
        assert status == 0, output
        processes = shape.nodes * shape.nproc_per_node
        assert f"{processes} process{'es' if processes > 1 else ''} on cpu" in output
        facts = home.facts()
        assert (facts["verdict"], facts["cached"]) == ("refuse", "")
        assert facts["nll"] < facts["nll_base"]
