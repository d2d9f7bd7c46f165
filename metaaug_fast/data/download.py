"""Files that are published somewhere, fetched once."""

from __future__ import annotations

from pathlib import Path


def fetch(url: str, path: Path, digest: str) -> None:
    """Put the file at `url` to `path`, with a progress bar, and check its digest; nothing, if there is a file already.

    Args:
        digest: `"sha256:..."` or `"md5:..."`.

    Raises:
        ConnectionError: the transfer failed, or what came has another digest; nothing is left behind.
    """
    if path.exists():
        return
    import pooch  # here, for it takes a tenth of a second that only a download is worth
    import requests

    try:
        pooch.retrieve(url, digest, fname=path.name, path=path.parent, progressbar=True)
    except requests.RequestException as error:
        raise ConnectionError(f"{url}: the download failed ({error}); try again") from error
    except ValueError as error:
        raise ConnectionError(
            f"{url}: what came is not the published file (its digest is not {digest}); try again, or put {path.name} "
            f"into {path.parent} by hand"
        ) from error
