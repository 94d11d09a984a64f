"""Generate chat rows, reproducible by seed, and train a tokenizer on them.

Words follow Zipf's law in two regimes over 400,000 forms. The number of distinct words then grows as Heaps' law
predicts for English news (44 N^0.49 of N words: Manning et al., Introduction to Information Retrieval, 5.1.1). Texts
have capitals, punctuation, line breaks, lists, numbers and some letters outside ASCII. Their lengths are log-normal, as
is roughly the number of turns: most rows are short, and some conversations are far longer than the context.
"""

import itertools
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

SEED = 20
FORMS = 400_000
COMMON = 6_000  # forms in the first regime
BLOCK = 2_000  # rows drawn at a time
LENGTHS = {"user": (2.9, 0.9, 8, 140), "assistant": (3.95, 0.95, 8, 380)}  # words: mean and sd of the log, min, max
MORE_TURNS, MAX_TURNS = 0.45, 16  # fraction of rows with several turns; limit
NUMBERS, COMMAS = 0.02, 0.06  # fractions of words
SENTENCE = (4, 22)  # words
ACCENTS, ACCENTED = str.maketrans("aeiou", "åéíöü"), 25  # one form in 25
SYSTEM = (
    "You answer the customers of a furniture shop, briefly and in plain words.",
    "You are a careful assistant. Say so when you do not know, and never invent a source.",
    "You help a team that keeps the railway's timetable; answer with figures where there are any.",
    "",  # no system message
    "",
)

VOCABULARY = 16_000
TRAINED_ON = 8_000  # rows
BEGIN, END, HEADER, HEADED = "<|begin_of_text|>", "<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>"
# Llama 3's: https://huggingface.co/meta-llama/Meta-Llama-3-8B/blob/main/tokenizer.json
PRE_TOKENS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# Llama 3's format (https://www.llama.com/docs/model-cards-and-prompt-formats/meta-llama-3/). The
# generation block contains the end of the assistant's turn, so that it is trained.
TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{{ '<|start_header_id|>' ~ message['role'] ~ '<|end_header_id|>\n\n' }}"
    "{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] | trim ~ '<|eot_id|>' }}{% endgeneration %}"
    "{% else %}{{ message['content'] | trim ~ '<|eot_id|>' }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)


def write_rows(path: Path, rows: float = math.inf, size: float = math.inf) -> int:
    """Write JSONL up to a number of rows, or of bytes; returns the number of rows."""
    written = count = 0
    with path.open("wb") as file:
        for messages in conversations(SEED):
            if count >= rows or written >= size:
                break
            written += file.write(json.dumps({"messages": messages}, ensure_ascii=False).encode() + b"\n")
            count += 1
    return count


