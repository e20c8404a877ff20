"""Run folders -> one self-contained HTML page each, for a researcher and a clinician alike; nothing is fetched.

In: what a run leaves in its folder, whole or in part. Out: ``report.html`` (`build`: the page of a run; `demo`: runs
side by side), made of pictures (`figures`), charts (`charts`), what is read from the folder (`folder`) and templates.
"""

from scarceseg.report.build import build_report
from scarceseg.report.demo import build_demo_report
from scarceseg.report.figures import overlay_png

__all__ = ["build_demo_report", "build_report", "overlay_png"]
