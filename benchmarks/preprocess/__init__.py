"""Data preparation: Forge compared with TRL, on the same generated rows."""
