"""The database of a temporary server, copied from a template because migrations take most of the time to start."""

import asyncio
import contextlib
import os
import shutil
import sqlite3
from pathlib import Path

from attlas.flows.environment import cache_folder


def provide_database(file: Path) -> None:
    """Create an empty, migrated database. The first server of a Prefect version saves it as the template for later ones.

    Servers that start at the same time each migrate their own database; the template is replaced atomically.
    """
    template = _template()
    if template is not None and _copy_template(template, file):
        return
    _migrate()
    if template is not None:
        with contextlib.suppress(OSError, sqlite3.Error):  # such as a full disk; the next server migrates again
            _save_template(file, template)


def _template() -> Path | None:
    import prefect

    cache = cache_folder()
    return None if cache is None else cache / f"prefect-{prefect.__version__}.db"


def _copy_template(template: Path, file: Path) -> bool:
    """Copy the template; returns False if there is none or it is damaged."""
    try:
        shutil.copyfile(template, file)
        with contextlib.closing(sqlite3.connect(file)) as database:
            intact = database.execute("PRAGMA quick_check").fetchall() == [("ok",)]
            if intact and database.execute("SELECT count(*) FROM alembic_version").fetchone()[0]:
                return True
    except (OSError, sqlite3.Error):
        pass
    file.unlink(missing_ok=True)
    return False


def _migrate() -> None:
    """Create the tables of the database in Prefect's settings."""
    from prefect.server.database import provide_database_interface

    async def create() -> None:
        interface = provide_database_interface()
        await interface.create_db()
        await (await interface.engine()).dispose()

    asyncio.run(create())


def _save_template(file: Path, template: Path) -> None:
    template.parent.mkdir(parents=True, exist_ok=True)
    temporary = template.with_name(f"{template.name}.{os.getpid()}.tmp")
    try:
        with contextlib.closing(sqlite3.connect(file)) as database:
            database.execute("VACUUM INTO ?", (str(temporary),))
        temporary.replace(template)
    finally:
        temporary.unlink(missing_ok=True)
