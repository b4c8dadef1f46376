"""The command line. Heavy imports are inside the commands, so that --help is fast."""

import errno
import os
import signal
import sys
import threading
import traceback
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Annotated, Any

import typer

from attlas.extract.errors import Refusal
from attlas.extract.urls import is_url
from attlas.flows.config import Run, read_run
from attlas.flows.interrupts import Stopped, exit_code_of
from attlas.flows.places import Place
from attlas.flows.run_options import with_run_options
from attlas.flows.streams import (
    exit_on_closed_pipe,
    flush_output,
    ignore_closed_pipe,
    make_streams_safe,
    report_write_errors,
)

FAILED, BAD_USAGE, FINDING = 1, 2, 3
DEFAULT_PAGE = "view.html"

app = typer.Typer(
    name="attlas",
    help="The atlas of attention: exact statistics of every attention head and every residual update, as Parquet.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)

Dataset = Annotated[str, typer.Argument(metavar="DIR", help="a finished dataset: the --out of a run, a folder or URL")]

Output = Annotated[Path | None, typer.Option(help="A file to write instead of standard output.")]
RowsFormat = Annotated[str, typer.Option("--format", metavar="table|csv|json|parquet", help="The output format.")]


def main() -> None:
    """Run a command. Refusals exit with 2 and failures with 1, both with a message that says what to do."""
    # keeps the thread pools of BLAS and the cpu engine from spinning against each other; read when torch loads
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    make_streams_safe()
    exit_on_closed_pipe()
    code = exit_code(sys.argv[1:])
    error = flush_output()
    if error is not None and code == 0:
        code = _report_error(error, code=FAILED)
    if any(thread.name == "attlas-query" for thread in threading.enumerate()):
        os._exit(code)  # a query that can't be interrupted ends with the process
    sys.exit(code)


def exit_code(arguments: list[str]) -> int:
    """Run `attlas ARGUMENTS` and return its exit code; error messages go to standard error."""
    try:
        app(arguments)
    except SystemExit as error:
        return error.code if isinstance(error.code, int) else FAILED
    except Refusal as refusal:
        return _report_error(refusal, code=BAD_USAGE)
    except Stopped as stopped:
        _tell(str(stopped), code=exit_code_of(signal.SIGINT))
        return exit_code_of(signal.SIGINT)
    except Exception as failure:
        return _report_error(failure, code=FAILED)
    return 0


# what to do, in words
_AGAIN = "run the same command again: what is finished is kept"
_ADVICE = {
    errno.ENOSPC: f"make room and {_AGAIN}",
    errno.EDQUOT: f"make room within your quota and {_AGAIN}",
    errno.EROFS: f"make it writable and {_AGAIN}",
    errno.EACCES: f"give yourself the right and {_AGAIN}",
    errno.EPERM: f"give yourself the right and {_AGAIN}",
    errno.ENOENT: f"put it back, or {_AGAIN}",
    errno.EIO: f"look after the disk, then {_AGAIN}",
    errno.ESTALE: f"mount it again, then {_AGAIN}",
}


def _in_words(error: Exception) -> str:
    """What has failed, for people: of an error of the file system the file, the reason and what to do."""
    from attlas.extract.printable import printable

    if isinstance(error, OSError) and error.filename is not None and error.errno in _ADVICE:
        return f"attlas: failed: {printable(error.filename)}: {printable(error.strerror)}; {_ADVICE[error.errno]}"
    kind = type(error).__name__
    return f"attlas: failed: {kind}: {printable(error)}\nfor the traceback: attlas --debug …"


def _report_error(error: Exception, *, code: int) -> int:
    from attlas.extract.printable import printable

    if _shown.debug:
        lines = "".join(traceback.format_exception(error)).splitlines()
        typer.echo("\n".join(map(printable, lines)), err=True)
    else:
        _tell(f"attlas: {printable(error)}" if code == BAD_USAGE else _in_words(error), code=code)
    return code


def _tell(message: str, *, code: int) -> None:
    """Say on standard error why a command ends with this code."""
    if _shown.log_format == "json":
        from attlas.flows.telemetry import event

        message = event("error", exit_code=code, message=message)
    typer.echo(message, err=True)


@dataclass
class _Shown:
    """How commands show what they do, by the options before their names."""

    debug: bool = False
    log_format: str = "text"
    metrics: str | None = None

    def display(self) -> Any:
        """The display of a run."""
        from attlas.flows.progress import display_for_terminal
        from attlas.flows.telemetry import JsonDisplay, MeteredDisplay

        display = JsonDisplay() if self.log_format == "json" else display_for_terminal()
        return display if self.metrics is None else MeteredDisplay(display, self.metrics)


_shown = _Shown()


@app.callback(invoke_without_command=True)
def attlas(
    *,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks and Prefect's log.")] = False,
    log_format: Annotated[
        str,
        typer.Option(
            metavar="text|json", help="Progress and errors on standard error, for people or as lines of JSON."
        ),
    ] = "text",
    metrics: Annotated[
        str | None, typer.Option(metavar="[HOST:]PORT", help="Serve metrics of a run there, for Prometheus.")
    ] = None,
    version: Annotated[bool, typer.Option("--version", help="Show the version.")] = False,
) -> None:
    _shown.debug, _shown.metrics = debug, metrics
    _shown.log_format = "text"  # so that a wrong one is reported in words
    _shown.log_format = _output_format(log_format, ("text", "json"), option="--log-format")
    if version:
        from importlib.metadata import version as installed

        typer.echo(f"attlas {installed('attlas')}")
        raise typer.Exit


RunFile = Annotated[Path | None, typer.Argument(metavar="RUN.toml", help="A run file; options take precedence.")]


Shards = Annotated[
    str | None,
    typer.Option(
        metavar="K/N",
        help="Measure only the K-th of N shares of the shards, in a job of a batch system; attlas finish completes the dataset.",
        show_default=False,
    ),
]


Workers = Annotated[
    int | None,
    typer.Option(
        metavar="N",
        help="Measure with so many processes, each with its share of the cores or a GPU. [default: 1]",
        show_default=False,
    ),
]
RunnerName = Annotated[
    str | None,
    typer.Option(metavar="dask|dask://HOST:PORT", help="Measure on a Dask cluster (extra: dask).", show_default=False),
]


def run(
    run_file: RunFile = None,
    *,
    shards: Shards = None,
    workers: Workers = None,
    runner: RunnerName = None,
    **options: Any,
) -> None:
    """Measure a corpus with a model and write a Parquet dataset and its report. An interrupted run continues."""
    from attlas.flows.checks import refuse_bad_paths

    ignore_closed_pipe()
    settings = read_run(run_file, options)
    refuse_bad_paths(settings, run_file=run_file)
    if shards is not None:
        _refuse_several(shards, workers, runner)
        _run_share(settings, shards)
        return
    page = _measure(settings, workers=workers, runner=runner)
    with report_write_errors():
        _show_summary(settings.out)
        _show_paths(dataset=settings.out, report=page)


def _measure(settings: Run, *, workers: int | None = None, runner: str | None = None) -> Any:
    """Measure with Prefect in this process; returns the report's place."""
    _be_quiet()
    _prepare_for_prefect()
    _quiet_loading(settings.model)
    from attlas.flows.measure import measure_locally
    from attlas.flows.runners import task_runner
    from attlas.flows.server import show_only_errors

    if not _shown.debug:
        show_only_errors()
    return measure_locally(settings, show=_shown.display(), runner=task_runner(workers=workers, dask=runner))


def _be_quiet() -> None:
    """Show no logs of libraries, unless they are asked for."""
    from attlas.flows.environment import set_quiet_defaults

    if not _shown.debug:
        set_quiet_defaults()


def _refuse_several(shards: str, workers: int | None, runner: str | None) -> None:
    if workers is not None or runner is not None:
        given = "--workers" if workers is not None else "--runner"
        raise Refusal(f"a share is measured by one process; got --shards {shards} and {given}; leave one of them out")


def _run_share(settings: Run, named: str) -> None:
    """Measure a share of a run, without Prefect."""
    from attlas.extract.share import Share

    share = Share.named(named)
    _be_quiet()
    _prepare_folders()
    _quiet_loading(settings.model)
    from attlas.flows.shares import measure_share

    typer.echo(measure_share(settings, share, show=_shown.display()))


@app.command()
def finish(
    run: Annotated[str, typer.Argument(metavar="DIR|RUN.toml", help="The --out of a run, or its run file.")],
) -> None:
    """Complete a dataset whose shards were measured with --shards, and write its report."""
    ignore_closed_pipe()
    from attlas.flows.analyze import report
    from attlas.flows.shares import finish_run

    dataset = finish_run(run, show=_shown.display())
    page = report.fn(dataset)
    with report_write_errors():
        _show_summary(dataset)
        _show_paths(dataset=dataset, report=page)


def repair(run_file: RunFile = None, **options: Any) -> None:
    """Measure damaged parts of a finished dataset again, byte for byte, with the run file and options that made it."""
    from attlas.flows.checks import refuse_bad_paths

    ignore_closed_pipe()
    settings = read_run(run_file, options)
    refuse_bad_paths(settings, run_file=run_file)
    _be_quiet()
    _prepare_folders()
    _quiet_loading(settings.model)
    from attlas.flows.repair import repair_dataset

    typer.echo(repair_dataset(settings, show=_shown.display()))


def _quiet_loading(model: str) -> None:
    """Show no progress of loading from disk: it is fast, and its bars would interfere with ours. Bars of downloads are useful."""
    if model == "demo" or Path(model).is_dir() or ".py:" in model:
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")


def _prepare_for_prefect() -> None:
    """Set up the environment for Prefect and check its settings."""
    from attlas.flows.environment import refuse_bad_settings

    _prepare_folders()
    refuse_bad_settings()


def _prepare_folders() -> None:
    """Use temporary folders in place of home folders that can't be written."""
    from attlas.flows.environment import prepare_environment

    note = prepare_environment()
    if note is not None:
        typer.echo(note, err=True)


app.command(name="run")(with_run_options(run))
app.command(name="repair")(with_run_options(repair))


FailOnDrift = Annotated[str | None, typer.Option(metavar="drift", help="Exit with code 3 if anything changed.")]
MinDocuments = Annotated[
    int,
    typer.Option(
        metavar="N",
        help="Show no numbers that fewer documents stand behind; an export pools so many.",
        show_default=False,
    ),
]


@app.command()
def report(
    dataset: Dataset,
    other: Annotated[
        str | None, typer.Argument(metavar="[B]", help="Another dataset: the page compares it with the first.")
    ] = None,
    *,
    output: Annotated[
        Path | None, typer.Option(help="The file to write. [default: DIR/report.html, or comparison.html in B]")
    ] = None,
    form: Annotated[str, typer.Option("--format", metavar="html|json", help="The page, or its numbers.")] = "html",
    min_documents: MinDocuments = 1,
) -> None:
    """Write the analyses to one self-contained HTML page, and show the key tables; or a page that compares two datasets."""
    chosen = _output_format(form, ("html", "json"))
    if other is not None:
        _report_comparison(dataset, other, output, form=chosen, min_documents=min_documents)
        return
    from attlas.analysis.columns import console_for
    from attlas.analysis.report import report as open_report
    from attlas.analysis.report import save_report

    if chosen == "json":
        _write_json(open_report(dataset, min_documents=min_documents).numbers(), output)
        return
    found, page = save_report(dataset, output, min_documents=min_documents)
    console_for(sys.stdout).print(found.terminal(), crop=False)
    _show_paths(report=page)


def _report_comparison(a: str, b: str, output: Path | None, *, form: str, min_documents: int) -> None:
    from attlas.analysis.compare import compare as compare_datasets
    from attlas.analysis.comparison_output import save_comparison, write_comparison

    comparison = compare_datasets(a, b, min_documents=min_documents)
    if form == "json":
        _write_json({"notes": comparison.notes, "rows": comparison.rows.to_dicts()}, output)
        return
    page = save_comparison(comparison, b, output)
    write_comparison(comparison, "table", sys.stdout)
    _show_paths(report=page)


def _answer(output: Path | None) -> AbstractContextManager[IO[Any]]:
    """Standard output, or a file that appears whole or not at all."""
    from attlas.analysis.output import answer_file

    return nullcontext(sys.stdout) if output is None else answer_file(output)


def _write_json(value: Any, output: Path | None) -> None:
    import json

    from attlas.analysis.output import write_whole

    with _answer(output) as stream:
        write_whole([json.dumps(value, ensure_ascii=False, allow_nan=False).encode(), b"\n"], stream)


@app.command()
def query(
    dataset: Annotated[
        str | None, typer.Argument(metavar="DIR", help="a finished dataset: the --out of a run, a folder or URL")
    ] = None,
    sql: Annotated[
        str | None, typer.Argument(metavar="SQL", help="One SELECT statement; each table is a view.")
    ] = None,
    *,
    examples: Annotated[
        bool, typer.Option("--examples", help="Show useful queries; with DIR, also which columns it lacks for them.")
    ] = False,
    form: RowsFormat = "table",
    output: Output = None,
    timeout: Annotated[float, typer.Option(metavar="SECONDS", help="The maximum time of the query.")] = 60.0,
) -> None:
    """Query the dataset with SQL, read-only. Besides its tables there are the views heads_named and residual_named."""
    from attlas.analysis.result import FORMATS

    if examples == (sql is not None) or (dataset is None and not examples):
        raise Refusal(
            "a query is DIR and SQL, or --examples [DIR]; got something else; attlas query --examples has some"
        )
    output_format = _output_format(form, FORMATS, to_terminal=output is None and sys.stdout.isatty())
    if not 0 < timeout <= 604_800:
        raise Refusal(
            f"--timeout is above 0 seconds and at most 604,800 (a week); got {timeout:g}; give another number"
        )
    from attlas.analysis.example_queries import write_examples
    from attlas.analysis.query import query_rows, write_result

    with _answer(output) as stream:
        if dataset is None or sql is None:
            write_examples(dataset, output_format, stream)
        else:
            write_result(query_rows(dataset, sql, timeout_s=timeout), output_format, stream)


def _output_format(form: str, formats: Sequence[str], *, to_terminal: bool = False, option: str = "--format") -> Any:
    """The one of the formats that has this name."""
    chosen = next((known for known in formats if known == form), None)
    if chosen == "parquet" and to_terminal:
        raise Refusal("parquet can't be written to a terminal; standard output is one; use --output FILE")
    if chosen is not None:
        return chosen
    raise Refusal(f"{option} must be one of {', '.join(formats)}; got {form!r}; choose one of them")


@app.command()
def findings(
    dataset: Dataset,
    *,
    form: RowsFormat = "table",
    output: Output = None,
    fail_on: Annotated[
        str | None,
        typer.Option(metavar="defects|findings", help="Exit with 3 if there is a defect, or a defect or finding."),
    ] = None,
) -> None:
    """List defects (something is wrong) and findings (normal, worth knowing) of heads and stream, with their evidence."""
    if fail_on not in (None, "defects", "findings"):
        raise Refusal(f"--fail-on must be defects or findings; got {fail_on!r}; choose one of them")
    from attlas.analysis.dataset import Dataset as Opened
    from attlas.analysis.judge import judge, write_judgement
    from attlas.analysis.result import FORMATS

    output_format = _output_format(form, FORMATS, to_terminal=output is None and sys.stdout.isatty())
    from attlas.extract.printable import printable

    judgement = judge(Opened.open(dataset))
    with _answer(output) as stream:
        write_judgement(judgement, output_format, stream)
    for name, reason in judgement.not_checked:
        typer.echo(f"not checked: {name}: {printable(reason)}", err=True)
    failing = {"defects": ("defect",), "findings": ("defect", "finding")}.get(fail_on or "", ())
    if any(judgement.count(type_) for type_ in failing):
        raise typer.Exit(FINDING)


@app.command()
def export(
    dataset: Dataset,
    *,
    output: Annotated[Path, typer.Option(metavar="FILE.csv|FILE.parquet", help="The file to write.")],
    table: Annotated[str, typer.Option(metavar="heads|residual|layers", help="What to export.")] = "heads",
    columns: Annotated[
        str | None, typer.Option(metavar="NAME,…", help="The statistics. [default: all that the dataset has]")
    ] = None,
    wide: Annotated[bool, typer.Option("--wide", help="A column for each statistic instead of a row.")] = False,
    mixed_model: Annotated[
        str | None,
        typer.Option(metavar="COLUMN", help="A row per sequence instead, as statsmodels and lme4 take it."),
    ] = None,
    min_documents: MinDocuments = 1,
) -> None:
    """Write means of documents to CSV or Parquet, a row per document and head, for statistics software."""
    from attlas.analysis.export import export as export_dataset

    names = _names(columns)
    if mixed_model is not None and (names is not None or wide):
        raise Refusal("--mixed-model has one column; --columns and --wide do not apply; leave them out")
    form = "wide" if wide else "long"
    written = export_dataset(
        dataset,
        output,
        table=table,
        columns=names,
        form=form,
        mixed_model=mixed_model,
        min_documents=min_documents,
    )
    _show_paths(export=written)


@app.command()
def info(
    dataset: Dataset,
    *,
    form: Annotated[str, typer.Option("--format", metavar="text|json", help="The output format.")] = "text",
) -> None:
    """Show the contents and provenance of a dataset."""
    from attlas.analysis.dataset import Dataset as Opened
    from attlas.analysis.info import FORMATS, describe, facts_as_json
    from attlas.extract.printable import printable

    chosen = _output_format(form, FORMATS)
    manifest = Opened.open(dataset).manifest
    if chosen == "json":
        typer.echo(facts_as_json(manifest))
        return
    for title, facts in describe(manifest):
        typer.echo(title)
        rows = [(printable(label), printable(value)) for label, value in facts]
        width = max((len(label) for label, _ in rows), default=0)
        for label, value in rows:
            typer.echo(f"  {label:<{width}}  {value}")


@app.command()
def log(
    dataset: Dataset,
    *,
    form: RowsFormat = "table",
    output: Output = None,
) -> None:
    """Show the generations of a dataset that has grown with its corpus. Any command reads one of them as DIR@NUMBER."""
    from attlas.analysis.history import history
    from attlas.analysis.result import FORMATS, write_result

    chosen = _output_format(form, FORMATS, to_terminal=output is None and sys.stdout.isatty())
    rows = history(dataset).to_arrow()
    with _answer(output) as stream:
        write_result(rows, chosen, stream)


@app.command()
def gc(
    dataset: Dataset,
    *,
    keep: Annotated[int, typer.Option(metavar="N", help="How many of the newest generations to keep.")],
) -> None:
    """Delete the oldest generations of a dataset, and the parts that no other one needs."""
    from attlas.analysis.history import collect_garbage
    from attlas.analysis.report.numbers import plural

    gone, parts = collect_garbage(dataset, keep=keep)
    typer.echo(f"removed {plural(len(gone), 'generation')} and {plural(len(parts), 'part')}")


@app.command(name="open")
def open_elsewhere(
    dataset: Annotated[
        str, typer.Argument(metavar="DIR", help="a finished dataset: a folder, or the URL of one in an object store")
    ],
    *,
    tool: Annotated[
        str | None,
        typer.Option(metavar="polars|duckdb|pandas|datasets|r", help="Only the lines for this one. [default: all]"),
    ] = None,
) -> None:
    """Print the lines of code that open this dataset in Polars, DuckDB, pandas, datasets and R."""
    from attlas.analysis.opening_lines import opening_lines

    for line in opening_lines(dataset, tool):
        typer.echo(line)


@app.command()
def compare(
    a: Annotated[str, typer.Argument(metavar="A", help="A finished dataset: a folder or URL.")],
    b: Annotated[str, typer.Argument(metavar="B", help="The dataset to compare with it.")],
    *,
    columns: Annotated[
        str | None, typer.Option(metavar="NAME,…", help="The columns to compare. [default: all that both have]")
    ] = None,
    margin: Annotated[
        list[str] | None,
        typer.Option(metavar="COLUMN=VALUE", help="The smallest difference that matters, in the column's unit, or 5%."),
    ] = None,
    match: Annotated[
        str | None,
        typer.Option(
            metavar="place|depth|heads",
            help="Compare the same heads, bands of relative depth, or the heads most alike. [default: place, or depth for "
            "models with other heads]",
        ),
    ] = None,
    alpha: Annotated[
        float, typer.Option(metavar="P", help="The level of tests and of the false discovery rate.")
    ] = 0.05,
    min_documents: MinDocuments = 1,
    fail_on: FailOnDrift = None,
    form: Annotated[
        str, typer.Option("--format", metavar="table|csv|json|parquet|html|junit", help="The output format.")
    ] = "table",
    output: Output = None,
) -> None:
    """Compare two datasets head by head, with intervals: what changed, what did not, and what is undecided."""
    _refuse_other_failure(fail_on)
    from attlas.analysis.compare import compare as compare_datasets
    from attlas.analysis.comparison_output import FORMATS, write_comparison

    chosen = _output_format(form, FORMATS, to_terminal=output is None and sys.stdout.isatty())
    comparison = compare_datasets(
        a,
        b,
        columns=_names(columns),
        margins=margin or (),
        alpha=alpha,
        match=match,
        min_documents=min_documents,
    )
    with _answer(output) as stream:
        write_comparison(comparison, chosen, stream)
    if fail_on and comparison.has_drift:
        raise typer.Exit(FINDING)


@app.command()
def trend(
    datasets: Annotated[
        list[str], typer.Argument(metavar="DIR…", help="Finished datasets of the same heads, or a pattern: 'runs/*'.")
    ],
    *,
    columns: Annotated[
        str | None,
        typer.Option(
            metavar="NAME,…|all", help="The columns to follow. [default: entropy, logits, mass_first, norms of updates]"
        ),
    ] = None,
    margin: Annotated[
        list[str] | None,
        typer.Option(metavar="COLUMN=VALUE", help="The smallest difference that matters, in the column's unit, or 5%."),
    ] = None,
    alpha: Annotated[
        float, typer.Option(metavar="P", help="The level of tests and of the false discovery rate.")
    ] = 0.05,
    min_documents: MinDocuments = 1,
    fail_on: Annotated[
        str | None, typer.Option(metavar="drift", help="Exit with code 3 if anything changed between the last two.")
    ] = None,
    form: Annotated[
        str, typer.Option("--format", metavar="table|csv|json|parquet|html", help="The output format.")
    ] = "table",
    output: Output = None,
) -> None:
    """Follow columns through training checkpoints or nights, head by head, with what changed marked."""
    _refuse_other_failure(fail_on)
    from attlas.analysis.trend import trend as follow
    from attlas.analysis.trend_output import FORMATS, write_trend
    from attlas.extract.printable import printable

    chosen = _output_format(form, FORMATS, to_terminal=output is None and sys.stdout.isatty())
    with _answer(output) as stream:
        found = follow(
            datasets, columns=_names(columns), margins=margin or (), alpha=alpha, min_documents=min_documents
        )
        for note in found.series.notes if chosen != "table" else ():
            typer.echo(printable(note), err=True)
        write_trend(found, chosen, stream)
    if fail_on and found.has_drift:
        raise typer.Exit(FINDING)


def _refuse_other_failure(fail_on: str | None) -> None:
    if fail_on not in (None, "drift"):
        raise Refusal(f"--fail-on must be drift; got {fail_on!r}; choose that, or leave it out")


def _names(text: str | None) -> list[str] | None:
    """Names in a list with commas."""
    return None if text is None else [name.strip() for name in text.split(",") if name.strip()]


@app.command()
def verify(
    dataset: Dataset,
    *,
    form: Annotated[str, typer.Option("--format", metavar="text|json|junit", help="The output format.")] = "text",
    output: Output = None,
) -> None:
    """Check checksums, schema, invariants and row counts, and list every problem (exit code 3)."""
    from attlas.analysis.dataset import Dataset as Opened
    from attlas.analysis.findings_output import FORMATS, write_findings
    from attlas.analysis.report.numbers import plural
    from attlas.analysis.verify import findings_in
    from attlas.extract.printable import printable

    chosen = _output_format(form, FORMATS)
    opened = Opened.open(dataset)
    with _answer(output) as stream:
        findings = findings_in(opened)
        write_findings(opened, findings, chosen, stream)
    if findings:
        typer.echo(f"{plural(len(findings), 'finding')} in {printable(dataset)}", err=True)
        raise typer.Exit(FINDING)


@app.command()
def push(
    dataset: Dataset,
    name: Annotated[
        str, typer.Argument(metavar="OWNER/NAME", help="The dataset on the hub; created if there is none.")
    ],
    *,
    private: Annotated[bool, typer.Option("--private", help="Create it private.")] = False,
    revision: Annotated[str | None, typer.Option(metavar="NAME", help="The branch. [default: main]")] = None,
    with_text: Annotated[bool, typer.Option("--with-text", help="Also if it holds text or token ids.")] = False,
) -> None:
    """Verify a dataset and upload it to the Hugging Face hub."""
    from attlas.extract.printable import printable
    from attlas.flows.push import push as push_dataset

    def show(stage: str) -> None:
        typer.echo({"verify": f"verifying {printable(dataset)}", "upload": f"uploading to {name}"}[stage], err=True)

    address = push_dataset(dataset, name, private=private, revision=revision, with_text=with_text, progress=show)
    _show_paths(pushed=address)


@app.command()
def redact(
    dataset: Dataset,
    *,
    tokens: Annotated[
        str, typer.Option(metavar="none|classes|ids", help="What to keep about the tokens; less than now, as of run.")
    ],
) -> None:
    """Remove text, token ids or all that rests on token classes from a finished dataset, and its report."""
    from attlas.extract.redact import MODES
    from attlas.extract.redact import redact as redact_dataset

    changed = redact_dataset(dataset, tokens=_output_format(tokens, MODES, option="--tokens"))
    typer.echo(
        f"written anew: {', '.join(changed)}" if changed else f"nothing to remove: the dataset has --tokens {tokens}"
    )


@app.command()
def stats(
    name: Annotated[
        str | None,
        typer.Argument(
            metavar="NAME", help="A column, TABLE.COLUMN, a table, or a .py file of your own. [default: all]"
        ),
    ] = None,
    *,
    form: Annotated[str, typer.Option("--format", metavar="text|json", help="The output format.")] = "text",
) -> None:
    """Show the catalogue of columns: formula, unit, bounds, known values, cost, reference and an example query."""
    from attlas.extract.tables import TABLES
    from attlas.flows.catalogue import show_catalogue

    show_catalogue(name, list(TABLES.values()), form=form)


@app.command()
def view(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="demo, a folder, a hub name or file.py:function.")],
    text: Annotated[str | None, typer.Argument(metavar="TEXT", help="The text to show.")] = None,
    *,
    file: Annotated[Path | None, typer.Option(metavar="FILE", help="A file of one text, instead of TEXT.")] = None,
    image: Annotated[Path | None, typer.Option(metavar="FILE", help="An image, for a vision model.")] = None,
    out: Annotated[
        Path | None, typer.Option(metavar="FILE", help=f"The page to write. [default: {DEFAULT_PAGE}]")
    ] = None,
    max_length: Annotated[int | None, typer.Option(metavar="N", help="The most tokens, special ones included.")] = None,
    stacks: Annotated[
        str, typer.Option(metavar="encoder|all", help="What to show of an encoder–decoder model.")
    ] = "encoder",
    dtype: Annotated[str, typer.Option(metavar="NAME", help="As of run.")] = "auto",
    device: Annotated[str, typer.Option(metavar="NAME", help="As of run.")] = "auto",
    revision: Annotated[str | None, typer.Option(metavar="NAME", help="As of run.")] = None,
    trust_remote_code: Annotated[bool, typer.Option("--trust-remote-code", help="As of run.")] = False,
) -> None:
    """Write one input and every head of a model as one self-contained HTML page to look at."""
    from attlas.flows.viewing import refuse_bad_view, refuse_foreign_page

    refuse_bad_view(model, text=text, file=file, image=image, stacks=stacks)
    if out is None:
        refuse_foreign_page(Path(DEFAULT_PAGE))
    _quiet_loading(model)
    from attlas.analysis.output import answer_file, write_whole
    from attlas.extract.view import view_named

    page = out or Path(DEFAULT_PAGE)
    with answer_file(page, option="--out") as stream:
        shown = view_named(
            model,
            text,
            file=file,
            image=image,
            max_length=max_length,
            stacks="all" if stacks == "all" else "encoder",
            device=device,
            dtype=dtype,
            revision=revision,
            trust_remote_code=trust_remote_code,
        )
        write_whole([shown.page], stream)
    _show_paths(view=page)


