"""What is trained, by chat template: the tables of docs/data.md, and TRL's templates with any texts."""

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.models.families import FAMILIES, UNUSABLE, conversation
from tests.models.table import CONVERSATIONS, TRL, families, family_table, of_trl, on_page, outcome, trl_table
from tests.models.trained import TEXTS, check_trained

STALE = "docs/data.md does not say what is trained now; if that is meant, run: python -m tests.models.table"
needs_trl = pytest.mark.skipif(not TRL, reason="needs TRL's templates: make .venv-trl")


def test_the_page_says_what_is_trained_of_each_family() -> None:
    page = on_page("families")
    assert page == family_table(), STALE
    names = [name for row in re.findall(r"^\| ([^|]+) \|", page, re.MULTILINE)[1:] for name in row.split("; ")]
    assert sorted(names) == sorted([*FAMILIES, *UNUSABLE])


@pytest.mark.parametrize("name", UNUSABLE)
def test_a_template_that_cannot_be_used_is_rejected_before_any_row(name: str) -> None:
    assert list(outcome(families()[name])) == [""]


@pytest.mark.parametrize("name", FAMILIES)
def test_some_conversations_are_trained_with_every_family(name: str) -> None:
    found = outcome(families()[name])
    assert found.keys() == CONVERSATIONS.keys()
    assert any(isinstance(turns, list) and turns[-1] for turns in found.values())


@needs_trl
def test_the_page_says_what_is_trained_with_each_of_trls_templates() -> None:
    page = on_page("trl")
    assert page == trl_table(), STALE
    assert all(re.search(rf"\b{path.stem}\b", page) for path in TRL)


@needs_trl
@pytest.mark.parametrize("name", [path.stem for path in TRL if path.stem.endswith("_training")])
def test_trls_templates_for_training_train_what_the_published_ones_do(name: str) -> None:
    """Where both train a turn, it is the same text, whether or not there are generation blocks."""
    tokenizers = of_trl()
    one, other = outcome(tokenizers[name]), outcome(tokenizers[name.removesuffix("_training")])
    for conversation_name in one.keys() & other.keys():
        turns, others = one[conversation_name], other[conversation_name]
        if isinstance(turns, list) and isinstance(others, list):
            assert all(None in pair or pair[0] == pair[1] for pair in zip(turns, others, strict=True))


@needs_trl
@settings(deadline=None, max_examples=100)
@given(data=st.data())
def test_a_trained_turn_of_trls_templates_has_all_of_its_message(data: st.DataObject) -> None:
    name, texts = data.draw(st.sampled_from([path.stem for path in TRL])), [data.draw(TEXTS) for _ in range(4)]
    messages = conversation(*texts)
    if data.draw(st.booleans()):
        messages[-1]["reasoning_content"] = data.draw(TEXTS)
    check_trained(of_trl()[name], messages)
