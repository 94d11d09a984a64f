"""Forge apart: a registered package run as Flyte runs it, each task in a pod that shares nothing with the others."""
