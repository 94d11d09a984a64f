"""The store in a directory: artifacts are complete or absent, and equal contents have equal digests."""

import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from forge.core.digest import digest_directory, digest_json
from forge.core.errors import ForgeError
from forge.core.processes import this_process
from forge.storage import DirectoryStore


def test_each_store_keeps_its_own_identity(tmp_path: Path) -> None:
    first = DirectoryStore(tmp_path / "a")
    assert DirectoryStore(tmp_path / "a").identity == first.identity
    assert DirectoryStore(tmp_path / "b").identity != first.identity


def test_publish_moves_a_complete_directory(store: DirectoryStore) -> None:
    with store.stage() as staged:
        (staged / "sub").mkdir()
        (staged / "sub" / "file").write_text("content")
        uri = store.publish(staged, "things")
    assert (store.path(uri) / "sub" / "file").read_text() == "content"
    assert list((store.root / ".staging").iterdir()) == []


def test_the_first_published_artifact_stays(store: DirectoryStore) -> None:
    for text in ("first", "second"):
        with store.stage() as staged:
            (staged / "file").write_text(text)
            uri = store.publish(staged, "things", "one")
    assert (store.path(uri) / "file").read_text() == "first"
    assert list((store.root / ".staging").iterdir()) == []


def test_an_error_while_staging_leaves_nothing(store: DirectoryStore) -> None:
    with pytest.raises(RuntimeError), store.stage() as staged:
        (staged / "file").write_text("half")
        raise RuntimeError
    assert list((store.root / ".staging").iterdir()) == []


def test_the_staging_of_a_killed_process_is_deleted(store: DirectoryStore) -> None:
    code = (
        "import os, sys\nfrom pathlib import Path\nfrom forge.storage import DirectoryStore\n"
        "with DirectoryStore(Path(sys.argv[1])).stage() as staged:\n"
        "    (staged / 'half').write_text('x')\n    os.kill(os.getpid(), 9)\n"
    )
    assert subprocess.run([sys.executable, "-c", code, str(store.root)]).returncode == -9
    assert len(list((store.root / ".staging").iterdir())) == 1
    with store.stage():
        DirectoryStore(store.root)
        (left,) = (store.root / ".staging").iterdir()
        assert left.name.startswith(this_process())


def test_the_staging_of_another_container_stays_for_days(store: DirectoryStore) -> None:
    """Its process IDs mean nothing here."""
    with store.stage():
        staging = store.root / ".staging"
    theirs = [staging / f"another-boot.4026531836.{os.getpid()}.1-{name}" for name in ("new", "old")]
    for directory in theirs:
        directory.mkdir()
    os.utime(theirs[1], (0, 0))
    DirectoryStore(store.root)
    assert list(staging.iterdir()) == theirs[:1]


def test_reading_writes_nothing(store: DirectoryStore) -> None:
    opened = DirectoryStore(store.root)
    assert opened.read("key") is None
    assert (opened.names("leases"), opened.artifacts("models")) == ([], [])
    assert not opened.exists("models")
    with pytest.raises(ForgeError, match="is gone"):
        opened.path(opened.uri("models/x"))
    assert not store.root.exists()
    assert opened.identity == DirectoryStore(store.root).identity, "created when first asked for"


def test_of_many_threads_that_put_if_absent_one_wins(store: DirectoryStore) -> None:
    won = []
    barrier = threading.Barrier(16)

    def put(number: int) -> None:
        barrier.wait()
        if store.put_if_absent("key", str(number).encode()):
            won.append(number)

    threads = [threading.Thread(target=put, args=(number,)) for number in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(won) == 1
    assert (store.root / "key").read_text() == str(won[0])


def test_a_missing_artifact_is_an_error(store: DirectoryStore) -> None:
    with pytest.raises(ForgeError, match="nothing-here is gone"):
        store.path(store.uri("nothing-here"))


def test_a_store_that_cannot_be_written_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ForgeError, match="cannot be written"):
        _ = DirectoryStore(tmp_path / "file" / "store").identity


def test_the_digest_of_a_directory_depends_only_on_names_and_contents(tmp_path: Path) -> None:
    def make(name: str, files: dict[str, str]) -> str:
        for path, text in files.items():
            target = tmp_path / name / path
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_text(text)
        return digest_directory(tmp_path / name)[0]

    same = make("one", {"a": "1", "b/c": "2"})
    assert make("two", {"b/c": "2", "a": "1"}) == same
    assert make("three", {"a": "1", "b/c": "3"}) != same
    assert make("four", {"a": "1", "b/d": "2"}) != same
    assert digest_directory(tmp_path / "one", exclude={"b/c"})[0] == make("five", {"a": "1"})


@given(st.dictionaries(st.text(), st.integers()))
def test_the_digest_of_a_value_does_not_depend_on_its_order(value: dict) -> None:
    assert digest_json(dict(reversed(value.items()))) == digest_json(value)
