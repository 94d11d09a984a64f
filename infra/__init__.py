"""The cluster as code. Python is only in check/."""
