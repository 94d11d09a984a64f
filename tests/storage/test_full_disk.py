"""Real disks that are full: one message names the disk and what was written, and nothing half-done stays."""

import json
import sqlite3
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from forge.core.errors import ForgeError
from forge.core.full_disk import DiskFull, explain_full_disk, full_disk_error, temporary_directory
from forge.storage import DirectoryStore, write_atomically
from forge.storage.local_copies import Copies
from tests.finetune.job import run, start, write_data, write_recipe
from tests.preprocess.datasets import prepare_file
from tests.storage.disks import enlarge, small_disk

PROJECT = Path(__file__).parents[2]
LARGE = bytes(400_000)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 256 kB."""
    with small_disk(tmp_path / "disk", "256k") as disk:
        yield disk


def names(directory: Path) -> list[str]:
    """The files under a directory."""
    return sorted(path.relative_to(directory).as_posix() for path in directory.rglob("*") if path.is_file())


def save_numpy(path: Path) -> None:
    np.save(path, np.zeros(100_000))


def save_torch(path: Path) -> None:
    import torch

    torch.save({"weights": torch.zeros(100_000)}, path)


def save_safetensors(path: Path) -> None:
    import torch
    from safetensors.torch import save_file

    save_file({"weights": torch.zeros(100_000)}, path)


def save_parquet(path: Path) -> None:
    import pyarrow as pa
    from pyarrow import parquet

    parquet.write_table(pa.table({"number": np.random.default_rng(0).random(100_000)}), path)


def save_sqlite(path: Path) -> None:
    with sqlite3.connect(path) as database:
        database.execute("create table rows (row blob)")
        database.execute("insert into rows values (?)", (LARGE,))


def save_json(path: Path) -> None:
    path.write_text(json.dumps(["row"] * 100_000), encoding="utf-8")


@pytest.mark.parametrize("save", [save_numpy, save_torch, save_safetensors, save_parquet, save_sqlite, save_json])
def test_whatever_a_library_raises_is_one_message(disk: Path, save: Callable[[Path], None]) -> None:
    store = DirectoryStore(disk / "store")
    with pytest.raises(DiskFull) as caught, store.stage("the data set") as staged:
        save(staged / "file")
    assert caught.value.message.startswith(f"disk {disk}: is full (")
    assert "the data set cannot be written to" in caught.value.message
    assert caught.value.message.endswith("; free space there, or set FORGE_HOME to a directory on another disk")
    assert names(disk) == [], "what was staged is removed"
    enlarge(disk, "4m")
    with store.stage("the data set") as staged:
        save(staged / "file")
        assert store.path(store.publish(staged, "datasets")).is_dir()


def test_the_free_space_is_that_at_the_failure(disk: Path) -> None:
    with pytest.raises(DiskFull, match=r"is full \(0 bytes free\)"), DirectoryStore(disk).stage("rows") as staged:
        (staged / "file").write_bytes(LARGE)


def test_small_objects_and_files_are_whole_or_absent(disk: Path) -> None:
    store = DirectoryStore(disk / "store")
    store.put("record", b"old")
    with pytest.raises(DiskFull, match=r"free, 400\.0 kB wanted\): record cannot be written"):
        store.put("record", LARGE)
    write_atomically(disk / "state.json", "old")
    with pytest.raises(DiskFull, match=r"state\.json cannot be written"):
        write_atomically(disk / "state.json", LARGE.decode())
    assert names(disk) == ["state.json", "store/record"]
    assert (store.read("record"), (disk / "state.json").read_text()) == (b"old", "old")


def test_an_error_that_hides_a_full_disk_is_seen_through(disk: Path) -> None:
    def reader() -> None:
        try:
            (disk / "file").write_bytes(LARGE)
        except OSError:
            raise ForgeError("cannot be loaded", where="base model b", fix="check its name") from None

    with pytest.raises(DiskFull, match=r"base model b cannot be written"), explain_full_disk(disk, "base model b"):
        reader()


def test_other_errors_stay_as_they_are(tmp_path: Path) -> None:
    errors = [KeyError("rows"), PermissionError(13, "Permission denied"), ForgeError("the rows are wrong")]
    for error in errors:
        with pytest.raises(type(error)) as caught, explain_full_disk(tmp_path, "rows"):
            raise error
        assert caught.value is error
    assert not full_disk_error(OSError("71424 requested"))


def test_a_disk_that_takes_no_more_files_says_so(tmp_path: Path) -> None:
    with (
        small_disk(tmp_path / "disk", "10m", files=20) as disk,
        pytest.raises(DiskFull, match=r"is full \(.* MB free, but it takes no more files\): rows cannot be written"),
        DirectoryStore(disk).stage("rows") as staged,
    ):
        for number in range(30):
            (staged / str(number)).touch()


def test_a_limit_of_the_size_of_files_is_one_message(tmp_path: Path) -> None:
    code = (
        "import resource, sys\nfrom pathlib import Path\nfrom forge.storage import DirectoryStore\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))\n"
        "with DirectoryStore(Path(sys.argv[1])).stage('rows') as staged:\n"
        "    (staged / 'file').write_bytes(bytes(9000))\n"
    )
    done = subprocess.run([sys.executable, "-c", code, tmp_path], cwd=PROJECT, capture_output=True, text=True)
    assert "DiskFull: disk" in done.stderr
    assert "takes no file that large (ulimit -f" in done.stderr


def test_a_full_disk_of_temporary_files_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with small_disk(tmp_path / "disk", "256k") as disk:
        monkeypatch.setattr("tempfile.tempdir", str(disk))
        with (
            pytest.raises(DiskFull, match=rf"^disk {disk}: is full \(0 bytes free\): rows .* set TMPDIR"),
            DirectoryStore(tmp_path / "store").stage("rows"),
        ):
            (disk / "spill").write_bytes(LARGE)
        (disk / "spill").unlink()
        with pytest.raises(DiskFull, match="set TMPDIR"), temporary_directory("forge-", "answers") as folder:
            (folder / "answers").write_bytes(LARGE)
        assert list(disk.iterdir()) == []


def test_local_copies_make_room_on_a_small_disk(tmp_path: Path) -> None:
    def fetch(directory: Path) -> None:
        copies.make_room("models/new", 150_000)
        (directory / "file").write_bytes(bytes(150_000))

    with small_disk(tmp_path / "disk", "256k") as disk:
        copies = Copies(disk, limit=10**9)
        first = copies.get("models/one", fetch)
        with pytest.raises(DiskFull, match=r"150\.0 kB wanted\): the local copy of models/new .* FORGE_COPIES_GB"):
            copies.get("models/two", fetch)
        assert first.is_dir(), "a copy in use stays"
        copies.release("models/one")
        assert copies.get("models/two", fetch).is_dir()
        assert not first.exists()


def test_preprocessing_says_what_it_could_not_write(tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    turns: list[dict[str, Any]] = [
        {"messages": [{"role": "user", "content": f"{at}?"}, {"role": "assistant", "content": f"{at}!" * 9}]}
        for at in range(1500)
    ]
    rows.write_text("".join(json.dumps(row) + "\n" for row in turns), encoding="utf-8")
    with small_disk(tmp_path / "disk", "100k") as disk:
        store = DirectoryStore(disk / "store")
        with pytest.raises(DiskFull, match=r"the rows that preprocessing has read cannot be written"):
            prepare_file(rows, store)
        assert names(disk) == ["store/identity"]
        enlarge(disk, "800k")
        with pytest.raises(DiskFull, match=r"kB wanted\): the packed rows cannot be written"):
            prepare_file(rows, store)
        assert names(disk) == ["store/identity"]
        enlarge(disk, "8m")
        assert prepare_file(rows, store).train_rows > 0


def test_a_checkpoint_that_does_not_fit_leaves_the_earlier_ones(tmp_path: Path) -> None:
    import torch

    from tasks.finetune.checkpoint import Checkpoints
    from tasks.finetune.process_group import Rank

    model = torch.nn.Linear(100, 100)
    optimizer = torch.optim.SGD(model.parameters())
    with small_disk(tmp_path / "disk", "128k") as disk:
        checkpoints = Checkpoints(disk / "checkpoints", Rank(0, 1, torch.device("cpu")), keep=3)
        checkpoints.save(model, optimizer, {"step": 1})
        checkpoints.wait()
        with pytest.raises(DiskFull, match=rf"^disk {disk}: is full \(.*\): (checkpoint [234]) cannot be written"):
            for step in (2, 3, 4):
                checkpoints.save(model, optimizer, {"step": step})
                checkpoints.wait()
        assert [path.name for path in (disk / "checkpoints").iterdir() if not path.name.isdigit()] == []
        assert checkpoints.load(model, optimizer) in ({"step": 1}, {"step": 2})
        enlarge(disk, "4m")
        checkpoints.save(model, optimizer, {"step": 4})
        checkpoints.wait()
        assert checkpoints.load(model, optimizer) == {"step": 4}


@pytest.mark.long
@pytest.mark.parametrize(("steps", "what"), [(5, "checkpoint 5"), (1000, "the trained model")])
def test_a_training_that_does_not_fit_is_one_message_and_resumes(steps: int, what: str, tmp_path: Path) -> None:
    data, recipe = write_data(tmp_path / "data"), write_recipe(tmp_path / "recipe.yaml", checkpoint_steps=steps)
    with small_disk(tmp_path / "disk", "300k") as disk:
        process = start(recipe, data, disk / "model", processes=1)
        output, _ = process.communicate(timeout=300)
        assert process.returncode != 0
        assert output.count(f"disk {disk}: is full (") == 1, output
        assert f"{what} cannot be written" in output
        assert [name for name in names(disk) if "partial" in name] == []
        enlarge(disk, "40m")
        run(recipe, data, disk / "model", processes=1)
        assert (disk / "model" / "training.json").is_file()
