"""What a user reads where a step finds no memory."""

import contextlib
from collections.abc import Iterator

import torch

from forge.capacity.model_size import ModelSize
from forge.capacity.training_memory import Parallelism, estimate_memory, nearest_fit
from forge.cluster.gpus import GIB, find_gpus
from forge.core.errors import ForgeError
from forge.core.recipe import TrainingRecipe

LESS = 0.8  # of the estimate: what an advised change comes to at most


@contextlib.contextmanager
def explain_oom(size: ModelSize, recipe: TrainingRecipe, context: int, how: Parallelism) -> Iterator[None]:
    """Turn torch's error into one with what was to be allocated, the estimate, and the recipe's fields that help."""
    try:
        yield
    except RuntimeError as error:
        reason = str(error).partition("\n")[0]
        # The allocator for the CPU has no class of error of its own.
        if not isinstance(error, torch.OutOfMemoryError) and "can't allocate memory" not in reason:
            raise
        reason = reason[reason.find("you tried") :] if "you tried" in reason else reason.partition(" GPU ")[0]
        estimate = estimate_memory(size, recipe, context, how)
        gpu = next(iter(find_gpus()), None)
        mend = nearest_fit(size, recipe, context, gpu, int(LESS * estimate.total))
        taken = f"; torch held {torch.cuda.max_memory_allocated() / GIB:.1f} GiB" if torch.cuda.is_available() else ""
        raise ForgeError(
            f"out of memory: {reason.rstrip('. ')}{taken}. One process was estimated to need {estimate}; "
            + (f"less is needed with {', '.join(mend)}" if mend else "take a smaller base model")
            + ", or end what else is using this memory"
        ) from None
