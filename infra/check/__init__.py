"""What can be known of the manifests without a cluster: `python -m infra.check`, or `make infra-check`."""
