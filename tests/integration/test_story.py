"""What Forge is for, told on real parts in five acts: pyflyte, MLflow, vLLM, and clients that never stop asking.

Each act goes on from the one before, in one home.
"""

import json
import os
import signal
import threading
import time
from collections.abc import Iterator

import pytest
from openai import OpenAI
from safetensors.torch import load_file, save_file

from forge.core.contracts import Evaluation, Version
from forge.core.errors import ForgeError
from forge.core.recipe import ServingRecipe
from forge.registry.mlflow_registry import champion_version, open_registry
from forge.registry.packages import fetch_package
from forge.registry.promotion import promotions
from forge.serving.local_target import LocalTarget
from forge.storage import open_store
from tasks.rollout.rollout import roll_out
from tests.integration.harness import Home, ended_at_last, wait_for

pytestmark = pytest.mark.long
FIRST, MORE = ["en", "nl"], ["en", "nl", "de", "pt"]
ROWS = 6000
LORA = {"method": "lora", "lora": {"rank": 16, "alpha": 32.0}, "learning_rate": 0.01}
SERVING = ServingRecipe(replay=8, watch_seconds=1)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Home]:
    with ended_at_last(Home(tmp_path_factory.mktemp("story"))) as home:
        yield home


def run(home: Home, **sections: dict) -> str:
    """A run of the pipeline with keys of some of the recipe's sections changed."""
    home.write_recipe(**sections)
    status, output = home.run()
    assert status == 0, output
    return output


def ask(home: Home, question: str = "NL: 20 juni 1969") -> tuple[str, str]:
    """Which version of dates answers, and what."""
    client = OpenAI(base_url=home.settings.endpoint, api_key="EMPTY", max_retries=0)
    messages = [{"role": "user", "content": question}]
    answer = client.chat.completions.create(model="dates", messages=messages, temperature=0, max_tokens=32)
    return answer.model, answer.choices[0].message.content


def served(home: Home) -> str:
    """The version that should be served as dates."""
    found = home.desired().serving.find("dates")
    assert found is not None
    return found.version


def champion(home: Home) -> str | None:
    return champion_version(open_registry(home.settings), "dates")


def agrees(home: Home, version: str) -> None:
    """Registry, history, document and vLLM all say that this version serves; nothing is under way."""
    assert (champion(home), served(home)) == (version, version)
    assert home.desired().trial is None
    assert promotions(open_store(home.settings), "dates")[-1].version == version
    assert ask(home)[0] == home.desired().serving.names["dates"]


class Clients:
    """Eight clients that keep asking, and what became of it."""

    def __init__(self, home: Home) -> None:
        self.home, self.ended = home, threading.Event()
        self.versions: set[str] = set()
        self.answered = 0
        self.failed: list[str] = []
        self.threads = [threading.Thread(target=self._keep_asking) for _ in range(8)]

    def __enter__(self) -> "Clients":
        for thread in self.threads:
            thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.ended.set()
        for thread in self.threads:
            thread.join()

    def _keep_asking(self) -> None:
        while not self.ended.is_set():
            try:
                version, _ = ask(self.home)
                self.versions.add(version)
                self.answered += 1
            except Exception as error:  # whatever a client sees
                self.failed.append(str(error))
            time.sleep(0.1)


def test_act_1_from_nothing_to_a_model_that_answers(home: Home) -> None:
    output = run(home, data={"demonstration": {"rows": 6000, "locales": FIRST}})
    assert "dates version 1" in output
    agrees(home, "1")
    version, text = ask(home)
    assert version.startswith("dates-")
    assert text.startswith('{"date":')
    assert home.facts()["answers_as_in_evaluation"] == "8 of 8"


def test_act_2_new_data_become_an_adapter_that_is_swapped_in_under_load(home: Home) -> None:
    old = home.desired().serving.names["dates"]
    home.write_recipe(
        data={"demonstration": {"rows": ROWS, "locales": MORE}},
        model={"architecture": None, "base": "models:/dates@champion"},
        training=LORA,
        gate={"metric": "nll", "min_slice_items": 10},
    )
    process = home.start()
    output = wait_for(process, "evaluate: ")  # until then the two cores train
    with Clients(home) as clients:
        more, _ = process.communicate(timeout=400)
        output += more
    assert process.returncode == 0, output
    agrees(home, "2")
    facts = home.facts()
    assert (facts["swap"], facts["served_before"]) == ("adapter", "1"), output
    assert facts["nll"] < facts["nll_base"]
    assert clients.failed == []
    assert clients.versions == {old, home.desired().serving.names["dates"]}
    assert clients.answered >= 16
    assert home.desired().serving.base.version == "1", "which the adapter stands on"


def test_act_3_a_bad_fine_tune_is_refused_and_the_champion_serves_on(home: Home) -> None:
    output = run(
        home,
        data={"demonstration": {"rows": ROWS, "locales": MORE}},
        model={"architecture": None, "base": "models:/dates/1"},
        training={**LORA, "learning_rate": 0.3},
    )
    assert home.facts()["verdict"] == "refuse"
    assert "roll_out:" not in output
    agrees(home, "2")


