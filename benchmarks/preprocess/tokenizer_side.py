"""The bare tokenizer: run as `python -m benchmarks.preprocess.tokenizer_side ARGUMENTS` (a JSON object).

Timed: `encode_batch_fast`, the fastest call of `tokenizers`, on all cores. Not timed: reading the rows, rendering them
with the chat template, and reading the token IDs.
"""

import json
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from benchmarks.preprocess.timer import Timer

BATCH = 2_000  # texts per call; the encodings of all texts together would take gigabytes


def main(rows: str, tokenizer: str, context: int, folder: str) -> dict[str, Any]:
    """Encode all conversations in batches; returns the seconds, and the tokens."""
    loaded = AutoTokenizer.from_pretrained(tokenizer)
    with Path(rows).open("rb") as lines:
        texts = [loaded.apply_chat_template(json.loads(line)["messages"], tokenize=False) for line in lines]
    bare = loaded.backend_tokenizer
    timer, tokens = Timer(), 0
    for at in range(0, len(texts), BATCH):
        with timer:
            encodings = bare.encode_batch_fast(texts[at : at + BATCH], add_special_tokens=False)
        tokens += sum(map(len, encodings))
    return {
        "seconds": timer.seconds,
        "cpu_seconds": timer.cpu_seconds,
        "tokens": tokens,
        "versions": {"tokenizers": version("tokenizers")},
    }


if __name__ == "__main__":
    arguments = json.loads(sys.argv[1])
    Path(arguments["folder"], "result.json").write_text(json.dumps(main(**arguments)))
