"""Local runs in every training shape, through the whole workflow, on the CPU."""

from pathlib import Path

import pytest

from forge.cluster.nodes import SHAPES, TrainingShape
from tests.integration.harness import Home, stopped_afterwards

pytestmark = pytest.mark.long

OTHERS = [shape for shape in SHAPES if shape != TrainingShape(1, 2)]  # all other tests of the pipeline run that one
# Fails when the node list is opened. Python imports it at startup.
NO_NODE_LIST = """
import sys

def hook(event, arguments):
    if event == "open" and str(arguments[0]).endswith("infra/nodes.yaml"):
        raise RuntimeError("a local run opened infra/nodes.yaml")

sys.addaudithook(hook)
"""


@pytest.mark.parametrize("shape", [*OTHERS, TrainingShape(3, 1)], ids=str)
def test_a_recipe_of_any_shape_runs_without_the_node_list(shape: TrainingShape, tmp_path: Path) -> None:
    (tmp_path / "hook").mkdir()
    (tmp_path / "hook" / "sitecustomize.py").write_text(NO_NODE_LIST)
    with stopped_afterwards(Home(tmp_path / "home", {"PYTHONPATH": str(tmp_path / "hook")})) as home:
        home.write_recipe(
            data={"demonstration": {"rows": 1200}},
            training={
                "nodes": shape.nodes,
                "nproc_per_node": shape.nproc_per_node,
                "parallelism": "auto",
                "global_batch_size": 4 * shape.world_size,
            },
            gate={"min_score": 0.99},  # the model is rejected, so nothing is served
        )
        status, output = home.run()
        assert status == 0, output
        processes = shape.world_size
        assert f"{processes} process{'es' if processes > 1 else ''} on cpu" in output
        facts = home.facts()
        assert (facts["verdict"], facts["cached"]) == ("rejected", "")
        assert facts["nll"] < facts["nll_base"]
