"""The object store: where artifacts and packages are kept, complete or not at all."""

from tasks.settings import Settings
from tasks.storage.digest import digest_directory, digest_file, digest_json
from tasks.storage.directory import DirectoryStore
from tasks.storage.files import write_atomically

__all__ = ["DirectoryStore", "digest_directory", "digest_file", "digest_json", "open_store", "write_atomically"]


def open_store(settings: Settings) -> DirectoryStore:
    """The store that the settings name, made if it is not there."""
    return DirectoryStore(settings.store_root)
