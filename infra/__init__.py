"""The cluster as code. Only check/ contains Python."""
