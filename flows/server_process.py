"""The process of a temporary server: `python -m flows.server_process LISTENER FOLDER`, a socket's number and its folder."""

import os
import shutil
import socket
import sys
import threading
from pathlib import Path

DATABASE = "prefect.db"


def main(listener: socket.socket, folder: Path) -> None:
    """Serve, from a new folder, until the run that started this process ends, or ends it; then remove the folder."""
    folder.mkdir(mode=0o700)
    threading.Thread(target=_end_with_parent, args=[folder], daemon=True).start()
    try:
        import prefect.settings  # noqa: F401 - reads the user's settings, some of which lie in the current folder

        from flows.database import provide_database

        os.chdir(folder)  # the database's address is relative, since a path may hold what an address can't
        provide_database(folder / DATABASE)
        _serve(listener)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _end_with_parent(folder: Path) -> None:
    """The other end of standard input is the run's: it closes with the run, however that ends."""
    os.read(0, 1)  # not sys.stdin, whose lock the interpreter would wait for when it ends
    for _ in range(100):  # the other threads may still write to it
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
