"""S3 requests that the public API of the minio client lacks. Nothing else in Forge uses the client's private members.

- Multipart uploads, part by part. `put_object` and `fput_object` abort the whole upload when a part fails. Forge
  compares the ETag of each part, and sends only that part again.
- Unfinished multipart uploads, which have to be listed before they can be aborted.
- Conditional writes. `put_object` sends If-None-Match and If-Match as user metadata.
"""

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from minio import Minio
    from minio.datatypes import Upload
    from minio.helpers import ObjectWriteResult

Bytes = bytes | bytearray | memoryview


def put(client: "Minio", bucket: str, name: str, data: Bytes, headers: Mapping[str, str]) -> "ObjectWriteResult":
    """Write an object in one request with these headers."""
    return client._put_object(bucket, name, data, dict(headers))  # type: ignore[arg-type]


def put_part(
    client: "Minio", bucket: str, name: str, data: Bytes, headers: Mapping[str, str], upload_id: str, number: int
) -> "ObjectWriteResult":
    """Send part `number` (from 1) of a multipart upload."""
    query: dict[str, Any] = {"partNumber": str(number), "uploadId": upload_id}
    return client._put_object(bucket, name, data, dict(headers), query)  # type: ignore[arg-type]


def create_upload(client: "Minio", bucket: str, name: str, headers: Mapping[str, str]) -> str:
    """Begin a multipart upload; returns its ID."""
    return client._create_multipart_upload(bucket, name, dict(headers))


def complete_upload(client: "Minio", bucket: str, name: str, upload_id: str, etags: list[str]) -> None:
    """Make an object of the parts, whose ETags are in order."""
    from minio.datatypes import Part

    parts = [Part(number, etag) for number, etag in enumerate(etags, start=1)]
    client._complete_multipart_upload(bucket, name, upload_id, parts)


def abort_upload(client: "Minio", bucket: str, name: str, upload_id: str) -> None:
    """Delete the parts of a multipart upload."""
    client._abort_multipart_upload(bucket, name, upload_id)


def unfinished_uploads(client: "Minio", bucket: str, prefix: str) -> "Iterator[Upload]":
    """The multipart uploads under a prefix that were neither completed nor aborted."""
    key, upload_id = "", ""
    while True:
        page = client._list_multipart_uploads(bucket, prefix=prefix, key_marker=key, upload_id_marker=upload_id)
        yield from page.uploads
        key, upload_id = page.next_key_marker or "", page.next_upload_id_marker or ""
        if not page.is_truncated or not key:
            return
