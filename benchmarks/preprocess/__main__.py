"""`python -m benchmarks.preprocess`: Forge's data preparation compared with TRL. The last line is a JSON object.

docs/benchmarks.md explains what is measured on each side, and the keys.
"""

import argparse
import json
import os
import platform
import signal
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.generate import SEED, TRAINED_ON, VOCABULARY, train_tokenizer, write_rows
from benchmarks.measure import MB, PROJECT, SideFailed, run_side, say

CONTEXT = 1024
HELDOUT_FRACTION = 0.001  # TRL does not split, so nearly all rows are for training
MIN_ROWS = 10_000  # with fewer, no row may be held out
CORES = len(os.sched_getaffinity(0))
TRL_PYTHON = PROJECT / ".venv-trl" / "bin" / "python"


def main() -> int:
    """Generate rows, prepare them on both sides, and print the result."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.preprocess", description="Forge's data preparation")
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--rows", type=int, default=200_000, help="compare Forge and TRL on this many rows (200000)")
    size.add_argument("--gigabytes", type=float, help="measure Forge alone, on this many 10^9 bytes of JSONL")
    options = parser.parse_args()
    if options.rows < MIN_ROWS or (options.gigabytes is not None and options.gigabytes < 0.1):
        parser.error(f"too small to measure: give at least {MIN_ROWS} rows, or 0.1 gigabytes")
    if options.gigabytes is None and not TRL_PYTHON.exists():
        parser.error("TRL's environment is not set up; run the benchmark with: make bench-preprocess")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that temporary files are removed
    try:
        with tempfile.TemporaryDirectory(prefix="forge-benchmark-") as folder:
            if options.gigabytes is None:
                result = compare(Path(folder), options.rows)
            else:
                result = measure_alone(Path(folder), options.gigabytes)
    except SideFailed as error:
        say(str(error))
        return 1
    except KeyboardInterrupt:
        return 130
    print(json.dumps(result))
    return 0


def compare(folder: Path, count: int) -> dict[str, Any]:
    """Prepare the same rows on both sides; TRL runs with and without worker processes, and the faster run counts."""
    source = generate(folder, rows=count)
    runs = {}
    for processes in (CORES, None):
        say(f"TRL with dataset_num_proc={processes}")
        arguments = source["arguments"] | {"processes": processes}
        runs[processes] = run_side(TRL_PYTHON, "preprocess.trl_side", folder / "trl", arguments)
        say(f"TRL with dataset_num_proc={processes}: {runs[processes]['seconds']:.1f} s")
    best = min(runs, key=lambda processes: runs[processes]["seconds"])
    trl = runs[best]
    forge = run_forge(folder, source)
    if forge["tokens_dropped"] == 0 and forge["trained_tokens"] != trl["trained_tokens_before"]:
        raise SideFailed(
            f"the sides do not train on the same tokens: Forge on {forge['trained_tokens']:,}, and TRL, before "
            f"truncation, on {trl['trained_tokens_before']:,}"
        )
    return {
        "forge_rows_per_s": round(count / forge["seconds"], 1),
        "trl_rows_per_s": round(count / trl["seconds"], 1),
        "ratio": round(trl["seconds"] / forge["seconds"], 3),
        "ratio_to_defaults": round(runs[None]["seconds"] / forge["seconds"], 3),
        "packing_efficiency": forge["packing_efficiency"],
        "trl_packing_efficiency": round(trl["tokens"] / (trl["packed_rows"] * CONTEXT), 5),
        "tokens_dropped_fraction": forge["tokens_dropped_fraction"],
        "trl_tokens_dropped_fraction": round(1 - trl["tokens"] / trl["tokens_before"], 5),
        "peak_rss_mb": forge["peak_rss_mb"],
        "peak_pss_mb": forge["peak_pss_mb"],
        "trl_peak_rss_mb": trl["peak_rss_mb"],
        "trl_peak_pss_mb": trl["peak_pss_mb"],
        "other_cores": forge["other_cores"],
        "trl_other_cores": trl["other_cores"],
        "rows": count,
        "input_mb": source["input_mb"],
        "context": CONTEXT,
        "tokens": forge["tokens"],
        "trl_tokens": trl["tokens"],
        "trl_tokens_before_truncation": trl["tokens_before"],
        "trained_tokens": forge["trained_tokens"],
        "trl_trained_tokens": trl["trained_tokens"],
        "forge_seconds": round(forge["seconds"], 2),
        "trl_seconds": round(trl["seconds"], 2),
        "trl_seconds_by_dataset_num_proc": {str(key): round(run["seconds"], 2) for key, run in runs.items()},
        "trl_dataset_num_proc": best,
        "settings": settings() | {"trl": trl["settings"]},
        "versions": {"forge_side": forge["versions"], "trl_side": trl["versions"]},
    }


def measure_alone(folder: Path, gigabytes: float) -> dict[str, Any]:
    """Measure Forge alone, on a file of a given size."""
    source = generate(folder, size=gigabytes * 1e9)
    forge = run_forge(folder, source)
    return {
        "peak_rss_mb": forge["peak_rss_mb"],
        "peak_pss_mb": forge["peak_pss_mb"],
        "other_cores": forge["other_cores"],
        "input_mb": source["input_mb"],
        "rows_per_s": round(source["rows"] / forge["seconds"], 1),
        "rows": source["rows"],
        "context": CONTEXT,
        "tokens": forge["tokens"],
        "tokens_dropped_fraction": forge["tokens_dropped_fraction"],
        "packing_efficiency": forge["packing_efficiency"],
        "seconds": round(forge["seconds"], 2),
        "settings": settings(),
        "versions": {"forge_side": forge["versions"]},
    }


def generate(folder: Path, **limits: float) -> dict[str, Any]:
    """Write the rows and the tokenizer; returns the arguments of both sides and the size of the input."""
    path, tokenizer = folder / "rows.jsonl", folder / "tokenizer"
    say("generating rows")
    rows = write_rows(path, **limits)
    say(f"training a tokenizer on {TRAINED_ON:,} of {rows:,} rows")
    train_tokenizer(path, tokenizer)
    return {
        "arguments": {"rows": str(path), "tokenizer": str(tokenizer), "context": CONTEXT},
        "rows": rows,
        "input_mb": round(path.stat().st_size / MB, 1),
    }


def run_forge(folder: Path, source: dict[str, Any]) -> dict[str, Any]:
    """Run Forge's side; adds the fraction of tokens that it dropped."""
    say("Forge")
    arguments = source["arguments"] | {"heldout_fraction": HELDOUT_FRACTION}
    result = run_side(Path(sys.executable), "preprocess.forge_side", folder / "forge", arguments)
    say(f"Forge: {result['seconds']:.1f} s")
    dropped = result["tokens_dropped"]
    return result | {"tokens_dropped_fraction": round(dropped / (result["tokens"] + dropped), 5)}


def settings() -> dict[str, Any]:
    """What the measurements depend on, besides the number of rows."""
    return {
        "cores": CORES,
        "python": platform.python_version(),
        "seed": SEED,
        "vocabulary": VOCABULARY,
        "forge": {"overlong": "split", "heldout_fraction": HELDOUT_FRACTION},
    }


if __name__ == "__main__":
    sys.exit(main())
