"""What a figure hands back, and how it is kept: curves as .npz, settings and claims as .json."""

import hashlib
import io
import json
import stat
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from adam_jax.paper import saved

__all__ = ["Claim", "Curve", "Panel", "Result", "Table", "files", "finished", "write"]

LARGEST = 2**24  # bytes of a record


@dataclass(frozen=True)
class Curve:
    """One line of a panel."""

    label: str  # its name in the legend
    x: np.ndarray  # [points]
    y: np.ndarray  # [seeds, points]: the mean is drawn, and a band from the least to the greatest
    colour: str  # any Matplotlib colour
    dashed: bool = False  # how lines of one colour are told apart


@dataclass(frozen=True)
class Panel:
    """One pair of axes."""

    title: str  # above it
    x_label: str  # below it
    y_label: str  # beside it
    curves: list[Curve]  # what is drawn
    logarithmic: bool = False  # whether the vertical axis is
    limits: tuple[float, float] | None = None  # of the vertical axis; None leaves them to Matplotlib


@dataclass(frozen=True)
class Table:
    """Rows of text under a title."""

    title: str
    columns: list[str]
    rows: list[list[str]]


@dataclass(frozen=True)
class Claim:
    """What the paper says, whether it held, and the numbers from which that was computed."""

    text: str
    held: bool
    numbers: str


@dataclass(frozen=True)
class Result:
    """A figure as data."""

    title: str  # of the picture
    panels: list[Panel]  # drawn side by side, in `columns` columns
    tables: list[Table]  # printed
    claims: list[Claim]  # printed and kept
    settings: dict[str, Any]  # kept as JSON
    caption: str = ""  # under the picture: data, seeds, what differs from the paper
    columns: int = 2  # of panels
    shared: bool = False  # whether all panels have the same axes and one legend
    # more arrays to keep, where the panels do not show all that was measured
    curves: Mapping[str, np.ndarray] = field(default_factory=dict)


def write(
    result: Result, picture: Callable[[io.BytesIO], None], stem: Path, identity: dict[str, Any], conditions: str = ""
) -> list[Path]:
    """Write STEM.png, STEM.npz and, last, STEM.json; each appears whole or not at all.

    Args:
        result: what to keep.
        picture: writes the PNG into a file.
        stem: path without an ending.
        identity: what tells this run from others with the same name.
        conditions: under which the claims were judged; empty for the paper's own.

    Returns:
        The three paths.

    Raises:
        OSError: where they cannot be written.

    Example:
        >>> import tempfile
        >>> stem = Path(tempfile.mkdtemp(), "fig")
        >>> result = Result("t", [], [], [Claim("water is wet", True, "100 %")], {"seeds": 1})
        >>> [path.name for path in write(result, lambda file: None, stem, {})]
        ['fig.png', 'fig.npz', 'fig.json']
    """
    arrays: dict[str, Any] = dict(result.curves)
    for p, panel in enumerate(result.panels):
        for curve in panel.curves:
            arrays[f"{p}|{panel.title}|{curve.label}|x"] = curve.x
            arrays[f"{p}|{panel.title}|{curve.label}|y"] = curve.y
    image, data = io.BytesIO(), io.BytesIO()
    picture(image)
    np.savez_compressed(data, **arrays)
    contents = {".png": image.getvalue(), ".npz": data.getvalue()}
    where = conditions or "in the paper's experiment"
    record = {
        "title": result.title,
        "caption": result.caption,
        "identity": identity,
        "settings": result.settings,
        "claims": [{"claim": c.text, "where": where, "held": bool(c.held), "numbers": c.numbers} for c in result.claims],
        "tables": [{"title": t.title, "columns": t.columns, "rows": t.rows} for t in result.tables],
        "files": {ending: hashlib.sha256(content).hexdigest() for ending, content in contents.items()},
    }
    contents[".json"] = (json.dumps(record, indent=1) + "\n").encode()
    return [saved.write(path, content) for path, content in zip(files(stem), contents.values(), strict=True)]


def files(stem: Path) -> list[Path]:
    """The picture, the curves and the record of that figure."""
    return [stem.with_name(stem.name + ending) for ending in (".png", ".npz", ".json")]


def finished(stem: Path, identity: dict[str, Any]) -> bool:
    """Whether a figure of that identity is there: its record, and beside it the picture and the curves that it names."""
    *contents, record = files(stem)
    try:
        if not all(stat.S_ISREG(path.lstat().st_mode) for path in (*contents, record)) or record.stat().st_size > LARGEST:
            return False
        found = json.loads(record.read_bytes())
        return found["identity"] == identity and found["files"] == {path.suffix: _sha256(path) for path in contents}
    except (OSError, ValueError, LookupError, TypeError, RecursionError):  # no record of ours
        return False


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
