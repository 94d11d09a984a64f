"""Data preparation: Forge's against TRL's, on the same generated rows."""
