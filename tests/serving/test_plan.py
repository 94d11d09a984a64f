"""The state of the server after a rollout or a removal."""

from pathlib import Path

import pytest

from forge.core.contracts import Engine
from forge.core.errors import ForgeError
from forge.serving.desired import Served, Serving
from forge.serving.plan import loading_state, plan, remove
from tests.serving.states import WEIGHTS, adapter_of, serving, version

ENGINE = Engine(max_loras=4)


def test_the_first_model_is_served_with_the_options_of_the_recipe() -> None:
    one = version(1)
    after = plan(Serving(), one, WEIGHTS, ENGINE)
    assert after == Serving(base=one, engine=ENGINE, names={"dates": one.versioned})
    assert loading_state(Serving(), after).names == {}, "no name points to it before it is proved"


def test_an_adapter_of_the_current_base_is_loaded_on_it() -> None:
    one, two = version(1), version(2)
    before = serving(one)
    after = plan(before, two, adapter_of(one), ENGINE)
    assert after == Serving(base=one, engine=before.engine, adapters=(two,), names={"dates": two.versioned})
    between = loading_state(before, after)
    assert between.adapters == (two,)
    assert between.names == {"dates": one.versioned}


def test_the_previous_adapter_stays_until_the_name_has_moved() -> None:
    one, two, three = version(1), version(2), version(3)
    before = serving(one, two)
    after = plan(before, three, adapter_of(one), ENGINE)
    assert after.adapters == (three,)
    assert loading_state(before, after).adapters == (two, three)
    assert loading_state(before, after).names == {"dates": two.versioned}


def test_rolling_out_the_base_of_an_adapter_only_moves_the_name() -> None:
    one, two = version(1), version(2)
    after = plan(serving(one, two), one, WEIGHTS, ENGINE)
    assert after == Serving(base=one, adapters=(), names={"dates": one.versioned})


def test_other_names_keep_their_adapters() -> None:
    base, dates, times = version(1, "llama"), version(2), version(3, "times")
    before = serving(base, dates, times)
    newer = version(4)
    after = plan(before, newer, adapter_of(base), ENGINE)
    assert after.names == {"llama": base.versioned, "dates": newer.versioned, "times": times.versioned}
    assert after.adapters == (times, newer)


def test_another_model_replaces_the_base() -> None:
    one, two = version(1), version(2)
    before = serving(one)
    after = plan(before, two, WEIGHTS, ENGINE)
    assert after == Serving(base=two, engine=ENGINE, names={"dates": two.versioned})
    assert loading_state(before, after) == after.model_copy(update={"names": {}})


def test_an_adapter_of_another_base_brings_its_base() -> None:
    hub = {"kind": "adapter", "base": {"location": "meta-llama/Llama-3.1-8B-Instruct", "revision": "0e9e39f249a1"}}
    two = version(2)
    after = plan(serving(version(1)), two, hub, ENGINE)
    assert after.base == Served(
        name="Llama-3.1-8B-Instruct",
        version="",
        uri="meta-llama/Llama-3.1-8B-Instruct",
        digest="0e9e39f249a1",
    )
    assert after.base.versioned == "Llama-3.1-8B-Instruct-0e9e39f249a1"
    assert (after.adapters, after.names) == ((two,), {"dates": two.versioned})
    assert plan(Serving(), version(3), adapter_of(version(1)), ENGINE).base == version(1).model_copy(
        update={"version": ""}
    )


@pytest.mark.parametrize(
    "location", ["file:///data/a%20base", "/data/a base"]
)  # in manifests of this release, and of older ones
def test_a_base_can_be_a_directory_of_this_machine(location: str) -> None:
    manifest = {"kind": "adapter", "base": {"location": location, "revision": "e" * 64}}
    base = plan(Serving(), version(2), manifest, ENGINE).base
    assert base == Served(name="a base", version="", uri="file:///data/a%20base", digest="e" * 64)
    assert base.directory == Path("/data/a base")
    assert version(1).directory is None, "a package is always fetched and verified"


def test_vllm_is_restarted_for_an_adapter_beyond_its_slots_if_the_recipe_allows_more() -> None:
    one, two = version(1), version(2)
    before = serving(one)
    wide = {**adapter_of(one), "rank": 64}
    assert plan(before, two, wide, Engine(max_lora_rank=64, max_loras=1)).engine == Engine(max_lora_rank=64)
    assert plan(before, two, wide, ENGINE).engine == before.engine, "the memory check then refuses the rollout"
    assert plan(before, two, {**wide, "rank": 8}, Engine(max_lora_rank=64)).engine == before.engine


def test_other_public_names_are_not_removed() -> None:
    base = version(1, "llama")
    before = serving(base, version(2), version(3, "times"), names={"dates": version(2), "times": version(3, "times")})
    with pytest.raises(ForgeError, match="would remove times") as refused:
        plan(before, version(4), WEIGHTS, ENGINE)
    for way in ("serving.replaces", "serving.rollout: false", "forge remove NAME"):
        assert way in refused.value.fix


def test_names_that_the_recipe_replaces_are_removed_if_they_would_point_to_nothing() -> None:
    base = version(1, "llama")
    before = serving(base, version(2), version(3, "times"))
    four = version(4)
    with pytest.raises(ForgeError, match="would remove times") as refused:
        plan(before, four, WEIGHTS, ENGINE, ["llama"])
    assert "llama," not in refused.value.message
    after = plan(before, four, WEIGHTS, ENGINE, ["llama", "times", "absent"])
    assert after == Serving(base=four, engine=ENGINE, names={"dates": four.versioned})
    adapter_state = plan(before, four, adapter_of(base), ENGINE, ["llama", "times"])
    assert set(adapter_state.names) == {"llama", "dates", "times"}, "names whose models stay are kept"


def test_rolling_out_the_current_version_changes_nothing() -> None:
    one, two = version(1), version(2)
    before = serving(one, two)
    assert plan(before, two, adapter_of(one), ENGINE) == before
    assert plan(serving(one), one, WEIGHTS, ENGINE) == serving(one)


def test_a_package_that_was_registered_twice_is_loaded_once() -> None:
    one, two = version(1), version(2)
    again = two.model_copy(update={"version": "9"})
    assert plan(serving(one, two), again, adapter_of(one), ENGINE).adapters == (again,)


def test_a_name_is_removed_with_its_adapter_and_the_last_name_with_the_base() -> None:
    one, two = version(1, "llama"), version(2)
    assert remove(serving(one, two), "dates") == serving(one)
    assert remove(serving(one), "llama") == Serving()
