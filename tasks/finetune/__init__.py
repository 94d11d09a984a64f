"""Packed rows and a base model (or an architecture) -> a trained model. Torch-native, on any number of processes."""
