"""However a run ends while many processes read, none of them survives, and nothing half-finished is left."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from forge.storage import DirectoryStore
from tests.conftest import chat
from tests.integration.harness import PROJECT, gone

SCRIPT = """
import sys
from pathlib import Path
from forge.core.contracts import Base, Source
from tasks.preprocess import file_formats
from tasks.preprocess.prepare import prepare
from forge.core.recipe import DataRecipe
from forge.core.settings import Settings
from forge.storage import DirectoryStore

if __name__ == "__main__":
    file_formats.BLOCK = 20_000
    store = DirectoryStore(Path(sys.argv[2]))
    source = Source(uri=Path(sys.argv[1]).as_uri(), digest="", store=store.identity)
    prepare(source, DataRecipe(source=sys.argv[1], max_seq_len=128), Base(), store, Settings())
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_workers_exit_with_their_parent(number: signal.Signals, tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps(chat(f"question {n}", f"answer {n}")) + "\n" for n in range(150_000)))
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    process = subprocess.Popen(
        [sys.executable, script, rows, tmp_path / "store"], cwd=PROJECT, stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip
    try:
        others: list[psutil.Process] = []
        deadline = time.monotonic() + 60
        while len(others) < 3 and time.monotonic() < deadline:  # the fork server and two workers
            assert process.poll() is None, process.communicate()[1]
            others = psutil.Process(process.pid).children(recursive=True)
            time.sleep(0.05)
        process.send_signal(number)
        process.communicate(timeout=30)
    finally:
        process.kill()
    assert process.returncode != 0
    assert len(others) >= 3
    assert gone(others)
    assert list((DirectoryStore(tmp_path / "store").root / ".staging").iterdir()) == [], (
        "the next run removes what was staged"
    )
