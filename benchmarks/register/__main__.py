"""`python -m benchmarks.register`: publish and fetch a package of 1 GB, and do the same with the plain minio client.

The last line of stdout is a JSON object. See docs/benchmarks.md.
"""

import argparse
import json
import shutil
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from benchmarks.measure import run_side, say
from tests.storage.servers import KEY, SECRET, client_of, rclone

MIX = ((2, 300_000_000), (4, 60_000_000), (20, 5_000_000), (100, 500_000), (400, 25_000))  # (files, bytes): 1 GB
BUCKET = "bench"


def main() -> None:
    """Create the files, and time each way in turn, several times."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.register")
    parser.add_argument("--rounds", type=int, default=3, help="the median of these is reported")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="forge-benchmark-") as name:
        folder = Path(name)
        model = write_model(folder / "model")
        (folder / "server").mkdir()
        with rclone(folder / "server") as endpoint:
            client_of(endpoint).make_bucket(BUCKET)
            print(json.dumps(measure(folder, model, endpoint, options.rounds)))


def write_model(directory: Path) -> Path:
    """Files of random bytes, of mixed sizes."""
    directory.mkdir()
    chance = np.random.default_rng(0)
    number = 0
    for count, size in MIX:
        for _ in range(count):
            (directory / f"file-{number:04}").write_bytes(chance.bytes(size))
            number += 1
    return directory


def measure(folder: Path, model: Path, endpoint: str, rounds: int) -> dict[str, Any]:
    """MB/s of each way (the median of the rounds), and their ratios (the median of the ratios of each round)."""
    (server,) = (child for child in psutil.Process().children() if "rclone" in child.name())
    common = {"model": str(model), "endpoint": endpoint, "bucket": BUCKET, "keys": [KEY, SECRET]}
    megabytes = sum(count * size for count, size in MIX) / 1e6
    seconds: dict[str, list[float]] = {}
    peaks, others = [0.0], [0.0]

    def run(way: str, number: int, home: str, label: str = "", **more: Any) -> str:
        arguments = common | {"way": way, "round": number, "home": str(folder / home)} | more
        found = run_side(Path(sys.executable), "register.side", folder / f"{way}-{number}", arguments, server=server)
        seconds.setdefault(label or way, []).append(found["seconds"])
        others.append(found["other_cores"])
        if not way.startswith(("plain", "copy")):
            peaks.append(found["peak_rss_mb"])
        return str(found["found"])

    for number in range(rounds):
        run("plain_push", number, "unused")
        uri = run("push", number, f"pushing-{number}")
        run("push", number, f"pushing-{number}", label="repush")
        run("plain_fetch", number, f"plain-{number}")
        run("fetch", number, f"fetching-{number}", uri=uri)
        run("copy", number, f"copied-{number}")
        say(", ".join(f"{way} {taken[-1]:.2f} s" for way, taken in seconds.items()))
        for directory in ("pushing", "plain", "fetching", "copied"):
            shutil.rmtree(folder / f"{directory}-{number}", ignore_errors=True)
        for sent in ("forge", "plain"):
            shutil.rmtree(folder / "server" / BUCKET / f"{sent}-{number}")

    def rate(way: str) -> float:
        return round(megabytes / statistics.median(seconds[way]), 1)

    def ratio(slow: str, fast: str) -> float:
        return round(statistics.median(a / b for a, b in zip(seconds[slow], seconds[fast], strict=True)), 2)

    return {
        "push_mb_per_s": rate("push"),
        "plain_push_mb_per_s": rate("plain_push"),
        "push_ratio": ratio("plain_push", "push"),
        "fetch_mb_per_s": rate("fetch"),
        "plain_fetch_mb_per_s": rate("plain_fetch"),
        "fetch_ratio": ratio("plain_fetch", "fetch"),
        "copy_mb_per_s": rate("copy"),
        "repush_seconds": round(statistics.median(seconds["repush"]), 2),
        "peak_rss_mb": max(peaks),
        "other_cores": max(others),
    }


if __name__ == "__main__":
    main()
