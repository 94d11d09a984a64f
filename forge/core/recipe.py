"""The typed description of a run. The recipe says what to do; the settings say where.

forge.storage.recipes reads it from YAML; unknown keys are errors. Each stage gets only its own section, so a change in
one section reruns only the stages that depend on it.
"""

import re
from typing import Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, model_validator

# The values of vLLM's max_lora_rank (MaxLoRARanks in vllm/config/lora.py, vLLM 0.32).
MaxLoraRank = Literal[1, 8, 16, 32, 64, 128, 256, 320, 512]
MAX_LORA_RANKS: tuple[int, ...] = get_args(MaxLoraRank)
# Defaults of vLLM's options in Forge, in recipes and in forge.core.contracts.Engine.
MAX_LORAS = 2
MAX_LORA_RANK: MaxLoraRank = 16


class Section(BaseModel):
    """Base of the recipe and its sections: immutable, no unknown keys, and only numbers that JSON has."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=(), allow_inf_nan=False)


class Demonstration(Section):
    """The built-in data set: dates as people write them, to be answered with JSON."""

    rows: int = Field(24_000, ge=100, le=500_000, description="number of rows")
    locales: list[str] = Field(
        ["en", "de", "fr", "es", "it", "pt", "nl", "sv"], min_length=1, description="languages; each is one slice"
    )


Turns = Literal["strict", "merge", "drop-leading"]


class DataRecipe(Section):
    """How raw rows become packed rows."""

    source: str = Field(
        "demonstration",
        description="'demonstration', or a file, directory or glob of JSONL, JSON, Parquet, CSV or TSV (text also as "
        ".gz or .zst), s3://bucket/prefix, or hf://datasets/owner/name",
    )
    demonstration: Demonstration = Demonstration()
    row_format: Literal["auto", "chat", "prompt", "alpaca", "sharegpt", "text"] = Field(
        "auto", description="the format of the rows; auto detects it from the first row"
    )
    turns: Turns = Field(
        "strict",
        description="what to do with conversations in which user and assistant do not alternate: reject them (strict), "
        "merge successive messages of one role, or drop the assistant's messages before the first of the user",
    )
    max_seq_len: int = Field(ge=16, le=131_072, description="tokens in a packed row, and the longest document allowed")
    overlong: Literal["reject", "split", "truncate"] = Field(
        "reject", description="what to do with longer rows: reject, split between turns, or truncate at the end"
    )
    max_reject_fraction: float = Field(
        0.01, ge=0, lt=1, description="the stage fails if a larger share of the rows is rejected"
    )
    secrets: Literal["reject", "allow"] = Field("reject", description="what to do with rows that contain credentials")
    near_duplicates: float | None = Field(
        None, gt=0, lt=1, description="remove training rows whose estimated Jaccard similarity is at least this"
    )
    heldout_source: str = Field("", description="held-out rows of your own, instead of a share of the source")
    heldout_fraction: float = Field(0.05, gt=0, le=0.5, description="share of the groups to hold out from training")
    group_column: str = Field(
        "group",
        description="rows with the same value stay on the same side of the split; without it, rows with the same first "
        "question do",
    )
    slice_column: str = Field("slice", description="scores are also reported per value of this column, if rows have it")
    check_column: str = Field("check", description="a row's own check of its answer, if rows have this column")
    shards: int = Field(1, ge=1, le=1000, description="tasks that prepare the source in parallel on the cluster")


class Architecture(Section):
    """A byte-level Llama to train from scratch."""

    hidden_size: int = Field(ge=32, multiple_of=32)
    layers: int = Field(ge=1, le=64)
    heads: int = Field(ge=1)
    intermediate_size: int = Field(ge=32)

    @model_validator(mode="after")
    def _heads_divide(self) -> "Architecture":
        if self.hidden_size % self.heads or (self.hidden_size // self.heads) % 32:
            raise ValueError("hidden_size / heads must be a multiple of 32 (vLLM's head sizes on a CPU)")
        return self


class ModelRecipe(Section):
    """What training starts from: a base model, or an architecture with random weights."""

    base: str | None = Field(
        None,
        description="a local directory in Hugging Face format, a model ID on the Hub, or a registered model such as "
        "models:/name@champion",
    )
    revision: str | None = Field(None, description="commit on the Hub, or digest of the directory or package")
    architecture: Architecture | None = None

    @model_validator(mode="after")
    def _one_origin(self) -> "ModelRecipe":
        if (self.base is None) == (self.architecture is None):
            raise ValueError("give either base (a model to start from) or architecture (to train from scratch)")
        return self


class Lora(Section):
    """Low-rank adapters (https://arxiv.org/abs/2106.09685)."""

    rank: int = Field(16, ge=1, le=MAX_LORA_RANKS[-1])
    alpha: float = Field(32.0, gt=0)
    dropout: float = Field(0.0, ge=0, lt=1)
    target_modules: list[str] = Field(["all-linear"], min_length=1)
    use_rslora: bool = Field(
        False, description="scale by alpha / sqrt(rank) instead of alpha / rank, https://arxiv.org/abs/2312.03732"
    )


class TrainingRecipe(Section):
    """How the weights are trained."""

    method: Literal["full", "lora", "qlora"] = Field(
        "full", description="train all weights, an adapter, or an adapter on a base quantized to 4 bits"
    )
    lora: Lora | None = Field(None, description="the adapter; required for lora and qlora")
    nodes: int = Field(1, ge=1, description="number of nodes; the cluster's shapes are in forge/cluster/nodes.py")
    nproc_per_node: int = Field(1, ge=1, description="processes per node; on the cluster each has one GPU")
    parallelism: Literal["auto", "ddp", "fsdp", "hybrid"] = Field(
        "auto",
        description="one replica per process (ddp), or weights, gradients and optimizer state sharded over all "
        "processes (fsdp) or over those of each node (hybrid); auto is ddp if that fits, else hybrid on several nodes "
        "if that fits, else fsdp",
    )
    global_batch_size: int = Field(ge=1, description="packed rows per optimizer step, over all processes")
    micro_batch_size: int | None = Field(
        None,
        ge=1,
        description="packed rows per forward and backward pass of a process; gradients are accumulated up to the "
        "global batch. Without it, a process takes its whole share of the global batch in one pass",
    )
    epochs: float = Field(gt=0, le=1000)
    learning_rate: float = Field(gt=0, description="peak learning rate")
    lr_scheduler: Literal["cosine", "linear", "wsd"] = Field(
        "cosine", description="decay of the learning rate; wsd holds it and decays over the last fifth of the steps"
    )
    warmup_ratio: float = Field(0.05, ge=0, lt=1, description="share of the steps that warm up the learning rate")
    weight_decay: float = Field(0.01, ge=0)
    max_grad_norm: float = Field(1.0, gt=0, description="gradients are clipped to this norm")
    precision: Literal["fp32", "bf16"] = "bf16"
    activation_checkpointing: Literal["none", "selective", "full"] = Field(
        "none", description="recompute activations in the backward pass, of every second layer or of all layers"
    )
    compile: bool = Field(False, description="torch.compile each layer: a slower first step, faster steps after it")
    early_stopping_patience: int | None = Field(
        None, ge=1, description="stop when the held-out loss has not improved this many times in a row"
    )
    checkpoint_minutes: float = Field(10.0, gt=0, description="minutes between checkpoints")
    checkpoint_steps: int | None = Field(None, ge=1, description="also save a checkpoint every this many steps")
    keep_checkpoints: int = Field(2, ge=1, description="number of latest checkpoints to keep")
    max_skipped_steps: int = Field(
        10,
        ge=0,
        description="skipped steps (loss or gradient not finite, or exploding) until training fails",
    )
    gpu_temperature_limit: float = Field(85.0, gt=0, description="degrees Celsius; training slows down above it")
    seed: int = Field(0, ge=0, lt=2**63)

    @property
    def world_size(self) -> int:
        """Processes on all nodes."""
        return self.nodes * self.nproc_per_node

    @model_validator(mode="after")
    def _consistent(self) -> "TrainingRecipe":
        if (self.lora is None) != (self.method == "full"):
            raise ValueError("method lora or qlora needs the section lora, and full must not have one")
        if self.global_batch_size % self.world_size:
            raise ValueError(f"global_batch_size must be a multiple of nodes x nproc_per_node ({self.world_size})")
        share = self.global_batch_size // self.world_size
        if self.micro_batch_size and share % self.micro_batch_size:
            raise ValueError(f"micro_batch_size must divide a process's share of global_batch_size ({share})")
        if self.parallelism == "hybrid" and self.nodes == 1:
            raise ValueError("parallelism hybrid needs several nodes; use fsdp on one")
        return self


class Check(Section):
    """How an answer is compared with the expected one. Its score is in [0, 1]."""

    kind: Literal["exact", "normalised", "json", "regex", "number", "rouge"] = Field(
        description="exact: the same text; normalised: the same apart from case, spacing and punctuation; json: share "
        "of correct JSON fields; regex: a match of pattern; number: the last number is within tolerance; rouge: ROUGE-L"
    )
    pattern: str = Field("", description="for regex: matches anywhere in the answer")
    tolerance: float = Field(0.0, ge=0, description="for number: relative to the expected number")

    @model_validator(mode="after")
    def _consistent(self) -> "Check":
        if bool(self.pattern) != (self.kind == "regex"):
            raise ValueError("a check of kind regex needs a pattern, and other kinds must not have one")
        try:
            re.compile(self.pattern)
        except (re.error, OverflowError, RecursionError) as error:
            raise ValueError(f"pattern is not a regular expression: {error}") from None
        return self


class EvaluationRecipe(Section):
    """What is measured on the held-out set."""

    items: int = Field(512, ge=1, description="held-out prompts to answer and score")
    max_new_tokens: int = Field(ge=1, description="longest answer, in tokens")
    batch_size: int = Field(128, ge=1, description="prompts answered together")
    check: Check | None = Field(
        None,
        description="the check for rows without one of their own; the default is json if the expected answer is JSON, "
        "else exact",
    )
    samples: int = Field(0, ge=0, le=64, description="sampled answers per prompt, in addition to the scored greedy one")
    temperature: float = Field(0.7, gt=0, le=2, description="temperature of the sampled answers")
    engine: Literal["auto", "transformers", "vllm"] = Field(
        "auto", description="the inference engine; auto is vllm, the engine that serves, on a GPU, else transformers"
    )
    harness_tasks: list[str] = Field(
        [], description="lm-evaluation-harness tasks to score the model on as well, by name or as YAML files"
    )


class GateRecipe(Section):
    """What a model must show, on the same items as the champion, to be promoted. See docs/evaluation.md.

    All tests are at 95 % confidence.
    """

    metric: Literal["score", "nll"] = Field("score", description="what models are compared by; margins are in its unit")
    non_inferiority_margin: float = Field(
        0.04, gt=0, description="the model must not be worse than the champion by more than this"
    )
    require_improvement: bool = Field(False, description="the model must also be better than the champion")
    slice_margin: float = Field(0.15, gt=0, description="non-inferiority margin within each slice")
    min_slice_items: int = Field(50, ge=10, description="slices with fewer items are not tested")
    min_items: int = Field(30, ge=2, description="with fewer items the verdict is inconclusive")
    min_score: float = Field(0.0, ge=0, le=1, description="the mean score must be at least this")
    min_json_validity: float = Field(0.99, ge=0, le=1, description="minimum share of valid JSON where JSON is expected")
    min_finished: float = Field(
        0.95, ge=0, le=1, description="minimum share of answers that end within evaluation.max_new_tokens"
    )


class ServingRecipe(Section):
    """How the model is served, and what it must show before it becomes the champion."""

    rollout: bool | None = Field(
        None,
        description="roll out a model that passes; false stops after registering it as the challenger; the default is "
        "the setting FORGE_ROLLOUT",
    )
    replaces: list[str] = Field(
        [], description="public names that a rollout may remove if the model needs another base than the one serving"
    )
    startup_timeout: int = Field(600, ge=10, description="seconds until the server must be ready")
    replay: int = Field(16, ge=1, description="evaluated prompts to replay against the API")
    min_agreement: float = Field(
        0.9, gt=0, le=1, description="minimum share of replayed prompts with the same answer as in evaluation"
    )
    max_nll_gap: float = Field(
        0.1,
        gt=0,
        description="largest difference in the expected answers' negative log-likelihood between serving and "
        "evaluation, in nats per token",
    )
    watch_seconds: float = Field(10, ge=0, description="seconds to watch the model under its public name")
    max_error_rate: float = Field(0.01, ge=0, le=1, description="largest share of failed requests during the watch")
    max_latency_ratio: float = Field(3, gt=1, description="largest latency during the watch, relative to before")
    max_loras: int = Field(
        MAX_LORAS, ge=0, description="adapters that can be active together; replacing one takes two of them"
    )
    max_lora_rank: MaxLoraRank = Field(MAX_LORA_RANK, description="largest rank of any adapter")
    max_model_len: int | None = Field(
        None, ge=16, description="longest conversation, in tokens; the default is the model's own context length"
    )
    concurrency: int = Field(
        8, ge=1, description="conversations of max_model_len tokens whose KV cache must fit in GPU memory together"
    )


class Recipe(Section):
    """A run: what to train on which data, how to evaluate it, and how to serve it."""

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9-]{0,62}$", description="name of the registered and served model")
    data: DataRecipe
    model: ModelRecipe
    training: TrainingRecipe
    evaluation: EvaluationRecipe
    gate: GateRecipe = GateRecipe()
    serving: ServingRecipe = ServingRecipe()

    @model_validator(mode="after")
    def _answers_fit(self) -> "Recipe":
        if self.evaluation.max_new_tokens >= self.data.max_seq_len:
            raise ValueError(f"evaluation.max_new_tokens must be less than data.max_seq_len ({self.data.max_seq_len})")
        if self.training.lora and self.model.architecture:
            raise ValueError("training.method lora adapts a base model; give model.base, not model.architecture")
        return self
