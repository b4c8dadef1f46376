"""What runs the shards of a run: threads of this process, processes of this machine, or a Dask cluster. It changes no byte."""

import multiprocessing
import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, cast

from prefect.futures import PrefectFuture
from prefect.task_runners import ProcessPoolTaskRunner, TaskRunner, ThreadPoolTaskRunner

from attlas.extract.batching import SHARDS_AT_ONCE
from attlas.extract.errors import Refusal

if TYPE_CHECKING:
    from attlas.extract.options import RunOptions

Runner = TaskRunner[PrefectFuture[Any]]
_WORKERS = "ATTLAS_WORKERS"  # how many processes share this machine, as their environment says


def task_runner(*, workers: int | None = None, dask: str | None = None) -> Runner:
    """The task runner for so many processes of this machine, or for Dask; threads of this process by default. Raises Refusal.

    dask: `dask` for a cluster of its own on this machine, with so many workers, or dask://HOST:PORT for a scheduler that runs.
    """
    if workers is not None and workers < 1:
        raise Refusal(f"--workers must be at least 1; got {workers}; use a larger number")
    if dask is not None:
        return _dask_runner(dask, workers)
    if workers is None or workers == 1:
        return cast(Runner, ThreadPoolTaskRunner(max_workers=SHARDS_AT_ONCE))
    os.environ[_WORKERS] = str(workers)
    return cast(
        Runner,
        ProcessPoolTaskRunner(max_workers=workers, subprocess_message_processor_factories=[_report_to_server_of_run]),
    )


def _report_to_server_of_run() -> Callable[..., tuple[str, Any]]:
    """Have the calling thread, which passes on what processes report, use the server of the run.

    It is not started in the context of the flow, so Prefect 3.8 would start another server in it, which knows nothing of the run.
    """
    from prefect.settings import PREFECT_API_AUTH_STRING, PREFECT_API_URL, temporary_settings

    connection: dict[Any, str] = {
        s: os.environ[s.name] for s in (PREFECT_API_URL, PREFECT_API_AUTH_STRING) if s.name in os.environ
    }
    settings = temporary_settings(connection)
    settings.__enter__()

    def pass_on(message_type: str, message_payload: Any) -> tuple[str, Any]:
        assert settings, "they last as long as this function, and it as long as the thread"
        return message_type, message_payload

    return pass_on


def is_in_this_process(runner: Runner) -> bool:
    """Whether a runner's tasks show their own progress."""
    return isinstance(runner, ThreadPoolTaskRunner)


def share_machine(options: "RunOptions") -> "RunOptions":
    """The options for this process, with its share of the machine if it is one of several that `task_runner` started."""
    from attlas.extract.share import use_share_of_machine

    workers = int(os.environ.get(_WORKERS, "1"))
    if workers == 1 or multiprocessing.parent_process() is None:
        return options
    number = multiprocessing.current_process()._identity[0] - 1  # pyright: ignore[reportAttributeAccessIssue]
    return use_share_of_machine(options, number, workers)


def _dask_runner(name: str, workers: int | None) -> Runner:
    address = name.removeprefix("dask://") if name.startswith("dask://") else None
    if (address is None and name != "dask") or address == "":
        raise Refusal(f"--runner is dask, or dask://HOST:PORT for a scheduler that runs; got {name!r}; use one of them")
    if address is not None and workers is not None:
        raise Refusal(
            f"--workers is for processes of this machine; the workers of {name} are its own; leave --workers out"
        )
    try:
        from prefect_dask.task_runners import DaskTaskRunner
    except ImportError as error:
        raise Refusal("--runner dask needs the package prefect-dask; pip install 'attlas[dask]'") from error
    if address is not None:
        return cast(Runner, DaskTaskRunner(address=f"tcp://{address}"))
    cluster = {"n_workers": workers or 1, "threads_per_worker": SHARDS_AT_ONCE}
    return cast(Runner, DaskTaskRunner(cluster_kwargs=cluster))
