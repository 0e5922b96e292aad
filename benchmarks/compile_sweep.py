"""Cold compile time of the feature network over the number of lanes, dynamo's own share subtracted: a table and a plot.

    python benchmarks/compile_sweep.py [--lanes 8 32 128 512] [--peers eager fxfuse inductor] [--rounds 1] [--folder .bench]

Each figure: seconds from ``torch.compile`` to the end of the first training step, in a process of its own, with a fresh Inductor cache
(``benchmarks/compile_backend.py``). "eager" is dynamo's own tracing; "own" is fxfuse's less that, "inductor's own" likewise.

Runs in parts: what was measured is kept in ``compile_sweep.json`` in the folder, figure by figure; lanes and peers that are there
already are measured again only with ``--again``. The table and ``compile_sweep.svg`` (where matplotlib is installed) show all that is
kept. Inductor takes half a second per lane and more: leave it out beyond 128 lanes, or give it an hour. Quote the ratios.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmarks.compile_backend import BACKENDS, cold_times

LANES = (8, 16, 32, 64, 128, 256, 512)
Kept = dict[str, dict[str, float]]  # seconds by lanes and peer


def columns(times: dict[str, float]) -> dict[str, float | None]:
    """What the table shows of one number of lanes.

    >>> columns({"eager": 1.0, "fxfuse": 3.0})
    {'eager': 1.0, 'fxfuse': 3.0, 'inductor': None, 'own': 2.0, "inductor's own": None, 'times': None}
    """
    eager, fxfuse, inductor = (times.get(name) for name in ("eager", "fxfuse", "inductor"))
    return {
        "eager": eager,
        "fxfuse": fxfuse,
        "inductor": inductor,
        "own": None if eager is None or fxfuse is None else fxfuse - eager,
        "inductor's own": None if eager is None or inductor is None else inductor - eager,
        "times": None if fxfuse is None or inductor is None else inductor / fxfuse,
    }


def table(kept: Kept) -> str:
    """All that is kept, as text."""
    lines = [f"{'lanes':>6}" + "".join(f"{name:>16}" for name in columns({}))]
    for lanes in sorted(kept, key=int):
        shown = columns(kept[lanes])
        cells = ("-" if value is None else f"{value:.1f}x" if name == "times" else f"{value:.2f} s" for name, value in shown.items())
        lines.append(f"{lanes:>6}" + "".join(f"{cell:>16}" for cell in cells))
    return "\n".join(lines)


def draw(kept: Kept, path: Path) -> None:
    """All that is kept, as a picture."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4.5))
    labels = {"eager": "dynamo alone", "own": "fxfuse over Inductor, without dynamo", "inductor's own": "Inductor, without dynamo"}
    for name, label in labels.items():
        points = [(int(lanes), shown) for lanes in sorted(kept, key=int) if (shown := columns(kept[lanes])[name]) is not None]
        if points:
            axes.plot(*zip(*points, strict=True), marker="o", label=label)
    axes.set(xscale="log", yscale="log", xlabel="lanes", ylabel="cold compile to the first training step, seconds")
    axes.set_xscale("log", base=2)
    axes.legend()
    figure.tight_layout()
    figure.savefig(path)
    pyplot.close(figure)


def main() -> None:
    """Measure what is asked for and not there; print, draw."""
    parser = argparse.ArgumentParser(description="cold compile time over the number of lanes")
    parser.add_argument("--lanes", type=int, nargs="+", default=LANES)
    parser.add_argument("--peers", nargs="+", choices=BACKENDS, default=("eager", "fxfuse"))
    for name, default in (("hidden", 32), ("batch", 64), ("rounds", 1)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--folder", type=Path, default=Path(".bench"))
    parser.add_argument("--again", action="store_true", help="measure also what is kept")
    args = parser.parse_args()
    args.folder.mkdir(exist_ok=True)
    store = args.folder / "compile_sweep.json"
    about = f"torch {torch.__version__}, hidden {args.hidden}, batch {args.batch}"
    known = json.loads(store.read_text()) if store.exists() else {}
    kept: Kept = known.setdefault(about, {})
    for lanes in args.lanes:
        times = kept.setdefault(str(lanes), {})
        peers = [peer for peer in args.peers if args.again or peer not in times]
        for peer, seconds in cold_times(peers, lanes, args.hidden, args.batch, args.rounds).items():
            times[peer] = seconds
        store.write_text(json.dumps(known, indent=1))
        print(f"{lanes} lanes done", file=sys.stderr, flush=True)
    print(about)
    print(table(kept))
    try:
        draw(kept, args.folder / "compile_sweep.svg")
    except ImportError:
        print("no plot: pip install matplotlib", file=sys.stderr)


if __name__ == "__main__":
    main()
