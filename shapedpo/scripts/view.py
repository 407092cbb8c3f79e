"""`shapedpo view`: the page of an audit of any size, with all its rows."""

from __future__ import annotations

import argparse
import sqlite3
import webbrowser
from typing import Any

from ..errors import UserError, as_user_error


HELP = """\
Look at an audit in the browser: what the data teaches in words, maps of its clusters, all findings, and from each to its rows.
The page comes from a server on 127.0.0.1 that only this machine reaches. The first time it copies the rows' texts into
DIR/view.sqlite, with an index of their words (some minutes for 260,000 pairs).

  shapedpo view audits/pairs
  ssh -L 8765:127.0.0.1:8765 gpu-box shapedpo view audits/pairs --port 8765 --no-browser     # an audit elsewhere
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's arguments."""
    parser.add_argument("audit", metavar="DIR", help="the folder that `shapedpo audit --out` wrote to")
    parser.add_argument("--port", type=int, default=0, help="where the server listens (by default a port that is free)")
    parser.add_argument("--no-browser", action="store_true", help="print the address only")


def main(args: argparse.Namespace) -> int:
    """Serve until interrupted.

    Raises:
        UserError: If the folder holds no audit, or the port is taken.
    """
    with as_user_error(FileNotFoundError, ValueError):
        started = server(args.audit, args.port)
    try:
        print(f"{started.address}  (Ctrl-C ends it)", flush=True)
        if not args.no_browser:
            webbrowser.open(started.address)
        started.serve_forever()
    except KeyboardInterrupt:
        print()
    finally:
        started.server_close()
    return 0


def server(folder: str, port: int = 0, *, progress: bool = True) -> Any:
    """The server of an audit, listening and not yet answering."""
    from ..audit.page.render import render
    from ..audit.page.rows import RowStore
    from ..audit.page.server import ViewServer
    from ..audit.page.source import Audit

    audit = Audit.open(folder)
    with as_user_error(sqlite3.OperationalError, prefix=f"The rows cannot be copied into '{folder}': "):
        rows = RowStore.open(audit, progress=progress)
    page = render(audit.overview(), served=True)
    try:
        return ViewServer(page, audit.analysis, rows, port)
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise UserError(
            f"--port {port} cannot be had ({reason}). Leave out --port to take one that is free."
        ) from error