def conversations(seed: int) -> Iterator[list[dict[str, str]]]:
    """An endless stream of conversations. Duplicates are improbable: two are equal with a probability below 1e-15."""
    rng = np.random.default_rng(seed)
    forms = make_words(rng)
    # Exponents 1 and 2: Ferrer i Cancho and Solé 2001, https://doi.org/10.1076/jqul.8.3.165.4101
    rank = np.arange(1, FORMS + 1)
    cumulated = np.cumsum(np.where(rank <= COMMON, 1 / rank, COMMON / rank**2))
    cumulated /= cumulated[-1]
    while True:
        several = rng.random(BLOCK) < MORE_TURNS
        turns = np.where(several, np.clip(rng.lognormal(1.0, 0.6, BLOCK).astype(int), 2, MAX_TURNS), 1)
        lengths = np.empty(2 * turns.sum(), dtype=int)
        for first, (mean, deviation, low, high) in enumerate(LENGTHS.values()):
            drawn = rng.lognormal(mean, deviation, len(lengths) // 2)
            lengths[first::2] = np.clip(drawn.astype(int), low, high)
        words = forms[np.searchsorted(cumulated, rng.random(lengths.sum()))]
        numbers = np.flatnonzero(rng.random(len(words)) < NUMBERS)
        words[numbers] = [write_number(kind, value) for kind, value in rng.random((len(numbers), 2))]
        words[rng.random(len(words)) < COMMAS] += ","
        texts = write_texts(words.tolist(), lengths.tolist(), rng)
        for system, pairs in zip(rng.integers(len(SYSTEM), size=BLOCK), turns, strict=True):
            messages = [{"role": "system", "content": SYSTEM[system]}] if SYSTEM[system] else []
            for role in ("user", "assistant") * pairs:
                messages.append({"role": role, "content": next(texts)})
            yield messages


def make_words(rng: np.random.Generator) -> np.ndarray:
    """FORMS distinct words as an array of str, shape [FORMS], roughly sorted by length."""
    onsets = [*"bcdfghjklmnprstvwz", "br", "ch", "cl", "dr", "fl", "gr", "pl", "pr", "qu", "sh", "st", "th", "tr"]
    vowels = [*"aeiouaeiou", "ai", "ea", "ie", "oo", "ou"]
    codas = ["", "", "", "", "", "", "", *"nrstl", "nd", "ng", "st", "rt", "ly"]
    parts = [onset + vowel + coda for onset, vowel, coda in itertools.product(onsets, vowels, codas)]
    words: dict[str, None] = {}  # keeps the order
    while len(words) < FORMS:
        syllables = rng.integers(len(parts), size=(FORMS, 4))
        for count, row in zip(rng.choice([1, 2, 3, 4], FORMS, p=[0.1, 0.4, 0.4, 0.1]), syllables, strict=True):
            word = "".join(parts[part] for part in row[:count])
            words[word.translate(ACCENTS) if len(words) % ACCENTED == 0 else word] = None
    array = np.array(list(words)[:FORMS], dtype=object)
    lengths = np.array([len(word) for word in array])
    return array[np.argsort(lengths + rng.normal(0, 2, FORMS), kind="stable")]


def write_number(kind: float, value: float) -> str:
    """A count, a price, a percentage or a time; both arguments are in [0, 1)."""
    if kind < 0.6:
        return f"{int(10 ** (value * 5)):,}"
    if kind < 0.8:
        return f"€{value * 400:.2f}"
    if kind < 0.9:
        return f"{value:.0%}"
    return f"{int(value * 24):02}:{int(value * 1440) % 60:02}"


def write_texts(words: list[str], lengths: list[int], rng: np.random.Generator) -> Iterator[str]:
    """Texts of the given numbers of words, in sentences and paragraphs."""
    most = len(words) // SENTENCE[0] + len(lengths) + 1
    sentences = iter(rng.integers(*SENTENCE, size=most).tolist())
    ends = iter(rng.choice([". ", "? ", "! ", ".\n", ".\n\n", ":\n- "], most, p=[0.7, 0.1, 0.04, 0.06, 0.08, 0.02]))
    at = 0
    for length in lengths:
        stop = at + length
        text = []
        while at < stop:
            to = min(at + next(sentences), stop)
            sentence = " ".join(words[at:to])
            text += [sentence[0].upper(), sentence[1:].removesuffix(","), str(next(ends))]
            at = to
        text[-1] = "."
        yield "".join(text)


def train_tokenizer(rows: Path, directory: Path, vocabulary: int = VOCABULARY) -> None:
    """Train a byte-level BPE with Llama 3's pre-tokens on the first rows, and save it in Hugging Face format."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PRE_TOKENS), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[BEGIN, END, HEADER, HEADED],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_contents(rows), trainer)
    fast: Any = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=BEGIN, eos_token=END, pad_token=END)
    fast.chat_template = TEMPLATE
    fast.save_pretrained(directory)


def _contents(rows: Path) -> Iterator[str]:
    with rows.open("rb") as lines:
        for line in itertools.islice(lines, TRAINED_ON):
            for message in json.loads(line)["messages"]:
                yield message["content"]
