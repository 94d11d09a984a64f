"""The object store for artifacts and packages, each complete or absent."""

from forge.core.digest import digest_directory, digest_file, digest_json
from forge.core.settings import Settings
from forge.storage.bucket_store import BucketStore
from forge.storage.directory_store import DirectoryStore
from forge.storage.files import write_atomically

Store = DirectoryStore | BucketStore

__all__ = [
    "BucketStore",
    "DirectoryStore",
    "Store",
    "digest_directory",
    "digest_file",
    "digest_json",
    "open_store",
    "write_atomically",
]


def open_store(settings: Settings) -> Store:
    """The store in the settings. Opening it writes nothing, so read access is enough to read."""
    return BucketStore(settings.store, settings) if settings.store else DirectoryStore(settings.store_root)
