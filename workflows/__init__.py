"""What runs: the workflows that tie the stages together."""
