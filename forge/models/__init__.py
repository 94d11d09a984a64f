"""Weights, tokens and the hub."""
