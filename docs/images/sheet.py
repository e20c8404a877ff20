"""Pictures under one another, each below its words."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

HEIGHT = 28
"""Pixels of a line of words."""


def save_sheet(rows: Mapping[str, Image.Image], path: Path) -> None:
    """Write the rows as one PNG."""
    font = ImageFont.load_default(16)
    width = max(picture.width for picture in rows.values())
    sheet = Image.new("RGB", (width, sum(picture.height + HEIGHT for picture in rows.values())), "white")
    top = 0
    for words, picture in rows.items():
        ImageDraw.Draw(sheet).text((4, top + 5), words, fill="black", font=font)
        sheet.paste(picture, (0, top + HEIGHT))
        top += HEIGHT + picture.height
    sheet.save(path, optimize=True)
