"""A model's answers and NLL are those of plain transformers, and which held-out rows it answers."""

import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel

from forge.core.errors import ForgeError
from forge.core.recipe import Check, EvaluationRecipe
from forge.models.chat import ChatTokenizer
from forge.registry.packages import LocalBase
from tasks.evaluate.answer import Answer, TransformersEngine, answer_with_transformers, batches
from tasks.evaluate.ask import Asked, ask, ask_all
from tasks.evaluate.items import Item, digest_items, read_items
from tests.conftest import Trained, chat, write_jsonl
from tests.finetune.job import CONFIGS, write_base

EXACT = Check(kind="exact")
LONGER = Item(
    [
        {"role": "system", "content": "Dates."},
        {"role": "user", "content": "EN: May 1, 1999"},
        {"role": "assistant", "content": "1999"},
        {"role": "user", "content": "And as JSON?"},
    ],
    '{"date":"1999-05-01"}',
    "en",
    EXACT,
)


@pytest.fixture
def items(trained: Trained) -> list[Item]:
    found, _ = read_items(trained.store.path(trained.dataset.uri) / "heldout.jsonl", 11, None)
    return [*found, LONGER]


@pytest.fixture
def directory(trained: Trained) -> Path:
    return trained.store.path(trained.model.uri) / "model"


def answers(
    directory: Path, items: list[Item], batch_size: int, devices: tuple = ("cpu",), **options: int
) -> list[Answer]:
    recipe = EvaluationRecipe(max_new_tokens=32, batch_size=batch_size, **options)
    of = LocalBase(str(directory))
    return answer_with_transformers(of, ask_all(of, items), recipe, devices, lambda done: None)


def test_batched_answers_equal_those_of_single_prompts(directory: Path, items: list[Item]) -> None:
    together, alone = answers(directory, items, 12), answers(directory, items, 1)
    assert [(a.text, a.tokens, a.ended) for a in together] == [(a.text, a.tokens, a.ended) for a in alone]
    for one, other in zip(together, alone, strict=True):
        assert one.nll == pytest.approx(other.nll, rel=1e-5)


# https://github.com/huggingface/text-generation-inference/issues/1765
def test_padding_is_not_penalised(tmp_path: Path) -> None:
    """The padding token is often the end token, which a repetition penalty would keep from ending a padded answer."""
    base = write_base(CONFIGS["llama"], tmp_path / "base")
    tokenizer = AutoTokenizer.from_pretrained(base)
    end, tokenizer.pad_token = tokenizer.eos_token_id, None
    tokenizer.save_pretrained(base)
    weights = load_file(base / "model.safetensors")
    weights["lm_head.weight"][end] *= 2.5  # so that answers do end
    save_file(weights, base / "model.safetensors", {"format": "pt"})
    (base / "generation_config.json").write_text(json.dumps({"eos_token_id": end, "repetition_penalty": 1.3}))
    engine = TransformersEngine(LocalBase(str(base)), EvaluationRecipe(max_new_tokens=24), "cpu")
    draw = torch.Generator().manual_seed(3)
    prompts = [torch.randint(8, 250, (4 + at % 29,), generator=draw).tolist() for at in range(48)]
    together, alone = engine.generate(prompts), [engine.generate([prompt])[0] for prompt in prompts]
    assert sum(tokens[-1] == end for tokens in alone) > 10
    assert sum(one != other for one, other in zip(together, alone, strict=True)) <= 1  # a tie can go either way


def test_answers_stop_where_the_servers_do_and_nothing_else_of_the_generation_config_counts(tmp_path: Path) -> None:
    base = write_base(CONFIGS["llama"], tmp_path / "base")
    end = AutoTokenizer.from_pretrained(base).eos_token_id
    options = {"num_beams": 3, "suppress_tokens": list(range(6, 200)), "min_new_tokens": 20}
    of = LocalBase(str(base))
    found = []
    for config in ({"eos_token_id": 0}, {"eos_token_id": 0, **options}):
        (base / "generation_config.json").write_text(json.dumps(config))
        engine = TransformersEngine(of, EvaluationRecipe(max_new_tokens=24), "cpu")
        assert engine.ends == {0, end}
        found.append(engine.generate([[60, 70, 80], [90]]))
    assert found[0] == found[1]


def test_two_devices_answer_like_one(directory: Path, items: list[Item]) -> None:
    """Two processes, here both on the CPU."""
    progress: list[int] = []
    recipe = EvaluationRecipe(max_new_tokens=32, batch_size=5)
    of = LocalBase(str(directory))
    found = answer_with_transformers(of, ask_all(of, items), recipe, ("cpu", "cpu"), progress.append)
    assert [a.text for a in found] == [a.text for a in answers(directory, items, 5)]
    assert sorted(progress) == progress
    assert progress[-1] == len(items)


