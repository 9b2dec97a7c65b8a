"""Downloads into the user's cache: known files only, of which size, checksum and a fair time are known beforehand."""

import os
import threading
import time
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from adam_jax.paper.formats import DataError

__all__ = ["Known", "fetch"]

SLOWEST = 100_000  # bytes a second that a server must send, on average
PATIENCE = 60.0  # seconds to begin with


class Known(NamedTuple):
    """A file on the network."""

    url: str
    md5: str
    size: int

    @property
    def name(self) -> str:
        """Its file name."""
        return self.url.rsplit("/", 1)[1]


def fetch(known: Known) -> Path:
    """A file from the network, kept in the user's cache; a damaged or half-written one there is fetched again."""
    try:
        import pooch
        import requests
    except ModuleNotFoundError as error:
        raise DataError(f"package {error.name} is not installed, so nothing was downloaded") from None
    folder = os.environ.get("ADAM_JAX_CACHE") or pooch.os_cache("adam_jax")
    downloader: Any = partial(_download, known)  # what Pooch calls it with is not what its types say
    try:
        return Path(pooch.retrieve(known.url, f"md5:{known.md5}", known.name, folder, downloader=downloader))
    except (OSError, ValueError, requests.RequestException) as error:
        reason = (str(error) or "no reason given").splitlines()[0][:160]
        raise DataError(f"{known.url} could not be downloaded to {folder} ({type(error).__name__}: {reason})") from None


def _download(known: Known, _url: str, path: str, _pooch: Any) -> None:
    """In a thread of its own, which can be left behind: a header that drips never comes back from a read."""
    seconds, raised = PATIENCE + known.size / SLOWEST, []
    end = time.monotonic() + seconds

    def work() -> None:
        try:
            _stream(known, path, end)
        except BaseException as error:
            raised.append(error)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(seconds)
    if thread.is_alive() or any(isinstance(error, TimeoutError) for error in raised):
        raise ValueError(f"it did not come within {seconds:.0f} s, and was cut off")
    if raised:
        raise raised[0]


def _stream(known: Known, path: str, end: float) -> None:
    import requests

    left = known.size
    with (
        requests.get(known.url, stream=True, timeout=(5, 60), headers={"Accept-Encoding": "identity"}) as response,
        open(path, "wb") as file,
    ):
        response.raise_for_status()
        for chunk in response.iter_content(4096):
            left -= len(chunk)
            if left < 0:
                raise ValueError(f"the server sends more than the {known.size:,} bytes of that file")
            if time.monotonic() > end:
                raise TimeoutError
            file.write(chunk)
