"""The command line as a whole: its subcommands, its help."""

from __future__ import annotations

import click

import fxfuse

from . import codes
from .bench import bench
from .convert import convert
from .demo import demo
from .explain import explain
from .restore import restore
from .verify import verify


@click.group(
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
    epilog=f"""\b
Examples:
  fxfuse explain model:Net --args '[128]' --inputs "float32[64,128]"
  fxfuse convert model:Net --args '[128]' --weights net.safetensors --inputs "float32[64,128]" -o net.pt2
  fxfuse verify model:Net net.pt2 --args '[128]' --weights net.safetensors --inputs "float32[64,128]"

\b
Exit codes:
{codes.TABLE}

\b
Shell completion (bash; zsh and fish likewise), once:
  _FXFUSE_COMPLETE=bash_source fxfuse > ~/.fxfuse-completion && echo '. ~/.fxfuse-completion' >> ~/.bashrc""",
)
@click.version_option(fxfuse.__version__, prog_name="fxfuse")
def app() -> None:
    """Loops over small networks in a PyTorch model, run once instead of once per lane, and proved equal.

    SOURCE is package.module:factory (a callable that returns a torch.nn.Module, or a module; the current folder is searched), a .pt2
    file of torch.export, or a folder written by fxfuse convert.
    """


for _command in (convert, restore, explain, verify, bench, demo):
    app.add_command(_command)
