"""The command ``llamamoe``: finds the commands beside this file, and turns errors into messages and exit codes.

Every module here whose name has no leading underscore holds one command, called ``command``; adding a command is
adding a file.
"""

from __future__ import annotations

import atexit
import gc
import importlib
import os
import pkgutil
import sys
import traceback
from typing import Any, NoReturn

import click

from llamamoe import __version__
from llamamoe.errors import LlamaMoeError, near_misses

from . import begin
from ._failures import told
from ._output import VERBOSE, Interrupted
from ._style import Command, Context, write_sections
from ._text import echo, styled

EXAMPLES = """\
llamamoe demo                                         # convert and measure a small model
llamamoe inspect SOURCE                               # architecture, size, and whether it can be split
llamamoe split SOURCE OUT --experts 8 --top-k 2       # convert and verify
llamamoe mix BASE OUT --expert A --expert B           # fine-tuned models as experts
llamamoe evaluate OUT --text FILE --against SOURCE    # perplexity of both
"""
COMPLETION = 'eval "$(_LLAMAMOE_COMPLETE=bash_source llamamoe)"'


class Root(click.Group):
    """The group of all commands; their modules are imported when they are needed."""

    context_class = Context

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Names of the modules beside this one, as commands are typed."""
        modules = pkgutil.iter_modules([os.path.dirname(__file__)])
        return sorted(
            m.name.replace("_", "-") for m in modules if not m.name.startswith("_") and f".{m.name}" not in __name__
        )

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import the command's module."""
        if cmd_name not in self.list_commands(ctx):
            return None
        module = importlib.import_module(f".{cmd_name.replace('-', '_')}", __package__)
        found: click.Command = module.command
        return found

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Click's, with near misses for an unknown name."""
        name = args[0]
        if not name.startswith("-") and self.get_command(ctx, name) is None:
            raise click.UsageError(f"there is no command {name!r}. {near_misses(name, self.list_commands(ctx))}", ctx)
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Commands by section."""
        rows = []
        for name in self.list_commands(ctx):
            found = self.get_command(ctx, name)
            assert isinstance(found, Command)
            rows.append((found.order, found.section, (name, found.get_short_help_str(90))))
        rows.sort()
        write_sections(formatter, [(section, row) for _, section, row in rows])

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Examples, and how to get completion."""
        with formatter.section("Examples"):
            for line in EXAMPLES.splitlines():
                formatter.write(" " * formatter.current_indent + line + "\n")
        with formatter.section("Tab completion (bash; zsh and fish likewise)"):
            formatter.write(" " * formatter.current_indent + COMPLETION + "\n")

    def make_context(
        self, info_name: str | None, args: list[str], parent: click.Context | None = None, **extra: Any
    ) -> click.Context:
        """Click's, with NO_COLOR honoured."""
        if os.environ.get("NO_COLOR"):
            extra.setdefault("color", False)
        return super().make_context(info_name, args, parent, **extra)

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command; every error becomes a message on stderr and an exit code."""
        try:
            begin()
            result = super().invoke(ctx)
            sys.stdout.flush()
            return result
        except (click.ClickException, click.exceptions.Exit, click.Abort):
            raise
        except KeyboardInterrupt:
            _fail(ctx, Interrupted())
        except LlamaMoeError as error:
            _fail(ctx, error)
        except BrokenPipeError:
            # Whoever read stdout has gone: what is still buffered goes nowhere, so that closing it does not fail again.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            ctx.exit(1)
        except Exception as error:
            _fail(ctx, _unexpected(ctx, error))


def _unexpected(ctx: click.Context, error: Exception) -> LlamaMoeError:
    """Return an unforeseen error as one line; print the traceback with ``-v``."""
    verbose = bool(ctx.meta.get(VERBOSE))
    if verbose:
        echo("".join(traceback.format_exception(error)), err=True, nl=False)
    return told(error, verbose=verbose)


def _fail(ctx: click.Context, error: LlamaMoeError) -> NoReturn:
    if isinstance(error, Interrupted):
        echo(str(error), err=True)
    else:
        _tell(error)
    ctx.exit(error.exit_code)


def _tell(error: LlamaMoeError) -> None:
    echo(styled("Error:", fg="red", bold=True), f" {error.message}", err=True)
    if error.hint:
        echo(f"  {error.hint}", err=True)


@click.group(
    cls=Root,
    help="Turn a trained dense LLaMA-style language model into a sparse mixture of experts that plain transformers "
    "loads.",
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
    no_args_is_help=False,
    invoke_without_command=True,
)
@click.version_option(__version__, "-V", "--version", prog_name="llamamoe", message="%(prog)s %(version)s")
@click.pass_context
def root(ctx: click.Context) -> None:
    """Show the help if no command is given."""
    if ctx.invoked_subcommand is None:
        click.echo(ctx.get_help())


def main() -> NoReturn:
    """Run the command line of this process."""
    atexit.register(gc.freeze)  # the interpreter's last collections would go through all that torch imported: 0.7 s
    try:
        root.main(prog_name="llamamoe")
    except OSError as error:  # click prints --help and --version before there is a command
        _tell(told(error, verbose=False))
        sys.exit(LlamaMoeError.exit_code)
    raise AssertionError("click exits")
