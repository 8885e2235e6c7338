"""The `foveate` command. Its parts are imported when it runs: typer and rich are an extra."""

from __future__ import annotations

import sys
from collections.abc import Sequence

INSTALL_HINT = 'error: the foveate command needs typer and rich: pip install "foveate[cli]"'


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code: 0 fine, 2 bad input, 130 interrupted.

    Args:
        arguments: what follows the command's name; None takes them from the command line.
    """
    try:
        from foveate.cli.app import run
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] not in ("typer", "rich", "click"):
            raise
        print(INSTALL_HINT, file=sys.stderr)
        return 2
    return run(list(sys.argv[1:] if arguments is None else arguments))
