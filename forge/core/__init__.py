"""Settings, recipes, contracts and errors: what everything else builds on."""
