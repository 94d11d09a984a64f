"""What a run came to: on the terminal, and in .forge/last-run.json."""
