"""Models as files: weights, tokenizers and chat templates."""