@app.command()
def doctor(
    out: Annotated[
        str | None,
        typer.Argument(metavar="[OUT]", help="Where datasets are to go: a folder, or the URL of an object store."),
    ] = None,
    *,
    form: Annotated[str, typer.Option("--format", metavar="text|json", help="The output format.")] = "text",
) -> None:
    """Check this machine, the installed versions, the output and the Prefect server, and say what to do (exit code 3)."""
    from attlas.flows.doctor import FORMATS, check_all, write_checks

    chosen = _output_format(form, FORMATS)
    checks = list(check_all(out))
    write_checks(checks, chosen, sys.stdout)
    if any(check.state == "problem" for check in checks):
        raise typer.Exit(FINDING)


@app.command()
def serve(
    run_file: Annotated[
        Path, typer.Argument(metavar="RUN.toml", help="The run file; each run gets its own folder in its --out.")
    ],
    *,
    cron: Annotated[
        str | None, typer.Option(metavar="EXPR", help="The schedule as five cron fields, such as '0 2 * * *'.")
    ] = None,
    interval: Annotated[float | None, typer.Option(metavar="SECONDS", help="The time between runs.")] = None,
    timezone: Annotated[
        str | None, typer.Option(metavar="ZONE", help="The time zone of --cron. [default: UTC]")
    ] = None,
    keep: Annotated[
        int | None, typer.Option(metavar="N", help="Delete all but the newest N datasets. [default: keep all]")
    ] = None,
) -> None:
    """Schedule a run with Prefect and execute it, until stopped. A time at which nothing has changed is skipped."""
    ignore_closed_pipe()
    read_run(run_file, {})
    _refuse_keep(keep)
    _prepare_for_prefect()
    _serve(run_file, cron=cron, interval=interval, timezone=timezone, keep=keep)