def test_greedy_answers_are_those_of_transformers(directory: Path, items: list[Item]) -> None:
    tokenizer = AutoTokenizer.from_pretrained(directory)
    model = AutoModelForCausalLM.from_pretrained(directory)
    for item, answer in zip(items, answers(directory, items, 5), strict=True):
        prompt = torch.tensor([ask(ChatTokenizer(tokenizer, "test"), item).prompt])
        output = model.generate(prompt, do_sample=False, max_new_tokens=32, pad_token_id=0)[0, prompt.shape[1] :]
        assert answer.text == tokenizer.decode(output, skip_special_tokens=True)
        assert answer.ended == (output[-1] == model.generation_config.eos_token_id)
        assert answer.tokens == len(output)


def test_nll_is_the_loss_of_transformers(directory: Path, items: list[Item]) -> None:
    tokenizer = AutoTokenizer.from_pretrained(directory)
    model = AutoModelForCausalLM.from_pretrained(directory)
    for item, answer in zip(items, answers(directory, items, 5), strict=True):
        asked = ask(ChatTokenizer(tokenizer, "test"), item)
        whole = torch.tensor([asked.whole])
        labels = torch.full_like(whole, -100)
        labels[0, asked.scored] = whole[0, asked.scored]
        with torch.no_grad():
            loss = model(input_ids=whole, labels=labels).loss.item()
        assert answer.nll / answer.nll_tokens == pytest.approx(loss, rel=1e-5)


