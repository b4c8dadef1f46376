"""What a run sets in its own environment, before the libraries that read it are imported."""

import atexit
import contextlib
import io
import os
import re
import shutil
import sys
import tempfile
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from extract.errors import Refusal

if TYPE_CHECKING:
    from pydantic import ValidationError

_LOOPBACK = ("127.0.0.1", "localhost", "::1")
_NO_PROXY = ("no_proxy", "NO_PROXY")  # the first one wins where both are set


def prepare_environment() -> str | None:
    """Set up proxies and homes; gives what the user should know of it, if anything."""
    exempt_loopback()
    return provide_homes()


def refuse_bad_settings() -> None:
    """Refuse settings that Prefect itself does not take; it reads them when it is imported."""
    from pydantic import ValidationError

    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):  # where Prefect prints such an error before it raises it
            import prefect.context  # noqa: F401
    except ValidationError as error:
        raise Refusal(
            f"Prefect's settings must be such as it takes; {_complaint(error)}; "
            "correct it in the environment or in Prefect's profile"
        ) from None
    except tomllib.TOMLDecodeError as error:
        raise Refusal(
            f"Prefect's settings must be such as it takes; a file of them is no TOML: {error}; "
            "correct profiles.toml in PREFECT_HOME, or prefect.toml here"
        ) from None
    sys.stderr.write(said.getvalue())


def _complaint(error: "ValidationError") -> str:
    """The first wrong setting, by the name of its variable where it is known, and why it is wrong."""
    first = error.errors()[0]
    why = first["msg"].removeprefix("Value error, ")
    if not first["loc"]:
        return why
    section = re.sub(r"(?<=[a-z])(?=[A-Z])", "_", error.title.removesuffix("Settings"))
    name = "_".join(filter(None, ["PREFECT", section, *map(str, first["loc"])])).upper()
    return f"{name} is {first['input']!r}: {why}"


def quiet_defaults() -> None:
    """For a run at a terminal: no analytics, and no log lines but errors. A user's own settings win."""
    defaults = {
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "DO_NOT_TRACK": "1",
        "PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL": "ERROR",
        "TRANSFORMERS_VERBOSITY": "error",
        "DATASETS_VERBOSITY": "error",
        "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
    }
    for name, value in defaults.items():
        os.environ.setdefault(name, value)


def exempt_loopback() -> None:
    """Add this machine's own addresses to the hosts that are reached without a proxy."""
    given = next((os.environ[name] for name in _NO_PROXY if name in os.environ), "")
    hosts = [host.strip() for host in given.split(",") if host.strip()]
    # `*` stands alone: within a list it is a host of that name
    value = "*" if "*" in hosts else ",".join([*hosts, *(host for host in _LOOPBACK if host not in hosts)])
    os.environ.update(dict.fromkeys(_NO_PROXY, value))


@contextmanager
def without_proxies() -> Iterator[None]:
    """No proxy for any host. HTTP clients set up every proxy that is named, even one that they can't use or won't need."""
    before = {name: os.environ.get(name) for name in _NO_PROXY}
    os.environ.update(dict.fromkeys(_NO_PROXY, "*"))
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def provide_homes() -> str | None:
    """Put a temporary folder in the place of each home that is missing and can't be made; says which they were."""
    missing: list[str] = []
    home = _home()
    if home is None or _is_out_of_reach(home):
        # nothing is there that could be read, so that every library may have another
        os.environ["HOME"] = temporary_folder()
        missing.append(f"HOME ({'unset' if home is None else home})")
    for name, folder in _homes(Path.home()).items():
        if _is_out_of_reach(folder):
            os.environ[name] = str(Path(temporary_folder(), name.lower()))
            missing.append(f"{name} ({folder})")
    if not missing:
        return None
    return (
        f"{' and '.join(missing)} can't be written: a temporary folder is used instead, and what is downloaded or compiled "
        "there is lost; to keep it, set PREFECT_HOME, XDG_CACHE_HOME (or NUMBA_CACHE_DIR) and HF_HOME to folders that can"
    )


def remove_temporary_folder() -> None:
    """Remove what `temporary_folder` made; at exit this happens by itself."""
    while _temporary:
        shutil.rmtree(_temporary.pop(), ignore_errors=True)


_temporary: list[str] = []


def temporary_folder() -> str:
    """A folder that goes when the process ends."""
    if not _temporary:
        try:
            _temporary.append(tempfile.mkdtemp(prefix="attlas-home-"))
        except OSError as error:
            raise Refusal(
                f"a run needs a folder for temporary files; none can be written ({error.strerror}); set TMPDIR to one"
            ) from None
        atexit.register(remove_temporary_folder)
    return _temporary[0]


def cache_folder() -> Path | None:
    """The folder for what attlas keeps between runs; None where none can be written."""
    home = _home()
    base = os.environ.get("XDG_CACHE_HOME") or (home / ".cache" if home else None)
    return Path(base) / "attlas" if base and _is_writable(Path(base)) else None


def _homes(home: Path) -> dict[str, Path]:
    """The folders that Prefect and the hub's libraries make for themselves, by the variable that names them."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or home / ".cache")
    named = {"PREFECT_HOME": home / ".prefect", "HF_HOME": cache / "huggingface"}
    return {name: Path(os.environ.get(name) or default).expanduser() for name, default in named.items()}


def _home() -> Path | None:
    try:
        return Path.home()
    except RuntimeError:  # neither HOME nor an entry for the user
        return None


def _is_out_of_reach(folder: Path) -> bool:
    """Whether there is no such folder and none can be made. One that is there may be read, if nothing else."""
    return not _is_folder(folder) and not _is_writable(folder)


def _is_writable(folder: Path) -> bool:
    """Whether files can be put there, after making what is missing of the path. Nothing is made."""
    there = next((place for place in (folder, *folder.absolute().parents) if _exists(place)), folder)
    try:
        # asked by doing: permissions say nothing of read-only or special file systems
        with tempfile.TemporaryDirectory(prefix=".attlas-", dir=there):
            return True
    except OSError:
        return False


def _is_folder(path: Path) -> bool:
    try:
        return path.is_dir()
    except OSError:
        return False


def _exists(path: Path) -> bool:
    try:
        return path.exists() or path.is_symlink()
    except OSError:
        return False
