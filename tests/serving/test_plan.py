"""What a rollout changes, derived from the package."""

from pathlib import Path

import pytest

from forge.core.contracts import Engine
from forge.core.errors import ForgeError
from forge.serving.desired import Served, Serving
from forge.serving.plan import loading_state, plan, remove
from tests.serving.states import WEIGHTS, adapter_of, serving, version

ENGINE = Engine(max_loras=4)


def test_the_first_weights_are_served_with_the_recipe_s_options() -> None:
    one = version(1)
    after = plan(Serving(), one, WEIGHTS, ENGINE)
    assert after == Serving(base=one, engine=ENGINE, names={"dates": one.versioned})
    assert loading_state(Serving(), after).names == {}, "no name leads there before it is proved"


def test_an_adapter_of_the_base_that_serves_is_loaded_beside_it() -> None:
    one, two = version(1), version(2)
    before = serving(one)
    after = plan(before, two, adapter_of(one), ENGINE)
    assert after == Serving(base=one, engine=before.engine, adapters=(two,), names={"dates": two.versioned})
    between = loading_state(before, after)
    assert between.adapters == (two,)
    assert between.names == {"dates": one.versioned}


def test_an_adapter_takes_the_place_of_the_one_before_which_stays_until_the_name_has_moved() -> None:
    one, two, three = version(1), version(2), version(3)
    before = serving(one, two)
    after = plan(before, three, adapter_of(one), ENGINE)
    assert after.adapters == (three,)
    assert loading_state(before, after).adapters == (two, three)
    assert loading_state(before, after).names == {"dates": two.versioned}


def test_the_base_itself_takes_a_name_back_by_moving_it() -> None:
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


def test_other_weights_take_the_base_s_place() -> None:
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


@pytest.mark.parametrize("location", ["file:///data/a%20base", "/data/a base"])  # as manifests say it, and said it
def test_a_base_may_be_a_directory_of_this_machine(location: str) -> None:
    manifest = {"kind": "adapter", "base": {"location": location, "revision": "e" * 64}}
    base = plan(Serving(), version(2), manifest, ENGINE).base
    assert base == Served(name="a base", version="", uri="file:///data/a%20base", digest="e" * 64)
    assert base.directory == Path("/data/a base")
    assert version(1).directory is None, "a package is fetched and verified, wherever the store is"


def test_vllm_is_started_anew_for_an_adapter_that_its_slots_do_not_hold_if_the_recipe_grants_more() -> None:
    one, two = version(1), version(2)
    before = serving(one)
    wide = {**adapter_of(one), "rank": 64}
    assert plan(before, two, wide, Engine(max_lora_rank=64, max_loras=1)).engine == Engine(max_lora_rank=64)
    assert plan(before, two, wide, ENGINE).engine == before.engine, "which the fit check refuses"
    assert plan(before, two, {**wide, "rank": 8}, Engine(max_lora_rank=64)).engine == before.engine


def test_nobody_s_name_is_taken_away() -> None:
    base = version(1, "llama")
    before = serving(base, version(2), version(3, "times"), names={"dates": version(2), "times": version(3, "times")})
    ways = r"take away times\. .* serving\.replaces, .* serving\.rollout: false .* tasks\.rollout remove NAME"
    with pytest.raises(ForgeError, match=ways):
        plan(before, version(4), WEIGHTS, ENGINE)


def test_names_that_the_recipe_replaces_are_taken_away_where_they_would_lead_nowhere() -> None:
    base = version(1, "llama")
    before = serving(base, version(2), version(3, "times"))
    four = version(4)
    with pytest.raises(ForgeError, match="take away times") as refused:
        plan(before, four, WEIGHTS, ENGINE, ["llama"])
    assert "llama," not in refused.value.message
    after = plan(before, four, WEIGHTS, ENGINE, ["llama", "times", "nobody"])
    assert after == Serving(base=four, engine=ENGINE, names={"dates": four.versioned})
    beside = plan(before, four, adapter_of(base), ENGINE, ["llama", "times"])
    assert set(beside.names) == {"llama", "dates", "times"}, "what has a place stays"


def test_what_serves_already_changes_nothing() -> None:
    one, two = version(1), version(2)
    before = serving(one, two)
    assert plan(before, two, adapter_of(one), ENGINE) == before
    assert plan(serving(one), one, WEIGHTS, ENGINE) == serving(one)


def test_a_package_that_was_registered_twice_is_there_once() -> None:
    one, two = version(1), version(2)
    again = two.model_copy(update={"version": "9"})
    assert plan(serving(one, two), again, adapter_of(one), ENGINE).adapters == (again,)


def test_a_name_is_removed_with_its_adapter_and_the_base_with_the_last_one() -> None:
    one, two = version(1, "llama"), version(2)
    assert remove(serving(one, two), "dates") == serving(one)
    assert remove(serving(one), "llama") == Serving()
