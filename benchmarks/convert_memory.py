"""Peak memory of converting a checkpoint of 300 MB, per kind of output; each in a process of its own.

    python benchmarks/convert_memory.py [--megabytes 300] [--kinds pt2 onnx safetensors folder]

The process reads the checkpoint into the model, fuses it, writes it, and loads what it wrote, as ``fxfuse convert`` does. What torch and
the packages need by themselves (the same steps with a small model) is taken off.
"""

from __future__ import annotations

import argparse
import gc
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

KINDS = {"pt2": "net.pt2", "onnx": "net.onnx", "safetensors": "net.safetensors", "folder": "net"}


def child(kind: str, hidden: int, folder: Path) -> None:
    """One conversion; prints the peak in KiB."""
    import torch
    from torch import nn

    import fxfuse
    from fxfuse import convert

    class Nets(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.nets = nn.ModuleList(nn.Sequential(nn.Linear(hidden, hidden), nn.ReLU(), nn.Linear(hidden, hidden)) for _ in range(16))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.stack([net(x[:, i]) for i, net in enumerate(self.nets)], 1)

    weights = folder / f"{hidden}.safetensors"
    x = torch.randn(4, 16, hidden)
    if kind == "make":
        from safetensors.torch import save_file

        save_file(Nets().state_dict(), weights)
        return
    with torch.device("meta"):
        model = Nets().eval()
    model.load_state_dict(convert.read_weights(weights), assign=True)
    with torch.no_grad():
        expected = model(x)
    fused = fxfuse.optimize(model, x, objective="launches", tune=False, mode="infer", inplace=True)
    del model
    out = folder / KINDS[kind]
    convert.write(fused, None, ((x,), {}), out)
    del fused
    gc.collect()  # modules and what watches them refer to each other
    if kind == "safetensors":
        convert.restore(out, folder / "back.safetensors")
    else:
        with torch.no_grad():
            torch.testing.assert_close(convert.load(out)(x), expected)
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)


def main() -> None:
    """The table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kinds", nargs="+", choices=[*KINDS], default=[*KINDS])
    parser.add_argument("--megabytes", type=int, default=300)
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.child:
        child(given.child[0], int(given.child[1]), Path(given.child[2]))
        return
    large = int((given.megabytes * 1e6 / 4 / 32) ** 0.5)
    size = 32 * (large * large + large) * 4
    print(f"checkpoint: {size / 1e6:.0f} MB")
    for kind in given.kinds:
        peaks = []
        for hidden in (8, large):
            with tempfile.TemporaryDirectory() as folder:
                for step in ("make", kind):
                    command = [sys.executable, __file__, "--child", step, str(hidden), folder]
                    done = subprocess.run(command, capture_output=True, text=True, check=False)
                    if done.returncode:
                        sys.exit(done.stderr)
                peaks.append(int(done.stdout.split()[-1]) * 1024)
        ratio = (peaks[1] - peaks[0]) / size
        print(f"{kind:12} peak {peaks[1] / 1e6:6.0f} MB, {peaks[0] / 1e6:4.0f} MB without weights: {ratio:.2f} x the checkpoint")


if __name__ == "__main__":
    main()
