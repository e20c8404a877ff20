"""Pages in headless Chromium: what their scripts do, what they ask the network for, and whether they fit the window."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import pytest

PROBE = """
"use strict";
const found = { errors: [], requests: [], blocked: [], viewers: [], toggles: [], charts: 0 };
window.addEventListener("error", e => found.errors.push(String(e.message)), true);
document.addEventListener("securitypolicyviolation", e => found.blocked.push(e.violatedDirective + " " + e.blockedURI));
const shot = canvas => {
  const data = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height).data;
  let hash = 0, grey = 0, colour = 0;
  for (let k = 0; k < data.length; k += 4) {
    hash = (hash * 31 + data[k] + 256 * data[k + 1] + 65536 * data[k + 2]) >>> 0;
    if (data[k] > 40) grey++;
    if (Math.abs(data[k] - data[k + 2]) > 60) colour++;
  }
  return { hash, grey, colour };
};
const act = () => {
  for (const viewer of document.querySelectorAll(".viewer")) {
    const canvases = [...viewer.querySelectorAll("canvas")], before = canvases.map(shot);
    for (const input of viewer.querySelectorAll(".slide:not([hidden]) input")) {
      input.value = Number(input.value) > 1 ? Number(input.value) - 2 : Number(input.value) + 2;
      input.dispatchEvent(new Event("input"));
    }
    const after = canvases.map(shot);
    const slides = viewer.querySelectorAll(".slide:not([hidden])").length;
    found.viewers.push({ title: viewer.querySelector("h3").textContent, slides, before, after });
    const box = viewer.querySelector(".toggles input");
    box.checked = !box.checked;
    box.dispatchEvent(new Event("change"));
    found.toggles.push(canvases.some((canvas, k) => shot(canvas).hash !== after[k].hash));
  }
  const svg = document.querySelector("[data-chart] svg");
  if (svg) {
    const box = svg.getBoundingClientRect();
    svg.dispatchEvent(new PointerEvent("pointermove", { clientX: box.left + box.width / 2, clientY: box.top + 5 }));
    found.readout = svg.parentElement.querySelector(".readout").textContent;
  }
  found.requests = performance.getEntriesByType("resource").map(e => e.name).filter(n => !n.startsWith("data:"));
  for (const part of document.querySelectorAll("details")) part.open = true;
  const out = document.createElement("pre");
  out.id = "found";
  out.textContent = JSON.stringify(found);
  document.body.append(out);
};
window.addEventListener("load", () => setTimeout(act, 300));
"""

WIDTH = """
window.addEventListener("load", () => setTimeout(() => {
  for (const part of document.querySelectorAll("details")) part.open = true;
  const wide = document.documentElement.scrollWidth, room = document.documentElement.clientWidth;
  const scrolls = e => e && (getComputedStyle(e).overflowX === "auto" || scrolls(e.parentElement));
  const out = [...document.querySelectorAll("main *")].filter(e => e.getBoundingClientRect().right > room + 1 && !scrolls(e));
  parent.postMessage({ width: window.innerWidth, wide, room, out: out.slice(0, 3).map(e => e.outerHTML.slice(0, 120)) }, "*");
}, 200));
"""


def chromium() -> str:
    for name in ("chromium", "chromium-browser", "google-chrome"):
        if (path := shutil.which(name)) is not None:
            return path
    pytest.skip("no Chromium is installed, so the page cannot be rendered")


def with_script(page: Path, script: str, name: str) -> Path:
    """A copy of a page that runs a script before its own."""
    copy = page.with_name(name)
    text = page.read_text(encoding="utf-8")
    copy.write_text(text.replace("</head>", f"<script>{script}</script></head>", 1), encoding="utf-8")
    return copy


def dump(page: Path) -> tuple[str, list[str]]:
    """The page's document after its scripts have run, and what the console said."""
    quiet = ["gpu", "quic", "background-networking", "component-update", "sync", "dev-shm-usage"]
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        command = [
            chromium(),
            "--headless",
            "--no-sandbox",
            "--no-first-run",
            "--enable-logging=stderr",
            "--window-size=1600,1200",
            *(f"--disable-{part}" for part in quiet),
            f"--user-data-dir={profile}",
            "--virtual-time-budget=8000",
            "--dump-dom",
            page.as_uri(),
        ]
        done = subprocess.run(command, capture_output=True, encoding="utf-8", timeout=180, check=False)
    assert "</html>" in done.stdout, done.stderr[-500:]
    console = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    return done.stdout, [
        line for line in console if "willReadFrequently" not in line
    ]  # said of the probe's own reading


def probe(page: Path) -> dict[str, Any]:
    """Load a page from its file, move every slider, use a box of every viewer; what was seen."""
    text, console = dump(with_script(page, PROBE, "probe.html"))
    found = re.search(r'<pre id="found">(.*?)</pre>', text, re.DOTALL)
    assert found, console
    return {**json.loads(html.unescape(found[1])), "console": console}


def widths(page: Path, wanted: list[int]) -> dict[int, dict[str, Any]]:
    """For windows of these widths: what sticks out of them. Frames, since a window itself cannot be that narrow."""
    copy = with_script(page, WIDTH, "narrow.html")
    frames = "".join(
        f'<iframe src="{copy.as_uri()}" style="width:{w}px;height:900px;border:0"></iframe>' for w in wanted
    )
    script = """const found = []; window.addEventListener("message", e => {
      found.push(e.data); document.getElementById("found").textContent = JSON.stringify(found); });"""
    host = page.with_name("host.html")
    host.write_text(
        f"<!DOCTYPE html><html><head><script>{script}</script></head><body><pre id=found></pre>{frames}</body></html>"
    )
    text, _ = dump(host)
    found = re.search(r'<pre id="found">(.*?)</pre>', text, re.DOTALL)
    assert found and found[1], text[:300]
    return {row["width"]: row for row in json.loads(html.unescape(found[1]))}
