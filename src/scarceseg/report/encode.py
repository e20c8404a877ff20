"""Pictures -> bytes and data URIs, so that a page holds them itself."""

from __future__ import annotations

import base64
import io
from typing import Any

from PIL import Image


def png_bytes(image: Image.Image, **options: Any) -> bytes:
    """A PNG file."""
    return _bytes(image, "PNG", **options)


def data_uri(content: bytes, kind: str = "png") -> str:
    """Any image file as a URI."""
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


def png_uri(image: Image.Image, **options: Any) -> str:
    """As a data URI, for clear-ground layers."""
    extra: dict[str, Any] = {"transparency": image.info["transparency"]} if "transparency" in image.info else {}
    return data_uri(png_bytes(image, **extra, **options))


def jpeg_uri(image: Image.Image, **options: Any) -> str:
    """As a data URI, for grey slices and pictures without clear ground."""
    return data_uri(_bytes(image, "JPEG", quality=85, **options), "jpeg")


def _bytes(image: Image.Image, kind: str, **options: Any) -> bytes:
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()
