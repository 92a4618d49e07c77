"""The command line: thin, and a user's mistake is one line.

Results go to stdout, progress and messages to stderr. Exit codes: 0, 1 for what went wrong, 2 for a command line that makes no
sense, 130 and 143 for a training stopped by Ctrl-C and SIGTERM.
"""

from __future__ import annotations

import sys
import traceback
from collections.abc import Sequence

import click

from tinydiff import __version__
from tinydiff.cli.options import find, spoken_warnings

# What a user's files and options can lead to; anything else is a bug of ours, and shown whole.
MISTAKES = (ValueError, TypeError, OSError, RuntimeError, ArithmeticError, MemoryError, ImportError, LookupError, AttributeError)


class Group(click.Group):
    """A group of commands that suggests the nearest one for an unknown name."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """In the order they were added, which is the order of a first visit."""
        return list(self.commands)

    def resolve_command(self, ctx: click.Context, args: list[str]) -> tuple[str | None, click.Command | None, list[str]]:
        """As click's, but the error names the nearest commands."""
        if args and not args[0].startswith("-"):
            find(self.commands, args[0], "command")
        return super().resolve_command(ctx, args)


@click.group(cls=Group, invoke_without_command=True, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, message="tinydiff %(version)s")
@click.option("--traceback", "show_traceback", is_flag=True, help="Show where an error comes from.")
@click.pass_context
def cli(ctx: click.Context, show_traceback: bool) -> None:
    """Train and run diffusion models with nothing but NumPy and Numba. Begin with: tinydiff demo."""
    if ctx.invoked_subcommand is None:
        click.echo(ctx.get_help())


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    try:
        with spoken_warnings():
            code = cli.main(args=arguments, prog_name="tinydiff", standalone_mode=False)
        sys.stdout.flush()
        return code if isinstance(code, int) else 0
    except click.exceptions.Exit as done:
        return done.exit_code
    except click.ClickException as error:
        return _fail(error.format_message(), error.exit_code)
    except (KeyboardInterrupt, click.Abort):
        return _fail("stopped by Ctrl-C", 130)
    except BrokenPipeError:  # the reader of stdout, `head` say, has seen enough
        sys.stderr.close()
        return 1
    except Exception as error:
        if "--traceback" in arguments:
            traceback.print_exc()
        if isinstance(error, MISTAKES):
            return _fail(str(error) or type(error).__name__, 1)
        raise


def _fail(message: str, code: int) -> int:
    print("tinydiff: error:", " ".join(message.split()), file=sys.stderr)
    return code


def _add_commands() -> None:
    from tinydiff.cli import check, compress, pictures, sample, score, train

    commands = (pictures.demo, train.train, sample.sample, pictures.dream, pictures.schedules, score.score, score.search)
    for command in (*commands, compress.compress, compress.decompress, check.evaluate, check.gradcheck, check.doctor, check.data):
        cli.add_command(command)


_add_commands()
