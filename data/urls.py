"""Which URLs may be read."""

from __future__ import annotations

import re

# What fsspec needs for a scheme, as pip names it. No other scheme is read: some of fsspec's run commands or open other machines.
EXTRAS = {
    "s3": "s3fs",
    "s3a": "s3fs",
    "gs": "gcsfs",
    "gcs": "gcsfs",
    "az": "adlfs",
    "abfs": "adlfs",
    "hf": "huggingface_hub",
}
HTTP = ("http", "https")


def url_fault(url: str) -> str:
    """Why a URL is not read, in words that do not repeat a password; "" if it is."""
    scheme, _, rest = url.partition("://")
    allowed = (*HTTP, *EXTRAS)
    if scheme.lower() not in allowed:
        return f"{scheme}:// is not read (only {', '.join(allowed)} and local paths are)"
    if "::" in rest.partition("?")[0] and scheme.lower() not in HTTP:
        return f"a chain of file systems ({scheme}://...::...) is not read"
    _, at, host = re.split(r"[/?#]", rest, maxsplit=1)[0].rpartition("@")
    if at and scheme.lower() != "abfs":  # Azure's container@account is no user
        return (
            f"{scheme}://...@{host} has a user's name or password in it, which would be "
            "written into manifests and logs; give them to the storage's library by its environment variables or files"
        )
    return ""


def check_url(url: str) -> None:
    """Raises ValueError for a URL that is not read."""
    if fault := url_fault(url):
        raise ValueError(fault)
