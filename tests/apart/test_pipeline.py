"""The packaged workflows on a cluster whose pods share nothing but the store, MLflow and the API server."""

import json
import re
import shutil

import pytest
from openai import OpenAI

from forge.core.settings import Settings
from forge.registry.mlflow_registry import CHALLENGER, open_registry, version_of
from tests.apart.conftest import FIRST_SERVED, PIPELINE, Cluster, recipe
from tests.apart.flyte import Flyte
from tests.apart.pods import Pods

pytestmark = pytest.mark.long
CACHED = {"preprocess", "train/n0/n1", "evaluate"}


def registry(cluster: Cluster):
    return open_registry(Settings(mlflow_uri=cluster.services.urls["http://mlflow.ml-platform:5000"]))


def test_the_first_model_takes_the_place_of_what_a_cluster_serves_at_first(story: Cluster) -> None:
    first = story.ran["first"]
    assert first.phase == "SUCCEEDED", first.error
    assert first.value() == f"{story.services.urls['http://vllm.ml-inference:8000']}/v1"
    assert set(first.cache()) == CACHED
    assert set(first.cache().values()) == {"POPULATED"}
    deployment = first.of("roll_out").value()
    assert (deployment["name"], deployment["version"], deployment["how"]) == ("dates", "1", "weights")
    assert FIRST_SERVED not in story.services.desired()["serving"]["names"]


def test_the_same_run_computes_nothing_again(story: Cluster) -> None:
    again = story.ran["again"]
    assert again.phase == "SUCCEEDED", again.error
    assert again.cache() == dict.fromkeys(CACHED, "HIT")
    assert again.of("roll_out").value()["how"] == "unchanged"
    assert "evaluate_model cached" in again.of("summarise").log


def test_an_adapter_is_swapped_in_after_a_drain(story: Cluster) -> None:
    ran = story.ran["adapter"]
    assert ran.phase == "SUCCEEDED", ran.error
    training = ran.of("train_on_1x2")
    assert training.attempts == 2
    assert re.search(r"resuming after step \d+", training.log)
    assert (
        len([one for one in ran.nodes.values() if one.task.endswith("read_shard") or "map_read_shard" in one.task]) >= 2
    )
    deployment = ran.of("roll_out").value()
    assert (deployment["version"], deployment["how"], deployment["previous"]) == ("2", "adapter", "1")


def test_a_worse_model_is_refused(story: Cluster) -> None:
    refused = story.ran["refused"]
    assert refused.phase == "SUCCEEDED", refused.error
    assert refused.value().startswith("rejected")
    assert refused.of("announce_rejection").phase == "SUCCEEDED"
    assert "nothing was registered or rolled out; version 2 stays the champion" in refused.of("announce_rejection").log


def test_the_champion_is_checked_taken_back_and_kept(story: Cluster) -> None:
    for title in ("check", "rollback", "retention"):
        assert story.ran[title].phase == "SUCCEEDED", story.ran[title].error
    assert "dates version 2 scores" in story.ran["check"].value()
    assert story.ran["check"].cache() == {"n1": "HIT"}
    assert story.ran["rollback"].value()["version"] == "1"
    assert story.ran["retention"].value() == [], "an adapter's base, the champion and the last version stay"


def test_what_failed_is_reported_given_back_and_goes_on(story: Cluster) -> None:
    failed, twice, recovered = (story.ran[title] for title in ("failed", "failed again", "recovered"))
    for execution in (failed, twice):
        assert execution.phase == "FAILED"
        assert "did not serve within 10 s (the reconciler does not answer)" in execution.error
    said = failed.of("report_failure").log
    assert f"--recover {failed.name}" in said
    assert "did not serve within 10 s" in said
    assert twice.of("report_failure").phase == "RECOVERED", "Flyte does not run it again"
    assert "did not serve within 10 s" in twice.of("roll_out").log
    assert twice.of("train_on_1x2").phase == "RECOVERED"
    assert recovered.phase == "SUCCEEDED", recovered.error
    client = registry(story)
    assert version_of(client, "dates", CHALLENGER) is None, "who failed has dropped it"
    assert "rollout_failed" not in client.get_model_version("dates", "3").tags


