"""Set environment variables for a run, before the libraries that read them are imported."""

import atexit
import contextlib
import io
import os
import re
import shutil
import sys
import tempfile
import tomllib
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from attlas.extract.errors import Refusal

if TYPE_CHECKING:
    from pydantic import ValidationError

_LOOPBACK = ("127.0.0.1", "localhost", "::1")
_NO_PROXY = ("no_proxy", "NO_PROXY")  # in order of precedence


def prepare_environment() -> str | None:
    """Set up proxies and home folders; returns a note for the user if a home can't be used."""
    exempt_loopback_from_proxies()
    return replace_missing_homes()


def refuse_bad_settings() -> None:
    """Import Prefect, which validates its settings, and raise Refusal if they are invalid."""
    from pydantic import ValidationError

    output = io.StringIO()
    try:
        with contextlib.redirect_stderr(output):  # Prefect prints the error as well
            import prefect.context  # noqa: F401
    except ValidationError as error:
        raise Refusal(
            f"Prefect's settings must be valid; {_problem(error)}; "
            "correct it in the environment or in Prefect's profile"
        ) from None
    except tomllib.TOMLDecodeError as error:
        raise Refusal(
            f"Prefect's settings must be valid; a settings file is not TOML: {error}; "
            "correct profiles.toml in PREFECT_HOME, or prefect.toml here"
        ) from None
    sys.stderr.write(output.getvalue())


def _problem(error: "ValidationError") -> str:
    """The first invalid setting, by the name of its environment variable if possible, and the reason."""
    first = error.errors()[0]
    reason = first["msg"].removeprefix("Value error, ")
    if not first["loc"]:
        return reason
    section = re.sub(r"(?<=[a-z])(?=[A-Z])", "_", error.title.removesuffix("Settings"))
    name = "_".join(filter(None, ["PREFECT", section, *map(str, first["loc"])])).upper()
    return f"{name} is {first['input']!r}: {reason}"


def set_quiet_defaults() -> None:
    """Disable analytics and all log messages but errors, unless the user has set them."""
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


def exempt_loopback_from_proxies() -> None:
    """Add this machine's own addresses to NO_PROXY."""
    configured = next((os.environ[name] for name in _NO_PROXY if name in os.environ), "")
    hosts = [host.strip() for host in configured.split(",") if host.strip()]
    # `*` works only by itself, not within a list
    value = "*" if "*" in hosts else ",".join([*hosts, *(host for host in _LOOPBACK if host not in hosts)])
    os.environ.update(dict.fromkeys(_NO_PROXY, value))


def proxies_disabled() -> AbstractContextManager[None]:
    """Disable proxies for all hosts. HTTP clients set up every configured proxy, even an unsupported or unneeded one."""
    return environment_with(dict.fromkeys(_NO_PROXY, "*"))


@contextmanager
def environment_with(values: Mapping[str, str]) -> Iterator[None]:
    """Set variables for this process and those that it starts, and restore them afterwards."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def replace_missing_homes() -> str | None:
    """Use a temporary folder for each home that does not exist and can't be created; returns a note that lists them."""
    missing: list[str] = []
    home = _home()
    if home is None or _is_unusable(home):
        # an unusable home has nothing to read, so all libraries can use another one
        os.environ["HOME"] = temporary_folder()
        missing.append(f"HOME ({'unset' if home is None else home})")
    for name, folder in _homes(Path.home()).items():
        if _is_unusable(folder):
            os.environ[name] = str(Path(temporary_folder(), name.lower()))
            missing.append(f"{name} ({folder})")
    if not missing:
        return None
    return (
        f"{' and '.join(missing)} can't be written: a temporary folder is used instead, and downloaded or compiled files are "
        "lost; to keep them, set PREFECT_HOME, XDG_CACHE_HOME (or NUMBA_CACHE_DIR) and HF_HOME to writable folders"
    )


def remove_temporary_folder() -> None:
    """Remove the temporary folder; also called at exit."""
    while _temporary:
        shutil.rmtree(_temporary.pop(), ignore_errors=True)


_temporary: list[str] = []


def temporary_folder() -> str:
    """A folder that is removed when the process exits."""
    if not _temporary:
        try:
            _temporary.append(tempfile.mkdtemp(prefix="attlas-home-"))
        except OSError as error:
            raise Refusal(
                f"a run needs a folder for temporary files; none is writable ({error.strerror}); set TMPDIR to a writable one"
            ) from None
        atexit.register(remove_temporary_folder)
    return _temporary[0]


def cache_folder() -> Path | None:
    """The folder for files that attlas keeps between runs; None if it is not writable."""
    home = _home()
    base = os.environ.get("XDG_CACHE_HOME") or (home / ".cache" if home else None)
    return Path(base) / "attlas" if base and _is_writable(Path(base)) else None


def _homes(home: Path) -> dict[str, Path]:
    """The folders that Prefect and the hub's libraries create, by environment variable."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or home / ".cache")
    defaults = {"PREFECT_HOME": home / ".prefect", "HF_HOME": cache / "huggingface"}
    return {name: Path(os.environ.get(name) or default).expanduser() for name, default in defaults.items()}


def _home() -> Path | None:
    try:
        return Path.home()
    except RuntimeError:  # HOME is not set and the user is unknown
        return None


def _is_unusable(folder: Path) -> bool:
    """Whether a folder does not exist and can't be created. An existing one is at least readable."""
    return not _is_folder(folder) and not _is_writable(folder)


def _is_writable(folder: Path) -> bool:
    """Whether files can be written to a folder, once it exists. Does not create it."""
    existing = next((place for place in (folder, *folder.absolute().parents) if _exists(place)), folder)
    try:
        # permissions do not account for read-only or special file systems, so try it
        with tempfile.TemporaryDirectory(prefix=".attlas-", dir=existing):
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
