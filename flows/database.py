"""The database of a temporary server: a copy of one that was migrated before, since migrations take most of a start."""

import asyncio
import contextlib
import os
import shutil
import sqlite3
from pathlib import Path

from flows.environment import cache_folder


def provide_database(file: Path) -> None:
    """Put an empty, migrated database there. The first server of a Prefect version leaves the template to the others.

    Servers that start at once each migrate their own; the template appears whole, whoever comes last.
    """
    template = _template()
    if template is not None and _copied(template, file):
        return
    _migrate()
    if template is not None:
        with contextlib.suppress(OSError, sqlite3.Error):  # a full disk, say: the next server migrates again
            _keep(file, template)


def _template() -> Path | None:
    import prefect

    cache = cache_folder()
    return None if cache is None else cache / f"prefect-{prefect.__version__}.db"


def _copied(template: Path, file: Path) -> bool:
    """Copy the template, unless there is none or it is damaged."""
    try:
        shutil.copyfile(template, file)
        with contextlib.closing(sqlite3.connect(file)) as database:
            whole = database.execute("PRAGMA quick_check").fetchall() == [("ok",)]
            if whole and database.execute("SELECT count(*) FROM alembic_version").fetchone()[0]:
                return True
    except (OSError, sqlite3.Error):
        pass
    file.unlink(missing_ok=True)
    return False


def _migrate() -> None:
    """Make the tables of the database that Prefect's settings name."""
    from prefect.server.database import provide_database_interface

    async def create() -> None:
        interface = provide_database_interface()
        await interface.create_db()
        await (await interface.engine()).dispose()

    asyncio.run(create())


def _keep(file: Path, template: Path) -> None:
    template.parent.mkdir(parents=True, exist_ok=True)
    temporary = template.with_name(f"{template.name}.{os.getpid()}.tmp")
    try:
        with contextlib.closing(sqlite3.connect(file)) as database:
            database.execute("VACUUM INTO ?", (str(temporary),))
        temporary.replace(template)
    finally:
        temporary.unlink(missing_ok=True)
