"""The object store: where artifacts and packages are kept, complete or not at all."""

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
    """The store that the settings name. Opening it writes nothing there, and who only reads need not be able to."""
    return BucketStore(settings.store, settings) if settings.store else DirectoryStore(settings.store_root)
