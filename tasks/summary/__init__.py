"""The summary of a run, on the terminal and in .forge/last-run.json."""
