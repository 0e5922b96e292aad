"""Peak memory of ``fxfuse convert`` for a checkpoint of 300 MB, per kind of output; each command in a process of its own.

    python benchmarks/convert_memory.py [--megabytes 300] [--kinds safetensors pt2 onnx folder aoti]

What is measured is the whole command: it reads the checkpoint into the model, fuses it, writes OUT, loads OUT again and compares. Then
``fxfuse restore``, where OUT can be restored. What python, torch and the packages need by themselves (the same command for a small
model) is taken off; both figures are shown. aoti needs a C++ compiler, whose own processes are not counted.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

KINDS = {"safetensors": "net.safetensors", "pt2": "net.pt2", "onnx": "net.onnx", "folder": "net", "aoti": "net.aoti.pt2"}
LANES = 16
MODEL = f'''
import torch
from torch import nn

class Nets(nn.Module):
    def __init__(self, hidden):
        super().__init__()
        self.nets = nn.ModuleList(nn.Sequential(nn.Linear(hidden, hidden), nn.ReLU(), nn.Linear(hidden, hidden)) for _ in range({LANES}))

    def forward(self, x):
        return torch.stack([net(x[:, i]) for i, net in enumerate(self.nets)], 1)

def nets(hidden):
    with torch.device("meta"):  # the checkpoint's tensors take their place
        return Nets(hidden)

def make(hidden, path):
    from safetensors.torch import save_file
    save_file(Nets(hidden).state_dict(), path)
'''
MEASURED = """
import resource, sys
from fxfuse.cli import main
code = main(sys.argv[1:])
print("peak", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
sys.exit(code)
"""


def command(words: list[str], folder: Path) -> int:
    """Run a command; its peak in bytes."""
    root = Path(__file__).resolve().parents[1]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(root), os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run([sys.executable, "-c", MEASURED, *words], cwd=folder, env=env, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"fxfuse {' '.join(words)}: exit code {done.returncode}\n{done.stderr}")
    return int(done.stdout.rpartition("peak ")[2])


def peaks(kind: str, hidden: int) -> dict[str, int]:
    """The peaks of converting and, where it can be restored, of restoring."""
    with tempfile.TemporaryDirectory() as place:
        folder, out = Path(place), KINDS[kind]
        (folder / "model.py").write_text(MODEL)
        subprocess.run([sys.executable, "-c", f"import model; model.make({hidden}, 'w.safetensors')"], cwd=folder, check=True)
        words = ["model:nets", "--args", f"[{hidden}]", "--weights", "w.safetensors", "--inputs", f"float32[4,{LANES},{hidden}]"]
        found = {f"convert to {kind}": command(["convert", *words, "--objective", "launches", "-o", out], folder)}
        if kind in ("safetensors", "folder"):
            found[f"restore of {kind}"] = command(["restore", out, "-o", "back.safetensors"], folder)
        return found


def main() -> None:
    """The table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kinds", nargs="+", choices=[*KINDS], default=[*KINDS])
    parser.add_argument("--megabytes", type=int, default=300)
    given = parser.parse_args()
    hidden = int((given.megabytes * 1e6 / 4 / (2 * LANES)) ** 0.5)
    size = 2 * LANES * (hidden * hidden + hidden) * 4
    print(f"checkpoint: {size / 1e6:.0f} MB")
    for kind in given.kinds:
        small, large = peaks(kind, 8), peaks(kind, hidden)
        for what, peak in large.items():
            own, whole = (peak - small[what]) / size, peak / size
            figures = f"peak {peak / 1e6:6.0f} MB, {small[what] / 1e6:4.0f} MB without weights"
            print(f"{what:24} {figures}: {own:.2f} x (in all {whole:.2f} x)", flush=True)


if __name__ == "__main__":
    main()
