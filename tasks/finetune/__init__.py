"""Packed rows and a base model (or an architecture) -> a trained model. Plain torch, on any number of processes."""

import logging

# Whenever peft checks for it, it warns about missing CPU kernels that it can do without.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
