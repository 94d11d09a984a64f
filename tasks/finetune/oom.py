"""Explain out-of-memory errors."""

import contextlib
from collections.abc import Iterator

import torch

from forge.capacity.model_size import ModelSize
from forge.capacity.training_memory import Parallelism, estimate_memory, nearest_fit
from forge.cluster.gpus import GIB, find_gpus
from forge.core.errors import ForgeError
from forge.core.recipe import TrainingRecipe

TARGET = 0.8  # fraction of the estimate that a suggested change must stay below


@contextlib.contextmanager
def explain_oom(size: ModelSize, recipe: TrainingRecipe, context: int, parallelism: Parallelism) -> Iterator[None]:
    """Turn torch's error into one with the failed allocation, the estimate, and changes to the recipe that help."""
    try:
        yield
    except RuntimeError as error:
        reason = str(error).partition("\n")[0]
        # The CPU allocator raises a plain RuntimeError.
        if not isinstance(error, torch.OutOfMemoryError) and "can't allocate memory" not in reason:
            raise
        reason = reason[reason.find("you tried") :] if "you tried" in reason else reason.partition(" GPU ")[0]
        estimate = estimate_memory(size, recipe, context, parallelism)
        gpu = next(iter(find_gpus()), None)
        changes = nearest_fit(size, recipe, context, gpu, int(TARGET * estimate.total))
        held = f"; torch held {torch.cuda.max_memory_allocated() / GIB:.1f} GiB" if torch.cuda.is_available() else ""
        raise ForgeError(
            f"{reason.rstrip('. ')}{held}. The estimate for one process was {estimate}",
            where="out of memory",
            fix=(f"set {', '.join(changes)}" if changes else "use a smaller base model")
            + ", or stop other programs that use this memory",
        ) from None
