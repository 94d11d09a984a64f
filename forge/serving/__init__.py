"""Serving: the desired state, and the reconciler that makes vLLM serve it."""
