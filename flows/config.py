"""The run: every option of a measurement, once. The run file and the command line are both made from it."""

import difflib
import os
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args

from pydantic import BaseModel, BeforeValidator, Field, ValidationError, field_validator

from extract.errors import Refusal

if TYPE_CHECKING:
    from pydantic_core import ErrorDetails

    from extract.pipeline import RunOptions

BUILT_IN = ("demo", "random-repeats")

# strict: TOML's `true` is no count, and a quoted "3" is no number
Count = Annotated[int, Field(strict=True, ge=1)]
Switch = Annotated[bool, Field(strict=True)]


def _readable(name: Any) -> Any:
    """A name that is valid text, as all that Prefect keeps must be; the command line may give others."""
    if not isinstance(name, str) or name.isascii():
        return name
    try:
        name.encode()
    except UnicodeEncodeError:
        from extract.corpus.names import readable_name

        return readable_name(name)
    return name


def _unescaped_tab(delimiter: Any) -> Any:
    return "\t" if delimiter == r"\t" else delimiter  # a shell leaves it as it is typed


class Run(BaseModel, frozen=True, extra="forbid"):
    """One measurement: a corpus, a model, a folder, and how. A field's description is its help text."""

    model: Annotated[str, Field(min_length=1, description="a folder, a hub name, file.py:function, or demo")]
    corpus: Annotated[
        str,
        BeforeValidator(_readable),
        Field(
            min_length=1,
            description="a text, JSONL, CSV or Parquet file or an image, a folder or glob of them, hub:NAME, or demo",
        ),
    ]
    out: Annotated[Path, Field(description="the dataset's folder: new, empty, or holding this same run")]
    max_length: Annotated[
        Count | None,
        Field(description="tokens in a sequence, special ones included; if unset the model's own, at most 512"),
    ] = None
    stride: Annotated[
        int, Field(strict=True, ge=0, description="tokens by which the windows of a document overlap")
    ] = 0
    limit: Annotated[Count | None, Field(description="measure only the first so many documents")] = None
    tokens: Annotated[
        Literal["none", "classes", "ids", "text"],
        Field(description="what the dataset may tell of the tokens; only ids and text reveal the corpus"),
    ] = "classes"
    stacks: Annotated[
        Literal["encoder", "all"],
        Field(
            description="of an encoder–decoder model: its encoder alone, or all of it, the decoder fed the same tokens"
        ),
    ] = "encoder"
    text_column: Annotated[
        str,
        Field(
            min_length=1, description="the column or key that holds a document's text; meta.text for one inside another"
        ),
    ] = "text"
    unit: Annotated[
        Literal["document", "paragraph", "line"], Field(description="what of a text file is one document")
    ] = "document"
    delimiter: Annotated[
        str | None,
        BeforeValidator(_unescaped_tab),
        Field(description="what separates the fields of CSV and TSV; a comma and a tab if unset"),
    ] = None
    encoding: Annotated[
        str,
        Field(description="of text, JSONL and CSV, such as utf-16 or cp1252; auto: a byte order mark's, else UTF-8"),
    ] = "auto"
    shard_sequences: Annotated[Count, Field(description="sequences in a shard, the unit of work and of resumption")] = (
        256
    )
    batch_tokens: Annotated[
        Count | None, Field(description="padded tokens in a batch at most; chosen for the device if unset")
    ] = None
    dtype: Annotated[
        Literal["auto", "float32", "float16", "bfloat16"], Field(description="in which precision the model runs")
    ] = "auto"
    device: Annotated[str, Field(min_length=1, description="auto, cpu, cuda or cuda:N")] = "auto"
    engine: Annotated[
        str,
        Field(
            min_length=1,
            description="what computes the statistics: cpu, triton (on CUDA) or reference, which runs everywhere",
        ),
    ] = "auto"
    digest_key: Annotated[
        Path | None, Field(description="a file with the secret for document digests; without it there are none")
    ] = None
    strict: Annotated[Switch, Field(description="end the run at the first bad document instead of dropping it")] = False
    trust_remote_code: Annotated[Switch, Field(description="run the Python code that comes with the model")] = False
    revision: Annotated[str | None, Field(min_length=1, description="the hub revision of the model")] = None

    def options(self) -> "RunOptions":
        """The same run, as extraction takes it."""
        from extract.pipeline import RunOptions

        return RunOptions(**{**self.model_dump(), "corpus": self.corpus_to_open})

    @property
    def corpus_to_open(self) -> str:
        """The corpus as the file system knows it: `corpus` is readable even where a file's name is no valid text."""
        if os.path.lexists(self.corpus):
            return self.corpus
        from extract.corpus.names import real_name

        return real_name(self.corpus)

    @field_validator("out", "digest_key")
    @classmethod
    def _without_detours(cls, path: Path | None) -> Path | None:
        return path if path is None else without_detours(path)


