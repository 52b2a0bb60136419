"""A registry in which every suite was run, by script; and a real browser that measures pages."""

from __future__ import annotations

import json
import shutil
import subprocess
from html import unescape
from pathlib import Path
from typing import Any

import pytest

import overpaint
from overpaint.bases.base import Base
from overpaint.evaluation.suites import configured
from overpaint.registry.records import ResultRecord
from overpaint.workspace.workspace import Workspace

from .scripted import CONCEPTS, context, faithful

SUITES = ("quick", "grid", "generality", "scenes", "scenes_by_name", "crosstalk")
SCALE = (
    ("separable, plain sum", (1.0, 0.98, 0.95)),
    ("uce, plain sum", (0.99, 0.7, 0.2)),
    ("uce, TIES", (0.99, 0.8, 0.5)),
)


def evaluated(folder: Path, base_folder: Path) -> Workspace:
    """The tiny base with a patch for each scripted concept on the recipe safe, and the numbers of every suite."""
    workspace = overpaint.open(folder)
    workspace.add_base("tiny", base_folder)
    found = context(Base.open(base_folder), faithful)
    recipe = workspace.create_recipe("safe", base="tiny", exist_ok=True)
    for concept, held in zip(CONCEPTS, found.patches, strict=True):
        workspace.registry.add_concept(concept)
        record = workspace.registry.add_patch(
            id=held.patch.id, blob=held.patch.blob, concept=concept.name, base="tiny", solver="separable",
            kind=held.patch.delta.kind, settings={"rank": 1}, seed=0, seconds=0.5,
        )  # fmt: skip
        recipe.add(record)
    for suite in SUITES:
        _keep(workspace, suite, [_record(row) for row in configured(suite, {}).run(found)])
    _keep(workspace, "scale", _scale())
    _keep(workspace, "probes", _probes())
    return workspace


def _record(row: Any) -> ResultRecord:
    return ResultRecord(row.subject, row.metric, row.value, row.low, row.high, row.n)


def _scale() -> list[ResultRecord]:
    rows = []
    for way, values in SCALE:
        for n, value in zip((1, 2, 4), values, strict=True):
            rows.append(ResultRecord(f"{way}, N={n}", "H_c", value, max(0, value - 0.1), min(1, value + 0.05), 64))
            rows.append(ResultRecord(f"{way}, N={n}", "order spread", 0.0, None, None, 3))
    return rows


def _probes() -> list[ResultRecord]:
    attacks = ("accuracy on the base", "accuracy", "accuracy with added noise", "accuracy of a learned word")
    subjects = ("cat", "average of the concepts")
    return [ResultRecord(s, metric, 0.5, 0.25, 0.75, 6) for s in subjects for metric in attacks]


def _keep(workspace: Workspace, suite: str, results: list[ResultRecord]) -> None:
    workspace.registry.add_evaluation(
        recipe="safe", digest=workspace.recipe("safe").digest(), suite=suite, judge="reader", seed=0,
        settings={"suite": {"pictures": 6}, "sampler": {"steps": 1, "guidance": 3.0, "device": "cpu"}, "judge": ""},
        versions={"overpaint": "0"}, seconds=1.0, who="tester", results=results,
    )  # fmt: skip


PROBE = """
<script>
const box = e => { const r = e.getBoundingClientRect(); return [r.left, r.top, r.right, r.bottom]; };
const pen = document.createElement('canvas').getContext('2d', {willReadFrequently: true});
const known = new Map();
const rgb = text => {
  if (!known.has(text)) {
    pen.clearRect(0, 0, 1, 1);
    pen.fillStyle = text;
    pen.fillRect(0, 0, 1, 1);
    known.set(text, [...pen.getImageData(0, 0, 1, 1).data]);
  }
  return known.get(text);
};
const light = ([r, g, b]) => [r, g, b].map(v => v / 255)
  .map(v => v <= .04045 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4)
  .reduce((sum, v, i) => sum + v * [.2126, .7152, .0722][i], 0);
const behind = e => {
  for (; e; e = e.parentElement) {
    const colour = rgb(getComputedStyle(e).backgroundColor);
    if (colour[3]) return colour;
  }
};
const contrast = e => {
  const [a, b] = [light(rgb(getComputedStyle(e).color)), light(behind(e))].sort((x, y) => y - x);
  return (a + .05) / (b + .05);
};
const texts = [...document.querySelectorAll('h1, h2, p, th, td, dt, dd, code, li, caption, figcaption')]
  .filter(e => e.textContent);
const root = document.documentElement;
const found = {
  dark: matchMedia('(prefers-color-scheme: dark)').matches,
  width: root.clientWidth, wide: root.scrollWidth,
  images: [...document.images].map(i => [i.complete && i.naturalWidth > 0, i.getBoundingClientRect().width, i.alt]),
  charts: [...document.querySelectorAll('figure.chart > svg')].map(box),
  outside: [...document.querySelectorAll('svg text')].filter(t => {
    const [a, b] = [box(t), box(t.closest('svg'))];
    return a[0] < b[0] - 1 || a[1] < b[1] - 1 || a[2] > b[2] + 1 || a[3] > b[3] + 1;
  }).map(t => t.textContent),
  faint: texts.filter(e => contrast(e) < 4.5).map(e => [e.tagName, e.textContent.slice(0, 40), contrast(e)]),
  sections: [...document.querySelectorAll('section')].map(box),
  heats: document.querySelectorAll('table.heat').length,
};
document.body.innerHTML = '<pre id="probe"></pre>';
document.getElementById('probe').textContent = JSON.stringify(found);
</script>
"""


def browser() -> str:
    """The path of a Chromium; the test is skipped where there is none."""
    found = next(
        (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None
    )
    if found is None:
        pytest.skip("Chromium is not installed (on Debian: apt-get install chromium)")
    return found


def chromium(folder: Path, *options: str) -> str:
    """Run a headless Chromium with a profile in `folder`; its standard output."""
    usual = ("--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--hide-scrollbars")
    profile = f"--user-data-dir={folder / 'profile'}"
    done = subprocess.run([browser(), *usual, profile, *options], capture_output=True, text=True, check=True)
    return done.stdout


def measured(page: Path, folder: Path, *, width: int, dark: bool) -> dict[str, Any]:
    """What a browser makes of a page: sizes, overflow, contrast. The page itself has no script; the probe is added here."""
    probed = folder / "probed.html"
    probed.write_text(page.read_text("utf-8").replace("</body>", f"{PROBE}</body>"), "utf-8")
    scheme = f"--blink-settings=preferredColorScheme={0 if dark else 1}"
    dom = chromium(folder, f"--window-size={width},900", scheme, "--dump-dom", probed.as_uri())
    found: dict[str, Any] = json.loads(unescape(dom.partition('<pre id="probe">')[2].partition("</pre>")[0]))
    return found
