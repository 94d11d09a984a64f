"""Pushing and fetching a package, beside the plain minio client."""
