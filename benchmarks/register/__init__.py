"""Publishing and fetching a package, compared with the plain minio client."""
