"""The cluster's nodes and GPUs."""
