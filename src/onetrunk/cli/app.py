"""The command line: each command is a file of `commands/`; errors become one line and a status.

Exit status: 0; 1 for a failure, with one line on standard error that says what to do (Ctrl-C too);
2 for wrong usage.
"""

import errno
import io
import sys
from typing import Annotated

import typer

from ..errors import OnetrunkError
from ..files import reason
from .commands.allocate import allocate
from .commands.benchmark import benchmark
from .commands.compress import compress
from .commands.contents import list_domains, show
from .commands.evaluate import evaluate
from .commands.export import export
from .commands.new import new
from .commands.predict import predict
from .commands.pretrain import pretrain
from .commands.quickstart import quickstart
from .commands.train import train
from .commands.upkeep import remove, verify
from .console import shown

app = typer.Typer(
    name="onetrunk",
    help="One vision network, many domains: a frozen backbone, a few per cent for each domain.",
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

app.command()(quickstart)
app.command()(pretrain)
app.command()(new)
app.command()(train)
app.command()(allocate)
app.command()(evaluate)
app.command()(predict)
app.command("list")(list_domains)
app.command()(show)
app.command()(verify)
app.command()(remove)
app.command()(compress)
app.command()(export)
app.add_typer(benchmark)

CTRL_C = 130  # what the parser returns instead of raising KeyboardInterrupt
RESUMES = "stopped; nothing half-written is left. A training goes on with --resume."
STOPPED = {  # what is said of a Ctrl-C, by the command
    "train": RESUMES,
    "allocate": RESUMES,
    "pretrain": RESUMES,
    "compress": "stopped.",  # it says the rest itself
    "benchmark": "stopped. What is finished is kept: the same command goes on from there.",
}
FULL = (
    "what was to be written, or the lines on standard output, found no room. Make some and run the "
    "command again."
)


def _version(asked: bool) -> None:
    if asked:
        from .. import __version__

        typer.echo(f"onetrunk {__version__}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="The version.")
    ] = False,
) -> None:
    """One vision network, many domains: a frozen backbone, a few per cent for each domain."""


def main() -> None:
    """The entry point: errors become one line and an exit status."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # in a terminal's or a file's own encoding
            stream.reconfigure(errors="replace")
    try:
        status = app(standalone_mode=False)
        if status == CTRL_C:
            raise KeyboardInterrupt
        if isinstance(status, int) and status:
            sys.exit(status)
    except OnetrunkError as error:
        _fail(str(error))
    except typer.Abort:
        _fail("nothing was changed.")
    except KeyboardInterrupt:
        verb = sys.argv[1] if sys.argv[1:] else ""
        _fail(STOPPED.get(verb, "stopped; nothing half-written is left."))
    except OSError as error:
        if error.errno is None:  # none of the system's
            raise
        full = error.errno == errno.ENOSPC and not error.filename
        _fail(f"{error.strerror}: {FULL}" if full else reason(error))
    except RuntimeError as error:
        if "torchvision::nms" not in str(error):
            raise
        _fail(
            "torch and torchvision come from different builds. Install both again from one place: "
            "pip install --force-reinstall torch torchvision"
        )
    except Exception as error:
        if hasattr(error, "exit_code") and hasattr(error, "show"):  # a usage error of the parser
            error.show()
            sys.exit(error.exit_code)
        raise


def _fail(message: str) -> None:
    line = "; ".join(part.strip() for part in message.splitlines() if part.strip())
    line = line.replace(":; ", ": ")
    sys.stderr.write(f"error: {shown(line)}\n")
    sys.exit(1)
