"""The life of a model, end to end with pyflyte, MLflow and vLLM under constant load.

Each test continues from the one before, in one home.
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
from tests.integration.harness import Home, stopped_afterwards, wait_for

pytestmark = pytest.mark.long
FIRST, MORE = ["en", "nl"], ["en", "nl", "de", "pt"]
ROWS = 6000
LORA = {"method": "lora", "lora": {"rank": 16, "alpha": 32.0}, "learning_rate": 0.01}
SERVING = ServingRecipe(replay=8, watch_seconds=1, max_latency_ratio=100)  # machines are busy


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Home]:
    with stopped_afterwards(Home(tmp_path_factory.mktemp("story"))) as home:
        yield home


def run(home: Home, **sections: dict) -> str:
    """Run the pipeline with changes to some sections of the recipe; returns its output."""
    home.write_recipe(**sections)
    status, output = home.run()
    assert status == 0, output
    return output


def ask(home: Home, question: str = "NL: 20 juni 1969") -> tuple[str, str]:
    """The version that answers as `dates`, and its answer."""
    client = OpenAI(base_url=home.settings.endpoint, api_key="EMPTY", max_retries=0)
    messages = [{"role": "user", "content": question}]
    answer = client.chat.completions.create(model="dates", messages=messages, temperature=0, max_tokens=32)
    return answer.model, answer.choices[0].message.content


def served(home: Home) -> str:
    """The version that should be served as `dates`."""
    served = home.desired().serving.find("dates")
    assert served is not None
    return served.version


def champion(home: Home) -> str | None:
    return champion_version(open_registry(home.settings), "dates")


def agrees(home: Home, version: str) -> None:
    """Assert that registry, history, desired state and vLLM agree on the version, and no trial is in progress."""
    assert (champion(home), served(home)) == (version, version)
    assert home.desired().trial is None
    assert promotions(open_store(home.settings), "dates")[-1].version == version
    assert ask(home)[0] == home.desired().serving.names["dates"]


class Clients:
    """Eight clients that send requests all the time, and count the answers."""

    def __init__(self, home: Home) -> None:
        self.home, self.ended = home, threading.Event()
        self.versions: set[str] = set()
        self.answered = 0
        self.failed: list[str] = []
        self.threads = [threading.Thread(target=self._send_requests) for _ in range(8)]

    def __enter__(self) -> "Clients":
        for thread in self.threads:
            thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.ended.set()
        for thread in self.threads:
            thread.join()

    def _send_requests(self) -> None:
        while not self.ended.is_set():
            try:
                version, _ = ask(self.home)
                self.versions.add(version)
                self.answered += 1
            except Exception as error:  # any error is a failed request
                self.failed.append(str(error))
            time.sleep(0.1)


def test_1_from_scratch_to_a_served_model(home: Home) -> None:
    output = run(home, data={"demonstration": {"rows": 6000, "locales": FIRST}})
    assert "dates version 1" in output
    agrees(home, "1")
    version, text = ask(home)
    assert version.startswith("dates-")
    assert text.startswith('{"date":')
    assert home.facts()["answers_as_in_evaluation"] == "8 of 8"


def test_2_adapter_on_new_data_is_swapped_in_under_load(home: Home) -> None:
    old = home.desired().serving.names["dates"]
    home.write_recipe(
        data={"demonstration": {"rows": ROWS, "locales": MORE}},
        model={"architecture": None, "base": "models:/dates@champion"},
        training=LORA,
        gate={"metric": "nll", "min_slice_items": 10},
    )
    process = home.start()
    output = wait_for(process, "evaluate: ")  # training needs both cores until then
    with Clients(home) as clients:
        rest, _ = process.communicate(timeout=400)
        output += rest
    assert process.returncode == 0, output
    agrees(home, "2")
    facts = home.facts()
    assert (facts["swap"], facts["served_before"]) == ("adapter", "1"), output
    assert facts["nll"] < facts["nll_base"]
    assert clients.failed == []
    assert clients.versions == {old, home.desired().serving.names["dates"]}
    assert clients.answered >= 16
    assert home.desired().serving.base.version == "1", "the adapter's base"


def test_3_bad_fine_tune_is_rejected(home: Home) -> None:
    output = run(
        home,
        data={"demonstration": {"rows": ROWS, "locales": MORE}},
        model={"architecture": None, "base": "models:/dates/1"},
        training={**LORA, "learning_rate": 0.3},
    )
    assert home.facts()["verdict"] == "rejected"
    assert "roll_out:" not in output
    agrees(home, "2")


def registered(home: Home, of: str, breakage: str) -> tuple[Version, Evaluation]:
    """Register a copy of a version with one part broken, and the evaluation of the original."""
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
    created = client.create_model_version("dates", source=uri, tags=tags)
    digest = uri.rpartition("sha256-")[2]
    version = Version(
        uri=uri, digest=digest, store=store.identity, name="dates", version=str(created.version), run_id=""
    )
    location = store.uri(f"evaluations/sha256-{tags['evaluation_digest']}")
    evaluation = Evaluation(
        uri=location, digest="", store=store.identity, items=64, score=0, score_base=0, exact_match=0, nll=0,
        nll_base=0, json_validity=None, champion=champion(home) or "", verdict="passed", reason="as before", report="",
    )  # fmt: skip
    return version, evaluation


def test_4_model_that_fails_in_serving_is_rolled_back_and_tagged(home: Home) -> None:
    before, problem = home.desired().serving, "gets different tokens than in evaluation"
    version, evaluation = registered(home, "1", "template")
    with pytest.raises(ForgeError, match=problem) as caught:
        roll_out(version, evaluation, SERVING, home.settings, open_store(home.settings))
    assert "serves again; the champion is unchanged" in caught.value.message
    assert home.desired().serving == before
    agrees(home, "2")
    tags = open_registry(home.settings).get_model_version("dates", version.version).tags
    assert problem in tags["rollout_failed"]


def another_base(home: Home) -> dict[str, str]:
    """The manifest entry of a base like version 1, but with other weights."""
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


def test_4_adapter_on_the_wrong_base_is_rolled_back(home: Home) -> None:
    version, evaluation = registered(home, "2", "base")
    with pytest.raises(ForgeError, match=r"does not answer as it did|NLL of expected answers differs"):
        roll_out(version, evaluation, SERVING, home.settings, open_store(home.settings))
    agrees(home, "2")


def test_5_kills_leave_nothing_half_finished(home: Home) -> None:
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
        for left in home.processes():
            if left.pid not in home.serving():
                left.kill()
        target = LocalTarget(home.settings)
        deadline = time.monotonic() + 120
        while home.desired().trial is not None or (target.status() or home).waiting:  # type: ignore[union-attr]
            assert time.monotonic() < deadline
            time.sleep(0.2)
        agrees(home, "2")
    run(home, **changed)
    versions = {entry.version for entry in open_registry(home.settings).search_model_versions("name = 'dates'")}
    assert home.facts()["version"] == max(map(str, versions), key=int)
    agrees(home, home.facts()["version"])


def test_6_rollback_by_hand(home: Home) -> None:
    status, output = home.run("--name", "dates", workflow="rollback")
    assert status == 0, output
    agrees(home, "2")
    status, output = home.run("--name", "dates", "--to", "1", workflow="rollback")
    assert status == 0, output
    agrees(home, "1")
    assert "rolled back by hand from version 2" in promotions(open_store(home.settings), "dates")[-1].why
