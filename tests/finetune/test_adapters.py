"""An adapter trained with FSDP: peft and vLLM compute the same from the exported files as training did."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, LlamaConfig

from forge.core.recipe import ModelRecipe, TrainingRecipe
from forge.core.settings import Settings
from forge.registry.packages import LocalBase
from tasks.finetune.process_group import Rank
from tasks.finetune.train import Trainer, TrainingJob
from tests.finetune.job import PROJECT, SMALL, VOCABULARY, curve, run, write_base, write_data, write_recipe

ROWS, LENGTH = 3, 24
SHAPE = {**SMALL, "hidden_size": 64, "intermediate_size": 128, "num_key_value_heads": 2}  # vLLM needs heads of size 32

TRAIN = """
import sys
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch.distributed.tensor import DTensor

from forge.registry.packages import LocalBase
from tasks.finetune.data import Batch
from tasks.finetune.export import export
from tasks.finetune.process_group import process_group
from tasks.finetune.train import Trainer, TrainingJob
from forge.core.recipe import Lora, ModelRecipe, TrainingRecipe

here, rows, length = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
recipe = TrainingRecipe(
    global_batch_size=8, epochs=2, learning_rate=0.01, precision="fp32", nproc_per_node=2, parallelism="fsdp",
    method="lora", lora=Lora(rank=4, alpha=8, use_rslora=True),
)
base = str(here / "base")
with process_group(here / "failure.json") as rank:
    job = TrainingJob(here / "data", LocalBase(base), ModelRecipe(base=base), recipe, here / "checkpoints")
    trainer = Trainer(rank, job)
    trainer.train()
    trainer.loss.reshard()
    head = trainer.model.get_output_embeddings().weight
    assert isinstance(head, DTensor), "sharded"
    head, hidden = head.full_tensor(), []
    trainer.model.base_model.register_forward_hook(lambda _, __, output: hidden.append(output.last_hidden_state))
    tokens = trainer.heldout.batch(trainer.heldout.spans(np.arange(rows), packed=True)).tokens[:, :length]
    batch = Batch(tokens, torch.arange(length).expand(rows, length), tokens)
    with torch.no_grad():
        trainer.loss.eval()(batch)
    logits = hidden[0] @ head.T
    export(trainer, here / "out" if rank.first else None)
    if rank.first:
        save_file({"tokens": tokens.contiguous(), "logits": logits.detach().contiguous()}, here / "seen.safetensors")
"""

# Asks vLLM for the log probabilities of all next tokens. One request per prefix, since with an adapter vLLM cannot
# return those inside a prompt.
ASK = """
import json, sys
from pathlib import Path
from vllm import LLM, SamplingParams
from vllm.lora.request import LoRARequest

