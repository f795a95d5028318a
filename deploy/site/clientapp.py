"""`flwr-clientapp`, without what only a SuperNode needs.

Flower starts this process for every message, and the package in which its command lies imports the
whole SuperNode first, its database included: 1.1 of 2.5 seconds of processor time.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from types import ModuleType

NAME = "flwr-clientapp"


def provide(folder: Path) -> Path:
    """Writes the command into a folder for the front of PATH; where files of that folder may not
    be executed, the search goes on to Flower's own."""
    folder.mkdir(exist_ok=True)
    command = folder / NAME
    command.write_text(f"#!{sys.executable}\nfrom {__name__} import main\n\nmain()\n")
    command.chmod(0o700)
    return folder


def main() -> None:
    """Runs Flower's own command."""
    import flwr.supernode

    package = ModuleType("flwr.supernode.cli")  # in the place of the one that imports too much
    package.__path__ = [os.path.join(path, "cli") for path in flwr.supernode.__path__]
    sys.modules[package.__name__] = package
    from flwr.supernode.cli.flwr_clientapp import flwr_clientapp

    flwr_clientapp()
