"""Data sets are reproducible and split by group, and everything that is rejected, removed or cut is counted."""

import json
import os
import random
import signal
from pathlib import Path

import numpy as np
import psutil
import pytest

from forge.core.contracts import Base, Dataset, Source
from forge.core.digest import digest_directory
from forge.core.errors import ForgeError, Problems
from forge.core.recipe import DataRecipe, Demonstration
from forge.core.settings import Settings
from forge.storage import DirectoryStore
from tasks.preprocess import demonstration, file_formats, worker
from tasks.preprocess.prepare import prepare, prepare_from_shards, prepare_shard
from tests.conftest import chat, write_jsonl
from tests.preprocess.datasets import card_of, data_recipe, prepare_file, source_of
from tests.preprocess.tokenizers import chatml, llama3

ROWS = [chat(f"question {number}", f"answer {number}", group=str(number // 3)) for number in range(300)]
RNG = random.Random(2)


def prepare_rows(path: Path, rows: list, store: DirectoryStore, **options: object) -> Dataset:
    return prepare_file(write_jsonl(path, rows), store, **{"heldout_fraction": 0.1, **options})


def heldout(dataset: Dataset, store: DirectoryStore) -> list[dict]:
    return [json.loads(line) for line in (store.path(dataset.uri) / "heldout.jsonl").read_text().splitlines()]


def sentence(words: int) -> str:
    return " ".join(f"w{RNG.randrange(10**6)}" for _ in range(words))


def test_digest_does_not_depend_on_the_order_of_rows_and_files(store: DirectoryStore, tmp_path: Path) -> None:
    bad = ["not a row", {"messages": []}]
    rows = [*ROWS, *bad, *ROWS[:7], chat("question 4", "answer 4", group="another")]
    digests = set()
    for number in range(4):
        shuffled = random.Random(number).sample(rows, len(rows))
        directory, cut = tmp_path / str(number), 100 * number
        write_jsonl(directory / "a.jsonl", shuffled[cut:])
        if cut:
            write_jsonl(directory / f"{number}.jsonl", shuffled[:cut])
        digests.add(prepare_file(directory, store, heldout_fraction=0.1).digest)
    assert len(digests) == 1
    changed = [*ROWS[:-1], chat("question 299", "another", group="99")]
    assert prepare_rows(tmp_path / "c.jsonl", changed, store).digest not in digests


def test_groups_stay_on_one_side_and_new_rows_move_no_old_ones(store: DirectoryStore, tmp_path: Path) -> None:
    before = prepare_rows(tmp_path / "a.jsonl", ROWS, store)
    held = heldout(before, store)
    assert before.train_rows + before.heldout_rows == len(ROWS)
    groups = {row["group"] for row in held}
    assert len(held) == 3 * len(groups) > 0
    more = [chat(f"new {number}", "x", group=f"new {number}") for number in range(100)]
    after = heldout(prepare_rows(tmp_path / "b.jsonl", [*ROWS, *more], store), store)
    assert [row for row in after if not row["group"].startswith("new")] == held


def test_conversations_with_the_same_first_question_stay_on_one_side(store: DirectoryStore, tmp_path: Path) -> None:
    rows = [chat(question, f"answer {n}") for n in range(100) for question in (f"Question {n}", f"question  {n}")]
    dataset = prepare_rows(tmp_path / "a.jsonl", rows, store)
    questions = [row["messages"][0]["content"].lower().split() for row in heldout(dataset, store)]
    assert len(questions) == dataset.heldout_rows > 0
    assert all(questions.count(question) == 2 for question in questions)


def test_separate_heldout_source(store: DirectoryStore, tmp_path: Path) -> None:
    own = write_jsonl(tmp_path / "own.jsonl", [chat("mine", "m"), chat("question 5", "answer 5")])
    dataset = prepare_rows(tmp_path / "a.jsonl", ROWS, store, heldout_source=own.as_uri())
    assert sorted(row["messages"][0]["content"] for row in heldout(dataset, store)) == ["mine", "question 5"]
    assert dataset.train_rows == 299
    assert card_of(dataset, store)["removed"] == {"in evaluation": 1}
    assert card_of(dataset, store)["split"] == {"by": "a file of its own"}


def test_duplicates_are_counted(store: DirectoryStore, tmp_path: Path) -> None:
    dataset = prepare_rows(tmp_path / "a.jsonl", [*ROWS, *ROWS[:10], *ROWS[:10]], store)
    assert dataset.train_rows + dataset.heldout_rows == 300
    assert card_of(dataset, store)["removed"] == {"duplicate": 20}
    assert card_of(dataset, store)["rows"] == 320


def test_training_rows_that_overlap_heldout_rows_are_removed_but_boilerplate_is_not_overlap(
    store: DirectoryStore, tmp_path: Path
) -> None:
    instruction = sentence(40)
    rows = [chat(f"{instruction} {sentence(20)}", sentence(20), group=str(n)) for n in range(400)]
    clean = prepare_rows(tmp_path / "a.jsonl", rows, store, max_seq_len=2048)
    assert card_of(clean, store)["removed"] == {}
    # The words of a held-out question, in a row of another group.
    leaked = [row["messages"][0]["content"].removeprefix(instruction) for row in heldout(clean, store)[:5]]
    leaks = [chat(f"Now, {text.upper()}!", "something else", group="0") for text in leaked]
    assert "0" not in {row["group"] for row in heldout(clean, store)}
    dataset = prepare_rows(tmp_path / "b.jsonl", [*rows, *leaks], store, max_seq_len=2048)
    assert card_of(dataset, store)["removed"] == {"near evaluation": 5}
    assert dataset.train_rows == clean.train_rows


def test_near_duplicates_are_removed_on_request(store: DirectoryStore, tmp_path: Path) -> None:
    own = write_jsonl(tmp_path / "own.jsonl", [chat("a", "b")])
    rows = [chat(sentence(30), sentence(30)) for n in range(200)]
    near = [chat(row["messages"][0]["content"] + " Indeed.", row["messages"][1]["content"]) for row in rows[:20]]
    options = {"max_seq_len": 2048, "heldout_source": own.as_uri()}
    kept = prepare_rows(tmp_path / "a.jsonl", [*near, *rows], store, **options)
    thinned = prepare_rows(tmp_path / "a.jsonl", [*near, *rows], store, **options, near_duplicates=0.8)
    assert card_of(kept, store)["removed"] == {}
    assert card_of(thinned, store)["removed"] == {"near duplicate": 20}


def test_rejected_rows_are_listed_and_counted(store: DirectoryStore, tmp_path: Path) -> None:
    rows = [*ROWS, "no row", {"messages": []}, {"messages": []}]
    dataset = prepare_rows(tmp_path / "a.jsonl", rows, store)
    listed = [json.loads(line) for line in (store.path(dataset.uri) / "rejects.jsonl").read_text().splitlines()]
    assert [row["row"] for row in listed] == [f"{tmp_path / 'a.jsonl'}:{number}" for number in (301, 302, 303)]
    assert {row["reason"] for row in listed} == {"no conversation"}
    assert card_of(dataset, store)["rejected"] == {"no conversation": 3}


def test_too_many_rejected_rows_are_an_error_with_a_list_of_all(store: DirectoryStore, tmp_path: Path) -> None:
    with pytest.raises(Problems) as caught:
        prepare_rows(tmp_path / "a.jsonl", [*ROWS, *["x"] * 25], store)
    message = caught.value.message
    assert "25 of 325 rows cannot be used (25 no conversation), and data.max_reject_fraction is 0.01" in message
    assert "... and 15 more, all in " in message
    rejects = store.path(message.rpartition("all in ")[2])
    assert len(rejects.read_text().splitlines()) == 25
    assert prepare_rows(tmp_path / "a.jsonl", [*ROWS, *["x"] * 25], store, max_reject_fraction=0.1).train_rows > 0


LONG = {
    "messages": [
        {"role": "system", "content": "be brief"},
        *({"role": role, "content": f"{role} {n} " + "x" * 20} for n in range(6) for role in ("user", "assistant")),
    ],
    "group": "long",
}


def test_long_rows_are_split_between_turns(store: DirectoryStore, tmp_path: Path) -> None:
    whole = prepare_rows(tmp_path / "a.jsonl", [*ROWS, LONG], store, max_seq_len=1024)
    split = prepare_rows(tmp_path / "a.jsonl", [*ROWS, LONG], store, overlong="split")
    assert split.train_rows == whole.train_rows + 5
    before, after = card_of(whole, store), card_of(split, store)
    assert before["roles"]["assistant"] == after["roles"]["assistant"]
    assert before["trained_tokens"] == after["trained_tokens"]
    assert after["roles"]["system"] == 6, "each piece keeps the system message"
    assert after["rejected"] == {}
    assert after["tokens_dropped"] == 0


def test_single_turn_longer_than_the_context_is_rejected(store: DirectoryStore, tmp_path: Path) -> None:
    with pytest.raises(Problems, match="one turn alone is 211 tokens long"):
        prepare_rows(tmp_path / "a.jsonl", [*ROWS[:30], chat("x" * 200, "seven c")], store, overlong="split")


def test_row_is_rejected_if_one_of_its_pieces_does_not_fit(store: DirectoryStore, tmp_path: Path) -> None:
    turns = [("user", "x" * 200), ("assistant", "y"), ("user", "short"), ("assistant", "y")] * 2
    bad = {"messages": [{"role": role, "content": content} for role, content in turns]}
    dataset = prepare_rows(tmp_path / "a.jsonl", [*ROWS, bad], store, overlong="split")
    assert dataset.train_rows + dataset.heldout_rows == len(ROWS)
    assert card_of(dataset, store)["rejected"] == {"over the context": 1}


def test_rows_that_differ_in_the_order_of_keys_are_distinct_rows(store: DirectoryStore, tmp_path: Path) -> None:
    tokenizer = tmp_path / "tokenizer"
    chatml().save_pretrained(tokenizer)

    def call(arguments: dict) -> dict:
        answer = {
            "role": "assistant",
            "content": "",
            "tool_calls": [{"function": {"name": "f", "arguments": arguments}}],
        }
        return {"messages": [{"role": "user", "content": "x"}, answer]}

    rows = [*ROWS, call({"a": 1, "b": 2}), call({"b": 2, "a": 1})]
    options = {"base": Base(location=tokenizer.as_uri()), "max_seq_len": 512}
    forward, backward = (
        prepare_rows(tmp_path / "a.jsonl", list(order), store, **options) for order in (rows, reversed(rows))
    )
    assert forward.digest == backward.digest
    assert forward.train_rows + forward.heldout_rows == len(rows)


def test_every_row_with_a_credential_is_rejected(store: DirectoryStore, tmp_path: Path) -> None:
    rows = [chat("ghp_" + "a1B2c3" * 6, f"b{n}") for n in range(5)]
    dataset = prepare_rows(tmp_path / "a.jsonl", [*ROWS, *rows], store, max_reject_fraction=0.1)
    assert card_of(dataset, store)["rejected"] == {"secret": 5}


def test_long_rows_are_truncated_and_counted(store: DirectoryStore, tmp_path: Path) -> None:
    dataset = prepare_rows(
        tmp_path / "a.jsonl", [*ROWS, chat("a", "b" * 200, group="long")], store, overlong="truncate"
    )
    card = card_of(dataset, store)
    assert (card["documents_cut"], card["tokens_dropped"]) == (1, 77)
    with pytest.raises(Problems, match="no assistant token is left to train on"):
        prepare_rows(tmp_path / "b.jsonl", [*ROWS[:30], chat("a" * 200, "b")], store, overlong="truncate")


def test_plain_texts_are_packed_and_split(store: DirectoryStore, tmp_path: Path) -> None:
    own = write_jsonl(tmp_path / "own.jsonl", [chat("a", "b")])
    rows = [{"text": sentence(4)} for _ in range(20)] + [{"text": sentence(100)}]
    dataset = prepare_rows(tmp_path / "a.jsonl", rows, store, overlong="split", heldout_source=own.as_uri())
    card = card_of(dataset, store)
    assert card["documents"]["train"] > 25
    assert card["rejected"] == {}
    # All tokens are trained except the first of each document.
    assert card["trained_tokens"]["train"] == card["tokens"]["train"] - card["documents"]["train"]


def test_card_and_report_describe_the_data_set(store: DirectoryStore, tmp_path: Path) -> None:
    rows = [{**row, "slice": "ab"[n % 2]} for n, row in enumerate(ROWS)]
    dataset = prepare_rows(tmp_path / "a.jsonl", rows, store)
    card = card_of(dataset, store)
    assert card["digest"] == dataset.digest
    assert card["source"]["shapes"] == [f"chat: {tmp_path / 'a.jsonl'}:1 is chat (it has messages)"]
    assert card["documents"] == {"train": dataset.train_rows, "heldout": dataset.heldout_rows}
    for side, documents in card["documents"].items():
        assert sum(bin["documents"] for bin in card["lengths"][side]) == documents
        assert sum(bin["tokens"] for bin in card["lengths"][side]) == card["tokens"][side]
        assert sum(card["slices"][side].values()) == documents
        number = np.concatenate(
            [np.load(shard / "document.npy") for shard in (store.path(dataset.uri) / side).iterdir()]
        )
        assert np.count_nonzero(number) == card["tokens"][side]
        assert card["packing_efficiency"][side] == round(card["tokens"][side] / number.size, 5)
    page = store.path(dataset.report).read_text()
    assert "<mark>answer" in page
    assert dataset.digest in page


def test_worker_processes_give_the_same_data_set(
    store: DirectoryStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = tmp_path / "tokenizer"
    llama3().save_pretrained(tokenizer)
    base = Base(location=tokenizer.as_uri())
    alone = prepare_rows(tmp_path / "a.jsonl", [*ROWS, "x"], store, base=base, near_duplicates=0.9)
    monkeypatch.setattr(file_formats, "BLOCK", 1500)
    pids = set()
    read = worker.Worker.read
    monkeypatch.setattr(worker.Worker, "read", lambda *args: pids.add(os.getpid()) or read(*args))
    other = DirectoryStore(tmp_path / "other")
    together = prepare_rows(tmp_path / "a.jsonl", [*ROWS, "x"], other, base=base, near_duplicates=0.9)
    assert together.digest == alone.digest
    assert pids == {os.getpid()}, "this process reads only the first blocks; calls in workers are not seen here"
    assert not [child for child in psutil.Process().children() if "tasks.preprocess" in " ".join(child.cmdline())]


def test_killed_worker_is_a_clear_error(store: DirectoryStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(file_formats, "BLOCK", 1500)
    monkeypatch.setattr(worker, "read_block", kill_yourself)
    with pytest.raises(ForgeError, match="a worker process was killed"):
        prepare_rows(tmp_path / "a.jsonl", ROWS, store)
    assert list((store.root / ".staging").iterdir()) == []


def kill_yourself(*_: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize("shards", [2, 5])
def test_shards_give_the_same_bytes(
    shards: int, store: DirectoryStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(file_formats, "BLOCK", 4000)
    rows = [{**row, "slice": f"s{n % 7}"} for n, row in enumerate([*ROWS, *ROWS[:20]])] + ["x"]
    path = write_jsonl(tmp_path / "a.jsonl", rows)
    whole = prepare_file(path, store)
    recipe = data_recipe(path, shards=shards)
    other = DirectoryStore(tmp_path / "other")
    inputs = (source_of(recipe, other), recipe, Base(), other, Settings())
    parts = [prepare_shard(*inputs, shard) for shard in reversed(range(shards))]
    dataset = prepare_from_shards(parts, *inputs)
    assert dataset.digest == whole.digest
    excluded = ("dataset.json", "report.html", "rejects.jsonl")  # they name the source
    assert digest_directory(other.path(dataset.uri), excluded) == digest_directory(store.path(whole.uri), excluded)
    assert not list((other.root / "parts").iterdir()), "the shards are removed"


def test_rows_that_change_while_they_are_read_are_an_error(store: DirectoryStore, tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", ROWS)
    source = Source(uri=path.as_uri(), digest="another", store=store.identity)
    with pytest.raises(ForgeError, match="changed while they were read"):
        prepare(source, DataRecipe(source=str(path), max_seq_len=128), Base(), store, Settings())


@pytest.mark.parametrize("rows", [ROWS[:1], ROWS[:3]])
def test_too_few_rows_to_split(rows: list, store: DirectoryStore, tmp_path: Path) -> None:
    with pytest.raises(ForgeError, match=r"held-out documents.*; neither may be empty"):
        prepare_rows(tmp_path / "a.jsonl", rows, store)


def test_too_many_slices_are_an_error(store: DirectoryStore, tmp_path: Path) -> None:
    rows = [chat(f"{n}", "b", slice=f"{n}") for n in range(1001)]
    with pytest.raises(ForgeError, match="more than 1000 values"):
        prepare_rows(tmp_path / "a.jsonl", rows, store)


def test_demonstration_is_reproducible_and_without_duplicate_prompts() -> None:
    recipe = Demonstration(rows=2000)
    rows = list(demonstration.rows(recipe))
    assert rows == list(demonstration.rows(recipe))
    prompts = [row["messages"][0]["content"] for row in rows]
    assert len(set(prompts)) == len(prompts) > 1900
    assert {row["slice"] for row in rows} == set(recipe.locales)
    assert demonstration.digest(recipe) != demonstration.digest(Demonstration(rows=2001))
