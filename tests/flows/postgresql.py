"""A PostgreSQL server of Debian for one test: a cluster of its own, on loopback, with a password."""

import os
import secrets
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.waiting import free_port

_VERSIONS = Path("/usr/lib/postgresql")


def programs() -> Path | None:
    """The folder of the newest server's programs; None if there is none."""
    found = sorted(_VERSIONS.glob("*/bin/initdb"))
    return found[-1].parent if found else None


@contextmanager
def postgresql() -> Iterator[str]:
    """The URL of an empty database, for SQLAlchemy with asyncpg."""
    folder = Path(tempfile.mkdtemp(prefix="postgresql-"))  # not in pytest's own, which other users can't enter
    password = folder / "password"
    password.write_text(secrets.token_hex(16))
    port = free_port()
    if os.geteuid() == 0:  # the server does not run as root
        shutil.chown(folder, "postgres", "postgres")
        shutil.chown(password, "postgres", "postgres")
    _run("initdb", "-D", folder / "data", "-U", "prefect", "-A", "scram-sha-256", "--pwfile", password)
    options = f"-p {port} -k {folder} -c listen_addresses=127.0.0.1 -c fsync=off"
    _run("pg_ctl", "-D", folder / "data", "-l", folder / "log", "-o", options, "-w", "start")
    try:
        yield f"postgresql+asyncpg://prefect:{password.read_text()}@127.0.0.1:{port}/postgres"
    finally:
        _run("pg_ctl", "-D", folder / "data", "-m", "immediate", "-w", "stop")
        shutil.rmtree(folder, ignore_errors=True)


async def rows_of(url: str, table: str) -> int:
    """The number of rows of a table."""
    import asyncpg

    connection = await asyncpg.connect(url.replace("+asyncpg", ""))
    try:
        return await connection.fetchval(f"SELECT count(*) FROM {table}")
    finally:
        await connection.close()


def _run(program: str, *arguments: object) -> None:
    found = programs()
    assert found is not None, "Debian's package postgresql is installed"
    command = [str(found / program), *map(str, arguments)]
    if os.geteuid() == 0:
        command = ["runuser", "-u", "postgres", "--", *command]
    # files, not pipes: a server that is started keeps them
    with tempfile.TemporaryFile() as output:
        ended = subprocess.run(command, cwd="/", stdout=output, stderr=output, check=False)
        output.seek(0)
        assert ended.returncode == 0, output.read().decode()
