"""Cells of a catalogue to pictures: files, bytes and, where allowed, URLs; whatever can't be read says why.

Catalogues are full of images that are missing, cut off, or not images at all, so nothing here stops at one:
`read_first` gives the first picture that can be read, or the kind of failure. What is drawn from it is elsewhere.
"""

import hashlib
import io
import math
import re
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmrec.errors import DataError, SettingsError

if TYPE_CHECKING:
    from PIL import Image

MAX_PIXELS = 89_478_485  # Pillow's own bound, from which it warns of a decompression bomb
MAX_PROPORTION = 100  # longer side by shorter: resizing the shorter one to 224 would make a huge picture of a thin one
URL_BYTES = 20 * 2**20
URL_SECONDS = 10.0
URL_PATTERN = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+://")


class Outcome(IntEnum):
    """What became of an item's images; the worst of them where an item has several and none could be read."""

    READ = 0
    NONE_GIVEN = 1
    NO_FILE = 2
    BROKEN = 3
    TOO_LARGE = 4
    NOT_FETCHED = 5


OUTCOME_WORDS = {
    Outcome.NONE_GIVEN: "without an image in that column",
    Outcome.NO_FILE: "whose file doesn't exist",
    Outcome.BROKEN: "whose image is broken or cut off",
    Outcome.TOO_LARGE: f"whose image has over {MAX_PIXELS:,} pixels or is {MAX_PROPORTION} times as long as wide",
    Outcome.NOT_FETCHED: "whose image couldn't be fetched",
}


@dataclass(frozen=True)
class Location:
    """Where one image is: a file, the bytes themselves, or a URL."""

    path: Path | None = None
    content: bytes | None = None
    url: str | None = None

    def fingerprint(self) -> list[Any]:
        """Equal for equal images, without reading files: path, size and time of change; the URL; a hash of bytes."""
        if self.content is not None:
            return ["bytes", hashlib.sha256(self.content).hexdigest()]
        if self.path is None:
            return ["url", self.url]
        try:
            status = self.path.stat()
        except OSError:
            return ["file", str(self.path), None, None]
        return ["file", str(self.path.absolute()), status.st_size, status.st_mtime_ns]


def import_pillow() -> Any:
    """The module PIL.Image.

    Raises:
        SettingsError: Pillow isn't installed.
    """
    try:
        from PIL import Image
    except ImportError as error:
        raise SettingsError('reading images needs the package Pillow: `pip install "llmrec[image]"`') from error
    return Image


def locations_of(cell: Any, item_id: str, *, folder: Path | None, allow_urls: bool) -> list[Location]:
    """The images of one cell, in order.

    Args:
        cell: A path or URL, the {"bytes", "path"} of a `datasets.Image` that isn't decoded, bytes, a list of these;
            None, NaN and blank text are no image.
        item_id: For messages.
        folder: Relative paths start here; None: in the working folder.
        allow_urls: Whether http and https URLs are taken.

    Raises:
        DataError: A URL where they aren't allowed or one that is neither http nor https; a cell of another kind.
    """
    if cell is None or (isinstance(cell, float) and math.isnan(cell)):
        return []
    if isinstance(cell, list | tuple):
        return [found for part in cell for found in locations_of(part, item_id, folder=folder, allow_urls=allow_urls)]
    if isinstance(cell, dict) and set(cell) == {"bytes", "path"}:
        cell = cell["bytes"] if cell["bytes"] is not None else cell["path"]
        return locations_of(cell, item_id, folder=folder, allow_urls=allow_urls)
    if isinstance(cell, bytes):
        return [Location(content=cell)]
    if not isinstance(cell, str | Path):
        raise DataError(
            f"the image of item {item_id!r} is a {type(cell).__name__}: paths, URLs, images of the datasets library"
            " and lists of these can be read"
        )
    text = str(cell).strip()
    if not text:
        return []
    if isinstance(cell, str) and URL_PATTERN.match(text):
        if not text.lower().startswith(("http://", "https://")):
            raise DataError(f"the image of item {item_id!r} is {text!r}: only http and https URLs can be fetched")
        if not allow_urls:
            raise DataError(
                f"the image of item {item_id!r} is the URL {text!r}: download the images first, or pass"
                " allow_urls=True to fetch them (each a request to a server that the catalogue names)"
            )
        return [Location(url=text)]
    return [Location(path=Path(text) if folder is None else folder / text)]


def read_first(locations: Sequence[Location]) -> "tuple[Image.Image | None, Outcome]":
    """The first image that can be read, as RGB; else None, and what kept the last one tried from being read."""
    outcome = Outcome.NONE_GIVEN
    for location in locations:
        picture, outcome = _read(location)
        if picture is not None:
            break
    return picture if outcome == Outcome.READ else None, outcome


def _read(location: Location) -> "tuple[Image.Image | None, Outcome]":
    image_module = import_pillow()
    if location.url is not None:
        try:
            data: Any = io.BytesIO(_fetch(location.url))
        except (OSError, ValueError):  # URLError and timeouts are OSErrors
            return None, Outcome.NOT_FETCHED
    elif location.content is not None:
        data = io.BytesIO(location.content)
    else:
        data = location.path
        if not data.is_file():
            return None, Outcome.NO_FILE
    try:
        with image_module.open(data) as image:  # reads the header alone
            longer, shorter = max(image.size), min(image.size)
            if longer * shorter > MAX_PIXELS or longer > MAX_PROPORTION * shorter:
                return None, Outcome.TOO_LARGE
            return _as_rgb(image), Outcome.READ
    except image_module.DecompressionBombError:
        return None, Outcome.TOO_LARGE
    except (
        Exception
    ):  # Pillow's readers raise nearly anything on broken files: SyntaxError, struct.error, KeyError, ...
        return None, Outcome.BROKEN


def _as_rgb(image: "Image.Image") -> "Image.Image":
    """Decoded, upright as the camera says, transparent parts white; of an animation the first frame."""
    from PIL import Image, ImageOps

    upright = ImageOps.exif_transpose(image)
    if not upright.has_transparency_data:
        return upright.convert("RGB")
    layer = upright.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer).convert("RGB")


def _fetch(url: str) -> bytes:
    """The bytes behind a URL, at most `URL_BYTES` and within `URL_SECONDS`, however slowly they drip in.

    Raises:
        OSError: No answer, an error status, too large, or too slow.
    """
    request = urllib.request.Request(url, headers={"User-Agent": "llmrec"})
    deadline = time.monotonic() + URL_SECONDS
    content = bytearray()
    with urllib.request.urlopen(request, timeout=URL_SECONDS) as answer:
        while block := answer.read1(2**16):
            content += block
            if len(content) > URL_BYTES:
                raise OSError(f"{url} is larger than {URL_BYTES} bytes")
            if time.monotonic() > deadline:
                raise TimeoutError(f"{url} took longer than {URL_SECONDS} seconds")
    return bytes(content)
