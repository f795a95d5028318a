"""`fedward`: the root command. Each room brings its own, through entry points.

An entry point of the group `fedward.commands` names either a Typer application (a group of
commands) or a function (one command); `audit.attack` adds `attack` to the group `audit`. A room
that is not installed brings none.
"""

from __future__ import annotations

import sys
from importlib.metadata import entry_points, version

import typer
from rich.console import Console
from rich.text import Text

from common.errors import FedwardError

GROUP = "fedward.commands"


def build() -> typer.Typer:
    """The application with the commands of every installed room."""
    app = typer.Typer(
        name="fedward",
        help="Train one multimodal risk model across hospitals, with patient-level privacy.",
        no_args_is_help=True,
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"]},
    )

    @app.callback(invoke_without_command=True)
    def root(
        show_version: bool = typer.Option(False, "--version", help="Print the version and exit."),
    ) -> None:
        if show_version:
            print(version("fedward"))
            raise typer.Exit()

    groups: dict[str, typer.Typer] = {"": app}
    for entry in sorted(entry_points(group=GROUP), key=lambda e: e.name):
        group, _, name = entry.name.rpartition(".")
        try:
            command = entry.load()
        except ModuleNotFoundError as error:
            if error.name and error.name.split(".")[0] in ("client", "simulations", "deploy"):
                raise
            continue  # a room whose packages are not installed here: `fedward[site]` brings them
        if isinstance(command, typer.Typer):
            groups[name] = command
            app.add_typer(command, name=name)
        else:
            groups[group].command(name)(command)
    return app


def main() -> None:
    """Runs the command line. A `FedwardError`, or what the operating system refuses (a full disk, a
    folder that may not be written), is shown as one clear message, exit code 1."""
    try:
        build()()
    except FedwardError as error:
        _fail(error.code, str(error))
    except OSError as error:
        place = f"{error.filename}: " if error.filename else ""
        _fail("system", f"{place}{error.strerror or error}")
    except KeyboardInterrupt:
        Console(stderr=True).print("interrupted")
        sys.exit(130)


def _fail(code: str, text: str) -> None:
    message = Text.assemble(("error", "bold red"), f" ({code}): {text}")
    Console(stderr=True, highlight=False, soft_wrap=True).print(message)
    sys.exit(1)