if __name__ == "__main__":
    here, prompts, vocabulary = Path(sys.argv[1]), json.loads(sys.argv[2]), int(sys.argv[3])
    model = LLM(
        str(here / "base"), dtype="float32", enforce_eager=True, max_model_len=64, max_num_seqs=4, enable_lora=True,
        max_lora_rank=8, max_logprobs=vocabulary,
    )
    sampling = SamplingParams(max_tokens=1, temperature=0, logprobs=vocabulary)
    logprobs = {}
    for name, adapter in (("base", None), ("adapter", LoRARequest("adapter", 1, str(here / "out" / "adapter")))):
        answers = model.generate([{"prompt_token_ids": prompt} for prompt in prompts], sampling, lora_request=adapter)
        logprobs[name] = [
            [answer.outputs[0].logprobs[0][token].logprob for token in range(vocabulary)] for answer in answers
        ]
    (here / "vllm.json").write_text(json.dumps(logprobs))
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a base model, the adapter that two processes trained with FSDP, and their logits."""
    here = tmp_path_factory.mktemp("adapter")
    write_data(here / "data")
    write_base(LlamaConfig(**SHAPE, tie_word_embeddings=False), here / "base")
    (here / "train.py").write_text(TRAIN)
    program = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]
    arguments = [str(here / "train.py"), str(here), str(ROWS), str(LENGTH)]
    environment = {**os.environ, "PYTHONPATH": str(PROJECT)}
    subprocess.run([*program, *arguments], check=True, env=environment, timeout=300)
    return here


def test_peft_gives_the_logits_of_sharded_training(place: Path) -> None:
    seen = load_file(place / "seen.safetensors")
    with torch.no_grad():
        base = AutoModelForCausalLM.from_pretrained(place / "base")
        before = base(input_ids=seen["tokens"]).logits.clone()
        adapted = PeftModel.from_pretrained(base, place / "out" / "adapter")(input_ids=seen["tokens"]).logits
        merged = AutoModelForCausalLM.from_pretrained(place / "out" / "model")(input_ids=seen["tokens"]).logits
    torch.testing.assert_close(adapted, seen["logits"], rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(merged, seen["logits"], rtol=1e-3, atol=1e-3)
    assert (before - adapted).abs().max() > 0.1, "the adapter has learned something"


def test_adapter_contains_no_local_path(place: Path) -> None:
    adapter = place / "out" / "adapter"
    names = {path.name for path in adapter.iterdir()}
    assert names == {"adapter_config.json", "adapter_model.safetensors", "generation_config.json"}
    config = json.loads((adapter / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == ""
    assert config["target_modules"] == sorted(config["target_modules"]), "peft has them in a set, whose order varies"
    assert str(place) not in json.dumps(config)


@pytest.mark.long
def test_vllm_gives_the_probabilities_of_sharded_training(place: Path, tmp_path: Path) -> None:
    seen = load_file(place / "seen.safetensors")
    (tmp_path / "ask.py").write_text(ASK)
    ends = [1, 7, 16, LENGTH]
    prompts = json.dumps([row[:end] for row in seen["tokens"].tolist() for end in ends])
    quiet = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1", "HF_HUB_OFFLINE": "1"}
    finished = subprocess.run(
        [str(Settings().serving_python), str(tmp_path / "ask.py"), str(place), prompts, str(VOCABULARY)],
        env={**os.environ, **quiet}, cwd=tmp_path, capture_output=True, text=True, timeout=400,
    )  # fmt: skip
    assert finished.returncode == 0, finished.stderr[-4000:]
    logprobs = {name: torch.tensor(value) for name, value in json.loads((place / "vllm.json").read_text()).items()}
    # Log probabilities differ from logits by a constant per position.
    ours = seen["logits"].log_softmax(-1)[:, [end - 1 for end in ends]].flatten(0, 1)
    torch.testing.assert_close(logprobs["adapter"], ours, rtol=0, atol=1e-3)
    assert (logprobs["base"] - ours).abs().max() > 0.1, "the base alone gives other probabilities"


STOPPED = """
import contextlib, json, sys
from pathlib import Path
from forge.registry.packages import LocalBase
from tasks.finetune.process_group import Stopped, process_group
from tasks.finetune.train import Trainer, TrainingJob
from forge.core.recipe import ModelRecipe, TrainingRecipe

here, checkpoints, recipe = Path(sys.argv[1]), Path(sys.argv[2]), TrainingRecipe(**json.loads(sys.argv[3]))
base = str(here / "base")
with process_group(checkpoints.with_name("failure.json")) as rank, contextlib.suppress(Stopped):
    job = TrainingJob(here / "data", LocalBase(base), ModelRecipe(base=base), recipe, checkpoints)
    trainer = Trainer(rank, job)
    rank.stop.set()
    trainer.train()
"""


def test_training_on_a_sharded_quantised_base_resumes_on_an_unsharded_one(place: Path, tmp_path: Path) -> None:
    common = {"global_batch_size": 8, "epochs": 1, "learning_rate": 0.01, "precision": "fp32", "method": "qlora"}
    recipe = {**common, "lora": {"rank": 4}}
    (tmp_path / "stopped.py").write_text(STOPPED)
    sharded = json.dumps({**recipe, "nproc_per_node": 2, "parallelism": "fsdp"})
    program = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]
    arguments = [str(tmp_path / "stopped.py"), str(place), str(tmp_path / "checkpoints"), sharded]
    environment = {**os.environ, "PYTHONPATH": str(PROJECT)}
    subprocess.run([*program, *arguments], check=True, env=environment, timeout=300)
    losses = []
    for checkpoints, first in (("checkpoints", 1), ("others", 0)):
        base = str(place / "base")
        job = TrainingJob(
            place / "data",
            LocalBase(base),
            ModelRecipe(base=base),
            TrainingRecipe(**recipe),
            tmp_path / checkpoints,
        )
        trainer = Trainer(Rank(0, 1, torch.device("cpu")), job)
        assert trainer.state.step == first
        trainer.train()
        losses.append([point["loss"] for point in trainer.state.curve])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


@pytest.mark.long
def test_sharding_a_quantised_base_does_not_change_losses(place: Path, tmp_path: Path) -> None:
    curves = []
    for parallelism in ("ddp", "fsdp"):
        training = {"method": "qlora", "lora": {"rank": 4}, "nproc_per_node": 2, "parallelism": parallelism}
        recipe = write_recipe(tmp_path / f"{parallelism}.yaml", place / "base", **training)
        run(recipe, place / "data", tmp_path / parallelism, processes=2)
        curves.append([point["loss"] for point in curve(tmp_path / parallelism)])
    assert curves[0] == pytest.approx(curves[1], rel=1e-5)
    assert curves[0][-1] < curves[0][0]