def without_detours(path: Path) -> Path:
    """The same place without `..`, unless a symbolic link makes `a/..` something else than nothing."""
    plain = Path(os.path.normpath(path))
    try:
        return plain if plain.resolve() == path.resolve() else path
    except (OSError, RuntimeError):  # a loop of links, say: refused where it is opened
        return path


def read_run(file: Path | None, given: Mapping[str, Any]) -> Run:
    """The run that a run file describes, with what was given on the command line put over it.

    Relative paths in the file are relative to the file's folder, those given to the current one.
    """
    values = {} if file is None else _values_of(file)
    given = {name: value for name, value in given.items() if value is not None}
    return checked({**values, **given}, where=str(file) if file else "the command line")


def checked(values: Mapping[str, Any], *, where: str) -> Run:
    """A valid run, or a refusal that names each wrong value in plain words."""
    try:
        return Run.model_validate(dict(values))
    except ValidationError as error:
        complaints = "; ".join(_complaint(detail, where=where) for detail in error.errors())
        raise Refusal(complaints) from None


def _values_of(file: Path) -> dict[str, Any]:
    try:
        values = tomllib.loads(file.read_text("utf-8"))
    except FileNotFoundError:
        raise Refusal(f"a run file is a TOML file; there is none at {file}; check the path") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise Refusal(f"a run file is TOML; {file} is not: {error}; mend that place") from None
    except OSError as error:
        raise Refusal(f"a run file is a readable TOML file; {file}: {error.strerror}; check the path") from None
    return {name: _located(name, value, file.parent) for name, value in values.items()}


def _located(name: str, value: Any, folder: Path) -> Any:
    """The value, where it is a relative path, seen from the current folder instead of the run file's."""
    if not isinstance(value, str):
        return value
    there = folder / Path(value).expanduser()
    if name in ("out", "digest_key"):
        return str(there)
    if name == "corpus" and value not in BUILT_IN and not value.startswith("hub:"):
        return str(there)
    # a model's name may look like a path: it is one where it says so, where the folder is there, or where it names code
    looks_like_path = value.startswith(("./", "../", "~")) or there.is_dir() or ".py:" in value
    if name == "model" and value not in BUILT_IN and looks_like_path:
        return str(there)
    return value


def _complaint(detail: "ErrorDetails", *, where: str) -> str:
    name, came, facts = str(detail["loc"][0]), detail["input"], detail.get("ctx", {})
    match detail["type"]:
        case "extra_forbidden":
            return f"{where} has no option {name!r}; {_nearest(name)}"
        case "missing":
            meaning = Run.model_fields[name].description
            return f"a run needs --{name}: {meaning}; none came; give it, or set {name} in the run file"
        case "greater_than_equal":
            return f"{name} must be at least {facts['ge']}; got {came}; give a number from {facts['ge']} on"
        case "literal_error":
            return f"{name} must be one of {', '.join(choices(name))}; got {came!r}; choose one of them"
        case "int_type":
            return f"{name} must be a whole number; got {came!r}; write it without quotes or fraction"
        case "bool_type":
            return f"{name} must be true or false; got {came!r}; write it without quotes"
        case _:
            return f"{name}: {detail['msg']}; got {came!r}; see attlas run --help"


def _nearest(name: str) -> str:
    near = difflib.get_close_matches(name.replace("-", "_"), Run.model_fields, n=1, cutoff=0.5)
    return f"did you mean {near[0]!r}?" if near else f"the options are {', '.join(Run.model_fields)}"


def choices(name: str) -> tuple[str, ...]:
    """The values that an option of few values allows; none for any other."""
    values = get_args(Run.model_fields[name].annotation)
    return values if values and all(isinstance(v, str) for v in values) else ()
