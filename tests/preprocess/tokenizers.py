"""Small tokenizers with the chat formats of known model families, which have no generation blocks."""

from collections.abc import Sequence
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

LLAMA_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
TEXTS = [
    "The train from Utrecht leaves at 10:42, doesn't it?\n\nYes, it does: platform 7. Zoë says 'hello' – élan."
] * 3

LLAMA3 = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' + message['content'] | trim + '<|eot_id|>' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message.role + '\n' }}"
    "{% if message.content %}{{ message.content }}{% endif %}"
    "{% for call in message.tool_calls or [] %}"
    "{{ '<tool_call>\n' ~ {'name': call.function.name, 'arguments': call.function.arguments} | tojson }}"
    "{{ '\n</tool_call>' }}"
    "{% endfor %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + ' [/INST]' }}"
    "{% elif message['role'] == 'assistant' %}{{ ' ' + message['content'] + eos_token }}"
    "{% else %}{{ raise_exception('Only user and assistant roles are supported!') }}{% endif %}{% endfor %}"
)
GEMMA = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{{ '<start_of_turn>' + ('model' if message['role'] == 'assistant' else message['role']) + '\n' "
    "+ message['content'] | trim + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)


def byte_level(specials: list[str], template: str, split: str = LLAMA_SPLIT, plain: Sequence[str] = ()) -> Any:
    """A byte-level BPE like those of Llama 3 and Qwen; `plain` are added tokens that are not special."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(split), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        TEXTS,
        trainers.BpeTrainer(vocab_size=420, initial_alphabet=alphabet, special_tokens=specials, show_progress=False),
    )
    tokenizer.add_tokens([AddedToken(token, special=False, normalized=False) for token in plain])
    return _wrapped(tokenizer, specials, template)


def sentence_piece(
    specials: list[str], template: str, prefix: bool = False, rstrip: Sequence[str] = (), fallback: bool = True
) -> Any:
    """A BPE over the whole text with spaces as `▁`, like those of Mistral and Gemma.

    With `prefix`, each text between special tokens starts with `▁`, as in Llama 2 and Phi 3. The tokens in `rstrip`
    absorb the white space after them. Without `fallback`, unknown characters become <unk> instead of bytes.
    """
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=fallback))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    if prefix:
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), tokenizer.normalizer])
        steps.append(decoders.Strip(" ", 1, 0))
    tokenizer.decoder = decoders.Sequence(steps)
    alphabet = sorted(
        {character for text in TEXTS for character in text.replace(" ", "▁")} | {chr(n) for n in range(33, 127)}
    )
    names = ["<unk>", *specials, *(f"<0x{number:02X}>" for number in range(256 if fallback else 0))]
    trainer = trainers.BpeTrainer(vocab_size=700, initial_alphabet=alphabet, special_tokens=names, show_progress=False)
    tokenizer.train_from_iterator([text.split(" ") for text in TEXTS], trainer)
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False, rstrip=True) for token in rstrip])
    return _wrapped(tokenizer, specials, template)


def _wrapped(tokenizer: Tokenizer, specials: list[str], template: str) -> Any:
    """With the first special token as bos_token and the second as eos_token."""
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in specials])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=specials[0], eos_token=specials[1])
    fast.chat_template = template
    return fast


def llama3() -> Any:
    return byte_level(["<|begin_of_text|>", "<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>"], LLAMA3)


def chatml() -> Any:
    return byte_level(["<|endoftext|>", "<|im_end|>", "<|im_start|>"], CHATML, LLAMA_SPLIT.replace("{1,3}", ""))


def mistral() -> Any:
    return sentence_piece(["<s>", "</s>"], MISTRAL)


def gemma() -> Any:
    return sentence_piece(["<bos>", "<end_of_turn>", "<start_of_turn>"], GEMMA)


FAMILIES = {"llama3": llama3, "chatml": chatml, "mistral": mistral, "gemma": gemma}
