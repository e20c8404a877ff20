"""Makes demo.png from a finished demo: ``python docs/images/make.py demo``. Rows are the methods, columns three planes."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path

from PIL import Image
from sheet import save_sheet

from scarceseg.data.images import read_image
from scarceseg.report import overlay_png


def row(demo: Path, method: str, case: str) -> Image.Image:
    """Prediction of one method on one unseen volume, the reference outlined in white."""
    image, geometry = read_image(demo / "data" / "imagesTs" / f"{case}_0000.nii.gz")
    reference, _ = read_image(demo / "data" / "labelsTs" / f"{case}.nii.gz")
    prediction, _ = read_image(demo / "predictions" / method / f"{case}.nii.gz")
    png = overlay_png(
        image, prediction, reference, spacing_mm=geometry.spacing_mm, direction=geometry.direction, side=300
    )
    return Image.open(io.BytesIO(png)).convert("RGB")


def main() -> None:
    """First unseen case, every method of the demo."""
    demo = Path(sys.argv[1])
    summary = json.loads((demo / "summary.json").read_text(encoding="utf-8"))
    case = sorted(path.name.removesuffix(".nii.gz") for path in (demo / "data" / "labelsTs").glob("*.nii.gz"))[0]
    rows = {method: row(demo, method, case) for method in summary}
    save_sheet(rows, Path(__file__).with_name("demo.png"))


if __name__ == "__main__":
    main()
