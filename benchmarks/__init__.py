"""Benchmarks: Forge's speed, measured on its own and against other tools."""
