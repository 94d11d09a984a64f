"""The packaged workflows run as on a cluster: each task in a pod of its own, which shares no disk with the others."""