def test_the_model_answers_under_its_public_name(story: Cluster) -> None:
    client = OpenAI(base_url=f"{story.services.urls['http://vllm.ml-inference:8000']}/v1", api_key="EMPTY")
    answer = client.chat.completions.create(
        model="dates", messages=[{"role": "user", "content": "NL: 20 juni 1969"}], max_tokens=32
    )
    assert answer.model == f"dates-{registry(story).get_model_version('dates', '3').tags['package_digest'][:12]}"


def test_everyone_did_only_what_their_policy_allows(story: Cluster) -> None:
    assert story.services.denied == []


def test_successful_tasks_write_no_errors(story: Cluster) -> None:
    for title, execution in story.ran.items():
        for path, ran in execution.nodes.items():
            if ran.phase == "SUCCEEDED" and ran.attempts == 1:
                lines = [line for line in ran.log.splitlines() if re.search(r"\bERROR\b|Unclosed|Traceback", line)]
                assert lines == [], f"{title}: {path}"


def test_the_summary_names_what_can_be_reached_from_a_cluster(story: Cluster) -> None:
    said = story.ran["first"].of("summarise").log
    for part in (
        "curl http://",
        "/#/models/dates/versions/1 (run ",
        "flytectl get execution -p homelab",
        "s3://models/",
    ):
        assert part in said
    assert "make " not in said
    assert "/var/lib/forge" not in said


def test_in_development_a_run_ends_with_a_challenger_of_its_own(story: Cluster) -> None:
    pods = Pods(story.project, story.services, story.folder / "development-pods")
    flyte = Flyte(story.package, pods, domain="development")
    ran = flyte.run(PIPELINE, {"data_path": "", "recipe": recipe()})
    assert ran.phase == "SUCCEEDED", ran.error
    assert ran.value() == "dates-development version 1"
    assert version_of(registry(story), "dates-development", CHALLENGER) == "1"
    assert "dates-development" not in json.dumps(story.services.desired())
    experiments = {one.name for one in registry(story).search_experiments()}
    assert {"dates-development", "forge-evaluation-development"} <= experiments


def test_code_that_is_sent_runs_and_recipes_beside_it_are_found(story: Cluster) -> None:
    copy, flyte = story.changed(
        "sent",
        ("tasks/preflight/checks.py", "problems: list[str] = []", 'problems: list[str] = []; print("sent code")'),
    )
    (copy / "recipes" / "mine.yaml").write_text(recipe(name="mine", serving={"rollout": False}))
    shutil.copy(story.project / ".dockerignore", copy)
    sent = Flyte(flyte.package, story.flyte.pods)  # the images are those without the change
    ran = sent.run(PIPELINE, {"data_path": "", "recipe": "mine"}, sent=copy, until="preprocess_data")
    assert ran.phase == "STOPPED", ran.error
    assert "sent code" in ran.of("preflight").log
    assert ran.of("preflight").value("name") == "mine"


def test_gpus_that_were_asked_for_and_are_not_there_end_a_training(story: Cluster) -> None:
    pods = Pods(story.project, story.services, story.folder / "gpu-pods", gpus=True)
    flyte = Flyte(story.package, pods)
    flyte.catalog = {key: one for key, one in story.flyte.catalog.items() if "o0" in one}
    text = recipe(training={"seed": 7}, serving={"rollout": False})
    ran = flyte.run(PIPELINE, {"data_path": "", "recipe": text})
    assert ran.phase == "FAILED"
    assert ran.of("train_on_1x2").phase == "FAILED"
    assert "this pod requested 2, and torch sees 0" in ran.error


def test_a_whole_pipeline_takes_a_few_minutes(story: Cluster) -> None:
    """No limit is asserted, as machines differ; `-s` shows the times."""
    print({title: round(seconds) for title, seconds in story.seconds.items()})
    assert set(story.seconds) == set(story.ran)
