"""Benchmarks: what Forge's speed is, measured beside what it is compared with."""
