"""Packed rows and a base model (or an architecture) -> a trained model. Torch-native, on any number of processes."""

import logging

# It warns of kernels for a CPU that it does without, whenever peft looks whether it is there.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
