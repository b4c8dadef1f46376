"""The process of a temporary server: `python -m attlas.flows.server_process LISTENER FOLDER`, with the descriptor of a socket."""

import os
import shutil
import socket
import sys
import threading
from pathlib import Path

DATABASE = "prefect.db"


def main(listener: socket.socket, folder: Path) -> None:
    """Serve from a new folder until the run that started this process exits or stops it; then remove the folder."""
    folder.mkdir(mode=0o700)
    threading.Thread(target=_exit_with_parent, args=[folder], daemon=True).start()
    try:
        import prefect.settings  # noqa: F401 - reads the user's settings, also from the current folder

        from attlas.flows.database import provide_database

        os.chdir(folder)  # the database URL is relative, because a path may contain characters that a URL can't
        provide_database(folder / DATABASE)
        _serve(listener)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _exit_with_parent(folder: Path) -> None:
    """Exit when standard input is closed, which happens when the run exits in any way."""
    os.read(0, 1)  # not sys.stdin, whose lock would block the interpreter's exit
    for _ in range(100):  # other threads may still write to it
        shutil.rmtree(folder, ignore_errors=True)
        if not folder.exists():
            break
    os._exit(0)


def _serve(listener: socket.socket) -> None:
    import uvicorn
    from prefect.server.api.server import create_app

    app = create_app(ephemeral=True, final=True)
    uvicorn.Server(uvicorn.Config(app, log_level="error", lifespan="on")).run(sockets=[listener])


if __name__ == "__main__":
    main(socket.socket(fileno=int(sys.argv[1])), Path(sys.argv[2]))