def _refuse_keep(keep: int | None) -> None:
    if keep is not None and keep < 1:
        raise Refusal(f"--keep must be at least 1 dataset; got {keep}; leave it out to keep all")


def _serve(
    run_file: Path,
    *,
    cron: str | None,
    interval: float | None,
    timezone: str | None,
    keep: int | None,
    watch: Any = None,
) -> None:
    from attlas.flows.deploy import schedule_of, serve

    schedule = schedule_of(cron=cron, interval=interval, timezone=timezone)
    when = f"at {cron!r}, {timezone or 'UTC'}" if cron else f"every {interval:g} s"
    typer.echo(f"serving {run_file} {when}; stop with Ctrl-C", err=True)
    serve(run_file, schedule, keep=keep, watch=watch)


@app.command()
def watch(
    run_file: Annotated[
        Path, typer.Argument(metavar="RUN.toml", help="The run file; its --out is the folder of all nights.")
    ],
    *,
    baseline: Annotated[
        str | None,
        typer.Option(
            metavar="DIR[@GENERATION]",
            help="The dataset to compare with, from now on. [default: that of the last time]",
        ),
    ] = None,
    accept: Annotated[bool, typer.Option("--accept", help="Make this night the baseline of the next ones.")] = False,
    columns: Annotated[str | None, typer.Option(metavar="NAME,…", help="As of compare.")] = None,
    margin: Annotated[list[str] | None, typer.Option(metavar="COLUMN=VALUE", help="As of compare.")] = None,
    alpha: Annotated[float, typer.Option(metavar="P", help="As of compare.")] = 0.05,
    alert: Annotated[
        list[str] | None,
        typer.Option(
            metavar="FILE|webhook:VARIABLE|prefect",
            help="Where alerts go, each once: JSON lines in a file, a POST to the address in an environment variable, an event.",
        ),
    ] = None,
    night: Annotated[str | None, typer.Option(metavar="TIME", help="Measure for a past night. [default: now]")] = None,
    fail_on: FailOnDrift = None,
    keep: Annotated[
        int | None, typer.Option(metavar="N", help="Delete all but the newest N datasets. [default: keep all]")
    ] = None,
    cron: Annotated[str | None, typer.Option(metavar="EXPR", help="Do so on a schedule, as of serve.")] = None,
    interval: Annotated[float | None, typer.Option(metavar="SECONDS", help="The same.")] = None,
    timezone: Annotated[str | None, typer.Option(metavar="ZONE", help="Of --cron.")] = None,
) -> None:
    """Measure what is new, compare it with a baseline, and alert on what has changed; once, or on a schedule."""
    ignore_closed_pipe()
    _refuse_other_failure(fail_on)
    from attlas.flows.watching import Watch

    read_run(run_file, {})
    _refuse_keep(keep)
    names = _names(columns)
    settings = Watch(
        baseline=_absolute(baseline),
        accept=accept,
        columns=None if names is None else tuple(names),
        margins=tuple(margin or ()),
        alpha=alpha,
        alerts=tuple(alert or ()),
    )
    if cron is not None or interval is not None:
        _prepare_for_prefect()
        _serve(run_file, cron=cron, interval=interval, timezone=timezone, keep=keep, watch=settings)
        return
    from attlas.flows.nightly import watch_once

    found = watch_once(run_file, settings, night=night, keep=keep, measure=_measure)
    for problem in found.problems:
        typer.echo(f"attlas: {problem}", err=True)
    typer.echo(found.message)
    if found.page is not None:
        _show_paths(page=found.page)
    if fail_on and found.has_drift:
        raise typer.Exit(FINDING)


def _absolute(location: str | None) -> str | None:
    """A local path that means the same wherever a scheduled run is started; a URL as it is."""
    return location if location is None or is_url(location) else str(Path(location).absolute())


def _show_summary(dataset: Place) -> None:
    from attlas.analysis.columns import console_for
    from attlas.flows.analyze import written_report

    console_for(sys.stdout).print(written_report(dataset).terminal(), crop=False)


def _show_paths(**places: Path | str) -> None:
    from attlas.extract.printable import printable

    for what, path in places.items():
        typer.echo(f"{what:<7}  {printable(path)}")


if __name__ == "__main__":
    main()
