"""Settings, recipes, contracts, errors and logs: the base of all other packages."""
