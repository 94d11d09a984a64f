"""Checks of the manifests that need no cluster: `python -m infra.check`, or `make infra-check`."""
