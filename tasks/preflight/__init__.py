"""Checks of everything a run needs, in seconds and before anything expensive starts. All problems are reported."""
