"""`python -m benchmarks.preprocess`: Forge's data preparation compared with TRL's, and with the bare tokenizer.

The last line is a JSON object. docs/benchmarks.md explains what is measured on each side, and the keys.
"""

import argparse
import json
import os
import platform
import signal
import statistics
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.generate import SEED, TRAINED_ON, VOCABULARY, train_tokenizer, write_rows
from benchmarks.measure import MB, PROJECT, SideFailed, run_side, say

CONTEXT = 1024
HELDOUT_FRACTION = 0.001  # TRL does not split, so nearly all rows are for training
MIN_ROWS = 10_000  # with fewer, no row may be held out
CORES = len(os.sched_getaffinity(0))
TRL_PYTHON = PROJECT / ".venv-trl" / "bin" / "python"
TRL: dict[str, dict[str, Any]] = {  # the settings that TRL runs with
    "trl_bfd": {"strategy": "bfd", "processes": CORES},
    "trl_bfd_split": {"strategy": "bfd_split", "processes": CORES},
    "trl_default": {"strategy": "bfd", "processes": None},
}


def main() -> int:
    """Generate rows, prepare them on both sides, and print the result."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.preprocess", description="Forge's data preparation")
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--rows", type=int, default=200_000, help="compare Forge and TRL on this many rows (200000)")
    size.add_argument("--gigabytes", type=float, help="measure Forge alone, on this many 10^9 bytes of JSONL")
    parser.add_argument("--rounds", type=int, default=3, help="the medians of these are reported (3)")
    options = parser.parse_args()
    if options.rows < MIN_ROWS or (options.gigabytes is not None and options.gigabytes < 0.1):
        parser.error(f"too small to measure: give at least {MIN_ROWS} rows, or 0.1 gigabytes")
    if options.gigabytes is None and not TRL_PYTHON.exists():
        parser.error("TRL's environment is not set up; run the benchmark with: make bench-preprocess")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that temporary files are removed
    try:
        with tempfile.TemporaryDirectory(prefix="forge-benchmark-") as folder:
            if options.gigabytes is None:
                result = compare(Path(folder), options.rows, options.rounds)
            else:
                result = measure_alone(Path(folder), options.gigabytes)
    except SideFailed as error:
        say(str(error))
        return 1
    except KeyboardInterrupt:
        return 130
    print(json.dumps(result))
    return 0


def compare(folder: Path, count: int, rounds: int) -> dict[str, Any]:
    """Prepare the same rows on all sides, in turn, several times: every second round in the opposite order."""
    source = generate(folder, rows=count)
    runs: dict[str, list[dict[str, Any]]] = {"forge": [], "tokenizer": [], **{name: [] for name in TRL}}
    for number in range(rounds):
        for side in list(runs) if number % 2 == 0 else reversed(runs):
            result = run(side, folder, source)
            runs[side].append(result)
            say(f"round {number + 1}: {side} {result['seconds']:.1f} s, {result['cpu_seconds']:.1f} s of CPU")
    forge, bare, *others = (results[0] for results in runs.values())  # the counts are the same in every round
    check_tokens(forge, bare, dict(zip(TRL, others, strict=True)))
    seconds = {side: statistics.median(result["seconds"] for result in results) for side, results in runs.items()}
    ratios, cpu_ratios = (
        {side: median_ratio(runs[side], runs["forge"], measure) for side in TRL}
        for measure in ("seconds", "cpu_seconds")
    )
    best = min(ratios, key=ratios.__getitem__)
    return {
        "forge_rows_per_s": round(count / seconds["forge"], 1),
        "trl_rows_per_s": {side: round(count / seconds[side], 1) for side in TRL},
        "trl_best": best,
        "ratio": ratios[best],
        "ratios": ratios,
        "cpu_ratios": cpu_ratios,
        "forge_tokens_per_s": round(bare["tokens"] / seconds["forge"]),
        "tokenizer_tokens_per_s": round(bare["tokens"] / seconds["tokenizer"]),
        "ratio_to_tokenizer": median_ratio(runs["tokenizer"], runs["forge"], "seconds"),
        "cpu_ratio_to_tokenizer": median_ratio(runs["tokenizer"], runs["forge"], "cpu_seconds"),
        "packing_efficiency": forge["packing_efficiency"],
        "trl_packing_efficiency": by_side(runs, lambda trl: round(trl["tokens"] / (trl["packed_rows"] * CONTEXT), 5)),
        "tokens_dropped_fraction": forge["tokens_dropped_fraction"],
        "trl_tokens_dropped_fraction": by_side(runs, lambda trl: round(1 - trl["tokens"] / trl["tokens_before"], 5)),
        "trl_cuts": by_side(runs, lambda trl: trl["parts"] - trl["documents"]),
        "peak_rss_mb": peak(runs["forge"], "peak_rss_mb"),
        "peak_pss_mb": peak(runs["forge"], "peak_pss_mb"),
        "trl_peak_rss_mb": {side: peak(runs[side], "peak_rss_mb") for side in TRL},
        "trl_peak_pss_mb": {side: peak(runs[side], "peak_pss_mb") for side in TRL},
        "other_cores": in_rounds(runs, "other_cores"),
        "rows": count,
        "rounds": rounds,
        "input_mb": source["input_mb"],
        "context": CONTEXT,
        "tokens": forge["tokens"],
        "trl_tokens": by_side(runs, lambda trl: trl["tokens"]),
        "trl_tokens_before_packing": bare["tokens"],
        "trained_tokens": forge["trained_tokens"],
        "trl_trained_tokens": by_side(runs, lambda trl: trl["trained_tokens"]),
        "seconds": in_rounds(runs, "seconds"),
        "cpu_seconds": in_rounds(runs, "cpu_seconds"),
        "settings": settings() | {"trl": by_side(runs, lambda trl: trl["settings"])},
        "versions": {"forge_side": forge["versions"], "trl_side": others[0]["versions"]},
    }


def run(side: str, folder: Path, source: dict[str, Any]) -> dict[str, Any]:
    """Run one side: forge, tokenizer, or one of TRL's settings."""
    if side == "forge":
        return run_forge(folder, source)
    if side == "tokenizer":
        return run_side(Path(sys.executable), "preprocess.tokenizer_side", folder / "bare", source["arguments"])
    return run_side(TRL_PYTHON, "preprocess.trl_side", folder / "trl", source["arguments"] | TRL[side])


