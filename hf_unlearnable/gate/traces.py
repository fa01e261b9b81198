"""Traces of a person or a machine in texts: local paths, EXIF, GPS."""

import re
from collections.abc import Iterator, Mapping
from typing import Any

_FOLDERS = (
    "home|Users|users|root|Volumes|media|mnt|private|tmp|data|scratch|export|work|workspace|content|kaggle|nfs|srv|var"
    "|opt|gpfs|lustre|beegfs|storage|project|projects|cluster|net"
)
_FILES = "jpe?g|png|webp|gif|bmp|tiff?|heic|cr2|nef|dng|raw|mp4|mov|avi|tar"
_TRACES = {
    "a local path": re.compile(
        rf"(?<![\w.~/\\-])/(?:{_FOLDERS})/|(?<![\w/])~/\w|\b[A-Za-z]:(?:\\{{1,2}}|/(?!/))\w"
        r"|(?<![\w\\])\\\\\w+\\\w|\bfile://"
        r"|(?<![\w.])(?:\.\./|\./|\.\.\\{1,2})[\w.]"
        rf"|^(?![\w-]+\.[\w.-]*/)[^/\\:\n]+[/\\][^:\n]*\.(?i:{_FILES})$"
    ),
    "EXIF or GPS data": re.compile(
        r"\bGPS(?:Latitude|Longitude|Altitude|Info|Position)|\bDateTimeOriginal\b|\bMakerNote\b|\bExif\.\w+\."
        r"|\bgeo:-?\d|\d{1,3} ?° ?\d{1,2}|^\s*[\[(]?-?\d{1,2}\.\d{3,}\s*,\s*-?\d{1,3}\.\d{3,}[\])]?\s*$"
    ),
}
_ANY = re.compile("|".join(pattern.pattern for pattern in _TRACES.values()))
_TELLING_NAME = re.compile(
    r"(?:^|[_.\s-])(?:exif|gps|latitude|longitude|geolocation|lat|lon|lng|camera|makernote)(?:$|[_.\s-])", re.IGNORECASE
)


def trace(text: str | bytes) -> str | None:
    """What a text looks like ("a local path", "EXIF or GPS data"), or None; of bytes, an EXIF block alone is known."""
    if isinstance(text, bytes):
        return "EXIF or GPS data" if b"Exif\0\0" in text else None
    if not _ANY.search(text):
        return None
    return next(name for name, pattern in _TRACES.items() if pattern.search(text))


def telling(name: str) -> bool:
    """Whether a column of this name is likely to hold EXIF, GPS or camera data."""
    return _TELLING_NAME.search(name) is not None


def leaves(value: Any) -> Iterator[Any]:
    """The values inside lists and mappings, keys of mappings included."""
    if isinstance(value, Mapping):
        for name, inner in value.items():
            yield name
            yield from leaves(inner)
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from leaves(inner)
    else:
        yield value
