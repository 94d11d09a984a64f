"""The one typed description of a run. A recipe says what to do; settings say where.

Read from YAML by forge.storage.recipes; unknown keys are errors. Each stage gets only its own section, so that a change
in one section runs again only what depends on it.
"""

import re
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator


class Section(BaseModel):
    """Base of the recipe and its sections: immutable, no unknown keys."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())


class Demonstration(Section):
    """The built-in data set: dates as people write them, to be answered with JSON."""

    rows: int = Field(24_000, ge=100, le=500_000, description="rows drawn")
    locales: list[str] = Field(
        ["en", "de", "fr", "es", "it", "pt", "nl", "sv"], min_length=1, description="languages, each one slice"
    )


class DataRecipe(Section):
    """Raw rows to packed rows."""

    source: str = Field(
        "demonstration",
        description="'demonstration', or a file, directory or glob of JSONL, JSON, Parquet, CSV or TSV (text also as "
        ".gz or .zst), s3://bucket/prefix, or hf://datasets/owner/name",
    )
    demonstration: Demonstration = Demonstration()
    row_format: Literal["auto", "chat", "prompt", "alpaca", "sharegpt", "text"] = Field(
        "auto", description="what a row looks like; auto tells it from the first row"
    )
    max_seq_len: int = Field(ge=16, le=131_072, description="tokens in a packed row; no document may be longer")
    overlong: Literal["reject", "split", "truncate"] = Field(
        "reject", description="what becomes of a longer row: refused, split between turns, or cut at its end"
    )
    max_reject_fraction: float = Field(
        0.01, ge=0, lt=1, description="the stage fails if a larger share of the rows cannot be used"
    )
    secrets: Literal["reject", "allow"] = Field("reject", description="rows that hold credentials")
    near_duplicates: float | None = Field(
        None, gt=0, lt=1, description="remove training rows whose estimated Jaccard similarity is at least this"
    )
    heldout_source: str = Field("", description="rows of your own to evaluate on, in place of a share of the source")
    heldout_fraction: float = Field(0.05, gt=0, le=0.5, description="share of the groups kept from training")
    group_column: str = Field(
        "group", description="rows with one value stay on one side of the split; else the first question"
    )
    slice_column: str = Field("slice", description="scores are also given by value of this column, where rows have it")
    check_column: str = Field("check", description="how this row's answer is judged, where rows have it")
    shards: int = Field(1, ge=1, le=1000, description="tasks that prepare the source side by side on the cluster")


class Architecture(Section):
    """A byte-level Llama to be trained from scratch."""

    hidden_size: int = Field(ge=32, multiple_of=32)
    layers: int = Field(ge=1, le=64)
    heads: int = Field(ge=1)
    intermediate_size: int = Field(ge=32)

    @model_validator(mode="after")
    def _heads_divide(self) -> "Architecture":
        if self.hidden_size % self.heads or (self.hidden_size // self.heads) % 32:
            raise ValueError("hidden_size / heads must be a multiple of 32 (the head sizes that vLLM's CPU build has)")
        return self


class ModelRecipe(Section):
    """What training starts from: a base model, or an architecture with random weights."""

    base: str | None = Field(
        None,
        description="a local directory in Hugging Face format, a model id of the hub, or a registered model such as "
        "models:/name@champion",
    )
    revision: str | None = Field(None, description="commit of the hub, or digest of the directory or the package")
    architecture: Architecture | None = None

    @model_validator(mode="after")
    def _one_origin(self) -> "ModelRecipe":
        if (self.base is None) == (self.architecture is None):
            raise ValueError("give either base (a model to start from) or architecture (to train from scratch)")
        return self


class Lora(Section):
    """Low-rank adapters (https://arxiv.org/abs/2106.09685)."""

    rank: int = Field(16, ge=1, le=512)
    alpha: float = Field(32.0, gt=0)
    dropout: float = Field(0.0, ge=0, lt=1)
    target_modules: list[str] = Field(["all-linear"], min_length=1)
    use_rslora: bool = Field(False, description="scale by alpha / sqrt(rank), https://arxiv.org/abs/2312.03732")


class TrainingRecipe(Section):
    """How the weights are trained."""

    method: Literal["full", "lora", "qlora"] = "full"
    lora: Lora | None = None
    nodes: Literal[1, 2] = 1
    nproc_per_node: Literal[1, 2] = Field(1, description="processes a node (GPUs on the cluster)")
    parallelism: Literal["auto", "ddp", "fsdp", "hybrid"] = Field(
        "auto",
        description="a replica a process, or weights, gradients and optimizer sharded over all (fsdp) or within each "
        "node (hybrid); auto is ddp where that fits, else hybrid on several nodes, else fsdp",
    )
    global_batch_size: int = Field(ge=1, description="packed rows in a global batch")
    micro_batch_size: int | None = Field(
        None, ge=1, description="packed rows that a process takes at once; without it, its whole share of a step"
    )
    epochs: float = Field(gt=0, le=1000)
    learning_rate: float = Field(gt=0)
    lr_scheduler: Literal["cosine", "linear", "wsd"] = Field(
        "cosine", description="how the learning rate falls; wsd keeps it and lets the last fifth of the steps decay"
    )
    warmup_ratio: float = Field(0.05, ge=0, lt=1)
    weight_decay: float = Field(0.01, ge=0)
    max_grad_norm: float = Field(1.0, gt=0)
    precision: Literal["fp32", "bf16"] = "bf16"
    activation_checkpointing: Literal["none", "selective", "full"] = Field(
        "none", description="recompute activations in the backward pass: of every second layer, or of all"
    )
    compile: bool = Field(False, description="torch.compile each layer: a slower first step, faster ones after it")
    early_stopping_patience: int | None = Field(
        None, ge=1, description="stop when the held-out loss has not improved so many times in a row"
    )
    checkpoint_minutes: float = Field(10.0, gt=0)
    checkpoint_steps: int | None = Field(None, ge=1, description="also save every so many steps")
    keep_checkpoints: int = Field(2, ge=1)
    max_skipped_steps: int = Field(
        10, ge=0, description="steps left out for a loss or gradient that is not finite or explodes, before it gives up"
    )
    gpu_temperature_limit: float = Field(85.0, gt=0, description="degrees Celsius; above it, training slows down")
    seed: int = Field(0, ge=0)

    @model_validator(mode="after")
    def _consistent(self) -> "TrainingRecipe":
        if (self.lora is None) != (self.method == "full"):
            raise ValueError("method lora or qlora needs the section lora, and full has none")
        world = self.nodes * self.nproc_per_node
        if self.global_batch_size % world:
            raise ValueError(f"global_batch_size must be a multiple of nodes x nproc_per_node ({world})")
        share = self.global_batch_size // world
        if self.micro_batch_size and share % self.micro_batch_size:
            raise ValueError(f"micro_batch_size must divide a process's share of global_batch_size ({share})")
        if self.parallelism == "hybrid" and self.nodes == 1:
            raise ValueError("parallelism hybrid needs several nodes; on one, use fsdp")
        return self


class Check(Section):
    """How an answer is judged against the expected one; its score is in [0, 1]."""

    kind: Literal["exact", "normalised", "json", "regex", "number", "rouge"] = Field(
        description="the same text; the same but for case, spacing and punctuation; the share of JSON fields that are "
        "right; a match of pattern; the last number within tolerance; ROUGE-L"
    )
    pattern: str = Field("", description="regex: found anywhere in the answer")
    tolerance: float = Field(0.0, ge=0, description="number: as a share of the expected number")

    @model_validator(mode="after")
    def _consistent(self) -> "Check":
        if bool(self.pattern) != (self.kind == "regex"):
            raise ValueError("a check of kind regex needs a pattern, and no other has one")
        try:
            re.compile(self.pattern)
        except (re.error, OverflowError) as error:
            raise ValueError(f"pattern is no regular expression: {error}") from None
        return self


class EvaluationRecipe(Section):
    """What is measured on held-out rows."""

    items: int = Field(512, ge=1, description="held-out prompts that are answered and scored")
    max_new_tokens: int = Field(ge=1)
    batch_size: int = Field(128, ge=1)
    check: Check | None = Field(
        None, description="of rows without one of their own; without it, json where JSON is expected, else exact"
    )
    samples: int = Field(0, ge=0, le=64, description="answers drawn a prompt, beside the greedy one that is judged")
    temperature: float = Field(0.7, gt=0, le=2, description="of the drawn answers")
    engine: Literal["auto", "transformers", "vllm"] = Field(
        "auto", description="what answers; auto is vllm, which will serve, where there is a GPU, else transformers"
    )
    harness_tasks: list[str] = Field(
        [], description="tasks of lm-evaluation-harness, by name or as YAML files, that the model is also scored on"
    )


class GateRecipe(Section):
    """What a model must show, on the same items as the champion, to take its place. See docs/evaluation.md."""

    metric: Literal["score", "nll"] = Field("score", description="what models are compared by; margins are in its unit")
    non_inferiority_margin: float = Field(
        0.04, gt=0, description="how much worse than the champion it may not be, at 95 %"
    )
    require_improvement: bool = Field(False, description="it must be better than the champion, at 95 %")
    slice_margin: float = Field(0.15, gt=0, description="the same as non_inferiority_margin, for each slice")
    min_slice_items: int = Field(50, ge=10, description="slices with fewer items are not judged")
    min_items: int = Field(30, ge=2, description="with fewer items nothing is decided")
    min_score: float = Field(0.0, ge=0, le=1, description="what the mean score must reach, at 95 %")
    min_json_validity: float = Field(0.99, ge=0, le=1, description="share of valid JSON where JSON is expected")
    min_finished: float = Field(0.95, ge=0, le=1, description="share of answers that end within max_new_tokens")


class ServingRecipe(Section):
    """How the model is served, and what it must show before it becomes the champion."""

    rollout: bool | None = Field(
        None, description="roll out a model that passes; false ends at a registered challenger, none as FORGE_ROLLOUT"
    )
    replaces: list[str] = Field([], description="public names that a rollout may take away where it needs another base")
    startup_timeout: int = Field(600, ge=10, description="seconds until the server must be healthy")
    replay: int = Field(16, ge=1, description="evaluated prompts that are asked again over the API")
    min_agreement: float = Field(0.9, gt=0, le=1, description="share of them that must be answered as in evaluation")
    max_nll_gap: float = Field(
        0.1, gt=0, description="nats a token between the likelihoods of expected answers, served and in evaluation"
    )
    watch_seconds: float = Field(10, ge=0, description="seconds that it is watched under its public name")
    max_error_rate: float = Field(0.01, ge=0, le=1, description="share of requests that may fail meanwhile")
    max_latency_ratio: float = Field(3, gt=1, description="how much slower than before it may answer meanwhile")
    max_loras: int = Field(2, ge=0, description="adapters that answer at once, of them two while one is replaced")
    max_lora_rank: Literal[8, 16, 32, 64, 128, 256, 320, 512] = Field(16, description="of any adapter, at most")
    max_model_len: int | None = Field(
        None, ge=16, description="tokens of a conversation; without it, the model's own context"
    )
    concurrency: int = Field(8, ge=1, description="conversations of the whole context that must fit at once")


class Recipe(Section):
    """A run: what to train on what, how to judge it, and how to serve it."""

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9-]{0,62}$", description="the registered and served model's name")
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
