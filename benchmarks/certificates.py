"""What a certificate costs: `python -m benchmarks.certificates [--scale 1] [--rounds 3] [--json FILE]`.

On the embedded base, `certify` beyond the suite it states. On a base of Stable Diffusion 1.5's shapes in float32 (4.3 GB, random
weights, one text map), verifying a built checkpoint by composing its weights again, beside reading and hashing its files once, in
turns. No picture is drawn of the large base: what a suite would have measured is written down by hand. Every round opens
everything anew, as a program would; the time of importing is not counted.
"""

from __future__ import annotations

import statistics
import tempfile
from pathlib import Path

import torch

from benchmarks import tables
from benchmarks.build import timed
from benchmarks.full_size import write_base
from overpaint.certificates.statement import file_digests
from overpaint.core.executors import available_cores
from overpaint.registry.records import ResultRecord
from overpaint.registry.sharing.signing import new_key
from overpaint.workspace.certifying import certify, verify
from overpaint.workspace.workspace import Workspace

BAR_SECONDS, BAR_RATIO = 2.0, 2.0
RESULTS = (ResultRecord("cat", "accuracy", 0.0, 0.0, 0.04, 100), ResultRecord("others", "share", 1.0, 0.96, 1.0, 100))


def main() -> None:
    parser = tables.arguments(__doc__ or "")
    parser.add_argument("--scale", type=float, default=1.0, help="less than 1 narrows the large base's U-Net")
    parser.add_argument("--rounds", type=int, default=3, help="how often each is done")
    parser.add_argument("--folder", type=Path, help="where to write; default: the system's temporary folder")
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=chosen.folder, prefix="overpaint-benchmark-") as name:
        folder = Path(name)
        write_base(folder / "base", "1.5", chosen.scale, 64, torch.float32)
        rows = [
            [*measure(folder / "embedded", Path("emoji"), chosen.rounds), f"certify <= {BAR_SECONDS:g} s"],
            [*measure(folder / "large", folder / "base", chosen.rounds), f"verify / hash <= {BAR_RATIO:g}"],
        ]
    columns = ["base", "checkpoint, GB", "certify, s", "hash files, s", "verify, s", "verify / hash", "bar"]
    title = f"Certificates, medians of rounds, {available_cores()} cores (files are hashed on one)"
    tables.save(chosen.json, tables.show(title, columns, rows))


def measure(folder: Path, base: Path, rounds: int) -> list[object]:
    """Seconds to certify a checkpoint of one patch, and to verify it beside hashing it."""
    workspace = Workspace.open(folder / "registry")
    workspace.add_base("base", base)
    workspace.add_concept("cat")
    recipe = workspace.create_recipe("safe", base="base")
    recipe.add(workspace.solve("cat", vocabulary=64))
    checkpoint = recipe.build(folder / "built").folder
    workspace.registry.add_evaluation(
        recipe="safe",
        digest=recipe.digest(),
        suite="quick",
        judge="by hand",
        seed=0,
        settings={"suite": {}, "sampler": {"steps": 20, "guidance": 7.5, "device": "cpu"}},
        versions={},
        seconds=0.0,
        who="benchmark",
        results=RESULTS,
    )
    new_key(folder / "key")
    # The first round warms the caches.
    found = [one_round(folder, checkpoint, number) for number in range(rounds + 1)][1:]
    certifying, hashing, verifying = (list(column) for column in zip(*found, strict=True))
    ratios = [verified / hashed for _, hashed, verified in found]
    size = sum(path.stat().st_size for path in checkpoint.rglob("*") if path.is_file()) / 1e9
    return [base.name, size, *map(statistics.median, (certifying, hashing, verifying, ratios))]


def one_round(folder: Path, checkpoint: Path, number: int) -> tuple[float, float, float]:
    """Seconds to certify, to hash every file once, and to verify, each with a registry opened anew."""
    file, certifier, verifier = folder / f"{number}.cert", *(Workspace.open(folder / "registry") for _ in range(2))
    return (
        timed(lambda: certify(certifier, str(checkpoint), file, key=folder / "key", who="benchmark")),
        timed(lambda: file_digests(checkpoint)),
        timed(lambda: verify(verifier, file, checkpoint=checkpoint)),
    )


if __name__ == "__main__":
    main()