def registered(home: Home, of: str, breakage: str) -> tuple[Version, Evaluation]:
    """A new version, broken after it was evaluated: its package and its evaluation are those of another version, but
    for the breakage.
    """
    store, client = open_store(home.settings), open_registry(home.settings)
    package = fetch_package(f"models:/dates/{of}", home.settings, store)
    facts = json.loads((package / "manifest.json").read_text())
    facts = {name: facts[name] for name in ("name", "kind", "base", "rank", "model_digest") if name in facts}
    if breakage == "base":
        facts["base"] = another_base(home)
    with store.stage() as staged:
        for path in package.iterdir():
            if path.name != "manifest.json":
                (staged / path.name).write_bytes(path.read_bytes())
        (staged / "README.md").write_text(f"# dates\n\nWith another {breakage}.\n")
        if breakage == "template":
            template = staged / "chat_template.jinja"
            template.write_text(template.read_text().replace("<|assistant|>", "<|user|>"))
        uri = store.publish(staged, "models/dates", facts=facts)
    tags = client.get_model_version("dates", of).tags
    made = client.create_model_version("dates", source=uri, tags=tags)
    digest = uri.rpartition("sha256-")[2]
    version = Version(uri=uri, digest=digest, store=store.identity, name="dates", version=str(made.version), run_id="")
    place = store.uri(f"evaluations/sha256-{tags['evaluation_digest']}")
    evaluation = Evaluation(
        uri=place, digest="", store=store.identity, items=64, score=0, score_base=0, exact_match=0, nll=0, nll_base=0,
        json_validity=None, champion=champion(home) or "", verdict="pass", reason="as before", report="",
    )  # fmt: skip
    return version, evaluation


def test_act_4_what_passes_the_gate_and_fails_live_is_rolled_back_and_the_registry_says_so(home: Home) -> None:
    before, says = home.desired().serving, "is given other tokens than in evaluation"
    version, evaluation = registered(home, "1", "template")
    with pytest.raises(ForgeError, match=says) as caught:
        roll_out(version, evaluation, SERVING, home.settings, open_store(home.settings))
    assert "serves again; the champion is unchanged" in caught.value.message
    assert home.desired().serving == before
    agrees(home, "2")
    tags = open_registry(home.settings).get_model_version("dates", version.version).tags
    assert says in tags["rollout_failed"]


def another_base(home: Home) -> dict[str, str]:
    """What a manifest says of a base like version 1, with other weights."""
    store = open_store(home.settings)
    with store.stage() as staged:
        for path in fetch_package("models:/dates/1", home.settings, store).iterdir():
            if path.name != "manifest.json":
                (staged / path.name).write_bytes(path.read_bytes())
        weights = load_file(staged / "model.safetensors")
        save_file(
            {name: tensor.flip(0) for name, tensor in weights.items()}, staged / "model.safetensors", {"format": "pt"}
        )
        uri = store.publish(staged, "models/dates", facts={"name": "dates", "kind": "model"})
    return {"location": uri, "revision": uri.rpartition("sha256-")[2]}


def test_act_4_an_adapter_on_the_wrong_base_is_caught(home: Home) -> None:
    version, evaluation = registered(home, "2", "base")
    with pytest.raises(ForgeError, match=r"does not answer as it did|nats a token more or less likely"):
        roll_out(version, evaluation, SERVING, home.settings, open_store(home.settings))
    agrees(home, "2")


def test_act_5_power_cuts_leave_nothing_half_done(home: Home) -> None:
    changed = {
        "data": {"demonstration": {"rows": ROWS, "locales": MORE}},
        "model": {"architecture": None, "base": "models:/dates/1"},
        "training": {**LORA, "epochs": 2},
        "gate": {"min_slice_items": 10},
    }
    for moment in ("train: step", "register: ", "trial"):
        home.write_recipe(**changed)
        process = home.start()
        wait_for(process, "register: " if moment == "trial" else moment)
        while moment == "trial" and home.desired().trial is None:
            time.sleep(0.01)
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        for one in home.processes():
            if one.pid not in home.serving():
                one.kill()
        target = LocalTarget(home.settings)
        deadline = time.monotonic() + 120
        while home.desired().trial is not None or (target.status() or home).waiting:  # type: ignore[union-attr]
            assert time.monotonic() < deadline
            time.sleep(0.2)
        agrees(home, "2")
    run(home, **changed)
    versions = {one.version for one in open_registry(home.settings).search_model_versions("name = 'dates'")}
    assert home.facts()["version"] == max(map(str, versions), key=int)
    agrees(home, home.facts()["version"])


def test_epilogue_the_way_back_by_hand(home: Home) -> None:
    status, output = home.run("--name", "dates", workflow="rollback")
    assert status == 0, output
    agrees(home, "2")
    status, output = home.run("--name", "dates", "--to", "1", workflow="rollback")
    assert status == 0, output
    agrees(home, "1")
    assert "rolled back by hand from version 2" in promotions(open_store(home.settings), "dates")[-1].why
