"""Every architecture of transformers that can be built small, and every module of torch.nn: fused, is it right?

    python benchmarks/census.py [--kind transformers|torch.nn] [--jobs 2] [--seconds 240] [--json FILE] [--why] [name ...]

Each is built from its configuration with random weights (benchmarks/census/shrink.py), fused with ``objective="launches"`` in a process of
its own, and compared with a model that fxfuse never saw: outputs, input gradients, all parameter gradients, buffers, train and eval
mode, fresh data, other batch sizes and lengths, in float64. all: launches of one forward in eval mode; heavy: those of matmuls,
convolutions, embeddings, norms. A wrong model, an exception or a sentence "fxfuse failed" is a bug, and makes this end with 1.

transformers 5.23.0, torch 2.13.0. 2026-11-20, afmoe to luke: 304 examined, 270 built, 229 ran, 201 fused (heavy 7,015 -> 5,843), 2,578
calls compared; cvt and led are doubtful, four were late. 2026-11-28, lw_detr to sew-d: 232 examined, 170 ran, all right, 153 fused
(heavy 6,890 -> 5,874); shieldgemma2 to zoedepth: 111 examined, 82 ran, 74 fused (heavy 8,995 -> 7,448), vjepa2 late, wav2vec2-conformer
raised. What was wrong is mended. 2026-11-29, 36 over the alphabet: 33 ran, 30 fused (heavy 1,906 -> 1,661), 31 right; cvt and led
doubtful as before. torch.nn: 171 classes and forms, alone and three as lanes: 341 of 342 right, 1 random, 142 fused (708 -> 315).
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = os.environ["TRANSFORMERS_OFFLINE"] = "1"  # nothing is downloaded
os.environ["OMP_NUM_THREADS"] = "1"
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from census import architectures, layers
from census.judge import counted, judge
from census.subject import Subject
from census.workers import run

TOP = 40


def verdict(facts: dict[str, Any]) -> str:
    """One word."""
    if facts.get("failed") or (facts.get("error") and facts.get("at", facts.get("stage")) not in ("prepare", "reference")):
        return "LATE" if facts.get("late") else "RAISED"
    if facts.get("wrong"):
        return "WRONG"
    if facts.get("stage") == "done":
        return "doubtful" if facts.get("doubtful") else "random" if facts.get("unsteady") else "right"
    return "never ran" if facts.get("built") else "not built"


def line(facts: dict[str, Any]) -> str:
    """The row as text."""
    said = verdict(facts)
    head = f"{facts['name'][:38]:38} {said:9}"
    if "launches" not in facts:
        return f"{head} {facts.get('error', '')[:120]}"
    heavy, every = ("{:,} -> {:,}".format(*facts[key]) for key in ("heavy", "launches"))
    numbers = f"{facts['regions']:>4}{len(facts['refused']):>5}{facts['seconds']:>8.1f} s{facts.get('compared', 0):>4}"
    return f"{head}{heavy:>14}{every:>18}{numbers}"


def summary(found: list[dict[str, Any]], seconds: float) -> str:
    """Figures of the whole run, the slowest, and refusals by how many subjects have them."""
    lines = []
    for kind in dict.fromkeys(facts["kind"] for facts in found):
        mine = [facts for facts in found if facts["kind"] == kind]
        words = Counter(verdict(facts) for facts in mine)
        ran = [facts for facts in mine if facts.get("ran")]
        judged = [facts for facts in ran if "launches" in facts]
        fused = [facts for facts in judged if facts["regions"]]
        took = sum(facts.get("seconds", 0.0) for facts in judged)
        lines.append(
            f"{kind}: {len(mine)} known, {sum(bool(f.get('built')) for f in mine)} built, {len(ran)} ran, {len(fused)} fused; "
            + ", ".join(f"{number} {word}" for word, number in words.most_common())
        )
        heavy = [sum(facts["heavy"][i] for facts in fused) for i in (0, 1)]
        every = [sum(facts["launches"][i] for facts in fused) for i in (0, 1)]
        lines.append(f"  of those fused: heavy {heavy[0]:,} -> {heavy[1]:,}, all {every[0]:,} -> {every[1]:,}")
        lines.append(f"  optimize took {took:,.0f} s in all")
        slowest = sorted(judged, key=lambda facts: -facts["seconds"])[:5]
        lines.append("  slowest: " + ", ".join(f"{facts['name']} {facts['seconds']:.1f} s" for facts in slowest))
    lines.append(f"{seconds:,.0f} s")
    lines += [f"{number:>5}x {said}" for said, number in counted(found).most_common(TOP)]
    return "\n".join(lines)


def chosen(options: argparse.Namespace) -> list[Subject]:
    """The subjects asked for."""
    found = [*layers.subjects(), *architectures.subjects()]
    return [s for s in found if (not options.names or s.name in options.names) and options.kind in ("", s.kind)]


def main() -> int:
    """Print the table; 1 if anything is wrong or raised."""
    options = argparse.ArgumentParser(description="is every architecture of transformers, fused, what it was?")
    options.add_argument("names", nargs="*", help="subjects, all if none is named")
    options.add_argument("--kind", default="", choices=["", "transformers", "torch.nn"])
    options.add_argument("--jobs", type=int, default=2, help="processes at a time")
    options.add_argument("--seconds", type=float, default=240.0, help="the most for one subject")
    options.add_argument("--why", action="store_true", help="print refusals of each")
    options.add_argument("--json", type=Path, help="write the data here")
    given = options.parse_args()
    torch.set_num_threads(1)
    found: list[dict[str, Any]] = []
    start = time.perf_counter()
    for facts in run(chosen(given), judge, given.jobs, given.seconds):
        found.append(facts)
        print(line(facts), flush=True)
        for each in [*facts.get("wrong", ()), *facts.get("failed", ())]:
            print(f"    WRONG {each}")
        if given.why:
            for said, number in Counter(facts.get("refused", ())).most_common():
                print(f"    {number}x {said}")
        if given.json:
            given.json.write_text(json.dumps(found, indent=1, default=str))
    print(summary(found, time.perf_counter() - start))
    return 1 if any(verdict(facts) in ("WRONG", "RAISED", "LATE") for facts in found) else 0


if __name__ == "__main__":
    raise SystemExit(main())