def check_tokens(forge: dict[str, Any], bare: dict[str, Any], trl: dict[str, dict[str, Any]]) -> None:
    """Raise SideFailed unless all sides made the same tokens of the same conversations."""
    for side, result in trl.items():
        if result["tokens_before"] != bare["tokens"]:
            raise SideFailed(f"{side} has {result['tokens_before']:,} tokens, the bare tokenizer {bare['tokens']:,}")
        if forge["tokens_dropped"] == 0 and forge["trained_tokens"] != result["trained_tokens_before"]:
            raise SideFailed(
                f"the sides do not train on the same tokens: Forge on {forge['trained_tokens']:,}, and {side}, before "
                f"truncation, on {result['trained_tokens_before']:,}"
            )


def median_ratio(slower: list[dict[str, Any]], faster: list[dict[str, Any]], measure: str) -> float:
    """The median of the rounds' ratios."""
    return round(statistics.median(a[measure] / b[measure] for a, b in zip(slower, faster, strict=True)), 3)


def by_side(runs: dict[str, list[dict[str, Any]]], figure: Callable[[dict[str, Any]], Any]) -> dict[str, Any]:
    """A figure of each of TRL's settings; it is the same in every round."""
    return {side: figure(runs[side][0]) for side in TRL}


def in_rounds(runs: dict[str, list[dict[str, Any]]], measure: str) -> dict[str, list[float]]:
    """A measure of every side, in every round."""
    return {side: [round(result[measure], 2) for result in results] for side, results in runs.items()}


def peak(results: list[dict[str, Any]], name: str) -> float:
    """The largest value of all rounds."""
    return max(result[name] for result in results)


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
    arguments = source["arguments"] | {"heldout_fraction": HELDOUT_FRACTION}
    result = run_side(Path(sys.executable), "preprocess.forge_side", folder / "forge", arguments)
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
