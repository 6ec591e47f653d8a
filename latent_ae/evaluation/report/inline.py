"""Picture files as data URIs, each held once however often it is shown."""

from __future__ import annotations

import base64
import hashlib
import io

from markupsafe import Markup
from PIL import Image

from latent_ae.errors import UserError
from latent_ae.evaluation.report.result import Result

__all__ = ["Inliner"]

_TYPES = {"WEBP": "image/webp", "PNG": "image/png", "JPEG": "image/jpeg"}
_BLANK = "data:image/gif;base64,R0lGODlhAQABAIAAAAAAAP///yH5BAEAAAAALAAAAAABAAEAAAIBRAA7"
# Small pictures are enlarged by a whole number up to this width, so that pixels stay square.
_WIDTH = 256


class Inliner:
    """Makes elements that show pictures.

    Several models share their inputs, which are most of the file: a repeated picture gets a
    placeholder, and the page's script points it to the first.
    """

    def __init__(self) -> None:
        self._seen: dict[str, str] = {}

    def image(self, result: Result, path: str, alt: str, css: str = "") -> Markup:
        """An `<img>` of a file of a result's folder.

        Raises:
            UserError: the file is missing or no picture.
        """
        name, uri, (width, height) = self._inline(result, path)
        source = Markup('src="{}" id="{}"').format(uri, name) if uri else Markup("")
        if not uri:
            source = Markup('src="{}" data-same="{}"').format(_BLANK, name)
        scale = max(1, _WIDTH // max(width, height))
        style = f"--width:{width * scale}px"
        return Markup(
            '<img {} alt="{}" class="{}" width="{}" height="{}" style="{}" decoding="async">'
        ).format(source, alt, css, width, height, style)

    def width(self, result: Result, path: str) -> int:
        """The width in CSS pixels at which a picture is shown where there is room."""
        width, height = _size(result, path, result.file(path))[1]
        return width * max(1, _WIDTH // max(width, height))

    def symbol(self, result: Result, path: str, side: float) -> tuple[str, Markup]:
        """The id of an SVG `<image>` in a square, and its definition if it is the first of it."""
        name, uri, _ = self._inline(result, path, "thumb")
        if not uri:
            return name, Markup("")
        mark = Markup('<image id="{}" href="{}" width="{}" height="{}"/>')
        return name, mark.format(name, uri, side, side)

    def _inline(
        self, result: Result, path: str, kind: str = "picture"
    ) -> tuple[str, str, tuple[int, int]]:
        content = result.file(path)
        mime, size = _size(result, path, content)
        digest = kind + hashlib.sha256(content).hexdigest()
        if digest in self._seen:
            return self._seen[digest], "", size
        name = self._seen[digest] = f"{kind}-{len(self._seen)}"
        return name, f"data:{mime};base64,{base64.b64encode(content).decode()}", size


def _size(result: Result, path: str, content: bytes) -> tuple[str, tuple[int, int]]:
    try:
        with Image.open(io.BytesIO(content), formats=list(_TYPES)) as picture:
            return _TYPES[picture.format or ""], picture.size
    except (OSError, ValueError, KeyError, Image.DecompressionBombError) as error:
        raise UserError(
            f"the evaluation {result.folder} is damaged: its file {path} is no picture; "
            "run `latent-ae evaluate` again"
        ) from error