def test_the_assistant_turns_are_scored_with_their_end_tokens(directory: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(directory)
    asked = ask(ChatTokenizer(tokenizer, "test"), LONGER)
    end = tokenizer.eos_token
    assert tokenizer.decode([asked.whole[place] for place in asked.scored]) == f"1999{end}{LONGER.expected}{end}"
    prompt = tokenizer.apply_chat_template(LONGER.messages, add_generation_prompt=True, return_dict=False)
    assert asked.whole[: len(asked.prompt)] == asked.prompt == prompt


def test_scored_tokens_are_the_trained_ones_of_the_held_out_set(trained: Trained, directory: Path) -> None:
    """All rows of the demonstration: from the packed rows that training reads, and as evaluation tokenizes them."""
    dataset = trained.store.path(trained.dataset.uri)
    packed = []
    for shard in (dataset / "heldout").iterdir():
        tokens, targets, document = (np.load(shard / f"{name}.npy") for name in ("tokens", "trained", "document"))
        for row in range(len(tokens)):
            for number in range(1, document[row].max() + 1):
                part = document[row] == number
                packed.append((tokens[row][part].tolist(), np.flatnonzero(targets[row][part]).tolist()))
    items, skipped = read_items(dataset / "heldout.jsonl", 10**6, None)
    assert skipped == 0
    asked = ask_all(LocalBase(str(directory)), items)
    assert sorted(packed) == sorted((one.whole, one.scored) for one in asked)


def test_sampled_answers_are_reproducible(directory: Path, items: list[Item]) -> None:
    first, again = answers(directory, items, 12, samples=2), answers(directory, items, 12, samples=2)
    assert [a.samples for a in first] == [a.samples for a in again]
    assert all(len(answer.samples) == 2 for answer in first)
    assert any(answer.samples[0] != answer.samples[1] for answer in first)
    assert [a.text for a in first] == [a.text for a in answers(directory, items, 12)]


def test_a_conversation_over_the_context_gets_an_empty_answer(directory: Path, items: list[Item]) -> None:
    long = Item([{"role": "user", "content": "x" * 500}], "y", "en", EXACT)
    *rest, last = answers(directory, [*items, long], 20)
    assert (last.text, last.ended) == ("", False)
    assert math.isnan(last.nll)
    assert [a.text for a in rest] == [a.text for a in answers(directory, items, 20)]


def test_nll_in_small_batches_is_the_same(directory: Path, items: list[Item], monkeypatch: pytest.MonkeyPatch) -> None:
    whole = answers(directory, items, 12)
    monkeypatch.setattr("tasks.evaluate.answer.LOGITS_BYTES", 1)
    model = TransformersEngine(LocalBase(str(directory)), EvaluationRecipe(max_new_tokens=4), "cpu")
    asked = [ask(ChatTokenizer(model.tokenizer, "test"), item) for item in items]
    assert model.nll(asked) == pytest.approx([answer.nll for answer in whole], rel=1e-5)


def with_template(directory: Path, to: Path, template: str) -> LocalBase:
    """The model with another chat template."""
    shutil.copytree(directory, to)
    (to / "chat_template.jinja").write_text(template)
    return LocalBase(str(to))


def test_a_conversation_that_the_template_rejects_is_not_answered(
    directory: Path, items: list[Item], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Many templates have no system role: their servers answer such a request with an error."""
    rejecting = "{% if messages[0].role == 'system' %}{{ raise_exception('no system here') }}{% endif %}"
    template = (directory / "chat_template.jinja").read_text()
    of = with_template(directory, tmp_path / "some", rejecting + template)
    asked = ask_all(of, items)
    assert asked[:-1] == ask_all(LocalBase(str(directory)), items)[:-1]
    assert asked[-1] == Asked([], [], [])
    assert "1 of 12 conversations cannot be scored (the chat template rejects the row: no system here)" in caplog.text
    *rest, last = answer_with_transformers(
        of, asked, EvaluationRecipe(max_new_tokens=32, batch_size=5), ("cpu",), lambda done: None
    )
    assert (last.text, last.tokens, last.ended, last.nll_tokens) == ("", 0, False, 0)
    assert math.isnan(last.nll)
    assert [answer.text for answer in rest] == [answer.text for answer in answers(directory, items, 5)[:-1]]

    all_of_them = with_template(directory, tmp_path / "all", "{{ raise_exception('not today') }}")
    with pytest.raises(ForgeError, match=r"all: none of the 12 conversations can be scored \(.*: not today\)"):
        ask_all(all_of_them, items)


def test_templates_write_the_same_date_every_day(directory: Path, items: list[Item], tmp_path: Path) -> None:
    template = (directory / "chat_template.jinja").read_text()
    of = with_template(directory, tmp_path / "dated", "{{ strftime_now('%d %b %Y') }}" + template)
    (first, *_) = ask_all(of, items)
    assert AutoTokenizer.from_pretrained(directory).decode(first.prompt).startswith("26 Jul 2024")


def test_no_row_of_a_batch_is_padded_beyond_the_context(directory: Path, items: list[Item], tmp_path: Path) -> None:
    """Learned positions end with the context; one prompt nearly fills it, and the others continue."""
    copy = tmp_path / "learned"
    shutil.copytree(directory, copy)
    tokenizer = AutoTokenizer.from_pretrained(copy)
    torch.manual_seed(0)
    ends = {"bos_token_id": tokenizer.eos_token_id, "eos_token_id": tokenizer.eos_token_id}
    config = GPT2Config(n_positions=128, n_embd=32, n_layer=1, n_head=2, vocab_size=len(tokenizer), **ends)
    GPT2LMHeadModel(config).save_pretrained(copy)
    filling = [Item([{"role": "user", "content": "x" * count}], "", "en", EXACT) for count in range(80, 130, 7)]
    together, alone = answers(copy, [*items, *filling], 99), answers(copy, [*items, *filling], 1)
    assert [(a.text, a.tokens, a.ended) for a in together] == [(a.text, a.tokens, a.ended) for a in alone]
    assert {a.tokens for a in together} >= {0, 32}
    assert any(0 < a.tokens < 32 for a in together), "the context cut some answers short"


@pytest.mark.parametrize("devices", [("cpu",), ("cpu", "cpu")])
def test_broken_weights_are_one_message(directory: Path, items: list[Item], tmp_path: Path, devices: tuple) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(directory, broken)
    (broken / "model.safetensors").write_bytes(b"not weights")
    with pytest.raises(ForgeError, match="broken cannot be loaded: "):
        answers(broken, items, 4, devices)


def test_a_missing_model_is_one_message(tmp_path: Path, items: list[Item]) -> None:
    with pytest.raises(ForgeError, match=r"model .*nowhere: the tokenizer cannot be loaded"):
        answers(tmp_path / "nowhere", items, 4)


def test_batches_contain_each_item_once_sorted_by_length() -> None:
    assert list(batches([3, 9, 1, 9, 4], 2)) == [[1, 3], [4, 0], [2]]


def test_rows_set_their_check_and_some_are_skipped(tmp_path: Path) -> None:
    call = {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": {"name": "f"}}]}
    rows = [
        {**chat("a", '{"x": 1}'), "slice": "s"},
        {"text": "plain", "slice": "s"},
        {**chat("b", "word"), "slice": "s", "check": {"kind": "number", "tolerance": 0.1}},
        {"messages": [{"role": "user", "content": "c"}, call], "slice": "s"},
        {**chat("d", "word"), "slice": "t", "tools": [{"name": "f"}]},
        {**chat("e", "word"), "slice": "t"},
    ]
    path = write_jsonl(tmp_path / "heldout.jsonl", rows)
    items, skipped = read_items(path, 4, None)
    assert skipped == 2
    assert [item.question for item in items] == ["a", "b", "d", "e"]
    assert [item.check.kind for item in items] == ["json", "number", "exact", "exact"]
    assert items[2].tools == [{"name": "f"}]
    others, _ = read_items(path, 4, Check(kind="rouge"))
    assert [item.check.kind for item in others] == ["rouge", "number", "rouge", "rouge"]
    assert digest_items(others) != digest_items(items)
