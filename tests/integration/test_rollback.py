"""A model that does not serve, or does not answer as it did in evaluation: the one before serves again."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from tasks.contracts import Evaluation, Version
from tasks.errors import ForgeError
from tasks.recipe import ServingRecipe
from tasks.registry import champion_version, open_registry
from tasks.rollout.rollout import roll_out
from tasks.rollout.server import LocalServer
from tasks.storage import open_store
from tests.integration.harness import Home, gone, wait_for

SERVING = ServingRecipe(replay=8)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Home]:
    home = Home(tmp_path_factory.mktemp("rollback"))
    try:
        status, output = home.run()
        assert status == 0, output
        yield home
    finally:
        home.stop()
    assert gone(home.processes())


def second_version(home: Home, breakage: str) -> tuple[Version, Evaluation]:
    """A registered version whose package is broken, with the evaluation of the one that serves."""
    store = open_store(home.settings)
    facts = home.facts()
    client = open_registry(home.settings)
    first = client.get_model_version("dates", "1")
    with store.stage() as package:
        shutil.copytree(store.path(first.source), package, dirs_exist_ok=True)
        if breakage == "weights":
            (package / "model.safetensors").write_bytes(b"not a model")
        else:
            template = package / "chat_template.jinja"
            template.write_text(template.read_text().replace("<|assistant|>", "<|user|>"))
        uri = store.publish(package, "models/dates", facts={"name": "dates"})
    made = client.create_model_version("dates", source=uri)
    digest = uri.rpartition("sha256-")[2]
    version = Version(uri=uri, digest=digest, store=store.identity, name="dates", version=str(made.version), run_id="")
    names = ("items", "score", "score_base", "exact_match", "nll", "nll_base", "verdict", "reason")
    scores = {name: facts[name] for name in names}
    evaluation = Evaluation(
        uri=Path(facts["report"]).parent.as_uri(),
        digest="",
        store=store.identity,
        report=facts["report"],
        json_validity=None,
        champion="1",
        **scores,
    )
    return version, evaluation


@pytest.mark.long
@pytest.mark.parametrize(
    ("breakage", "says"),
    [("weights", "vLLM ended while it started"), ("template", "does not answer as it did in evaluation")],
)
def test_what_served_before_serves_again(breakage: str, says: str, home: Home) -> None:
    before = home.served()
    assert before is not None
    version, evaluation = second_version(home, breakage)
    with pytest.raises(ForgeError, match=says) as caught:
        roll_out(version, evaluation, SERVING, home.settings, open_store(home.settings))
    assert "dates version 1 serves again; the champion is unchanged" in caught.value.message
    after = home.served()
    assert after is not None
    assert after.spec == before.spec
    assert after.healthy()
    assert champion_version(open_registry(home.settings), "dates") == "1"
    assert json.loads((home.settings.serving / "server.json").read_text())["spec"]["version"] == "1"


@pytest.mark.long
def test_a_swap_that_is_broken_off_leaves_what_served_before(home: Home) -> None:
    before = home.served()
    assert before is not None
    home.write_recipe(training={"epochs": 2})  # better, so that the gate lets it through
    try:
        process = home.start()
        output = wait_for(process, "vLLM is starting")
        output += home.interrupt(process)
    finally:
        home.write_recipe()
    assert process.returncode != 0
    after = home.served()
    assert after is not None, output
    assert after.spec == before.spec
    LocalServer(home.settings).wait_ready(after, timeout=300)
    assert champion_version(open_registry(home.settings), "dates") == "1"
    server = {process.pid for process in after.processes()}
    assert {process.pid for process in home.processes()} <= server, "nothing of the broken-off run lives"
