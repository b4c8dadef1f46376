"""The options of a run, defined once for the run file and the command line."""

import difflib
import os
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args

from pydantic import BaseModel, BeforeValidator, Field, PlainValidator, ValidationError, field_validator

from attlas.extract.errors import Refusal
from attlas.extract.python_files import is_python_file
from attlas.extract.urls import is_url
from attlas.flows.places import Place, name_of_place, normalized_path, place_named

if TYPE_CHECKING:
    from pydantic_core import ErrorDetails

    from attlas.extract.card import Card
    from attlas.extract.options import RunOptions

# options that only the run file has
FILE_ONLY = ("card",)
BUILT_IN = ("demo", "random-repeats", "needle")

# strict, so that TOML's `true` and a quoted "3" are not valid counts
Count = Annotated[int, Field(strict=True, ge=1)]
Switch = Annotated[bool, Field(strict=True)]


def _readable(name: Any) -> Any:
    """The name as valid text, which Prefect requires; names from the command line may not be."""
    if not isinstance(name, str) or name.isascii():
        return name
    try:
        name.encode()
    except UnicodeEncodeError:
        from attlas.extract.corpus.names import readable_name

        return readable_name(name)
    return name


def _unescaped_tab(delimiter: Any) -> Any:
    return "\t" if delimiter == r"\t" else delimiter  # shells do not expand it


class CardSettings(BaseModel, frozen=True, extra="forbid"):
    """What the run file says of the dataset in its table [card]."""

    license: Annotated[str, Field(strict=True)] | None = None
    language: Annotated[str, Field(strict=True)] | tuple[Annotated[str, Field(strict=True)], ...] | None = None
    source: Annotated[str, Field(strict=True)] | None = None

    def card(self) -> "Card":
        """The same for `attlas.extract`. Raises Refusal for a value that the hub does not take."""
        from attlas.extract.card import Card

        languages = self.language or ()
        codes = tuple(code.strip() for code in languages.split(",")) if isinstance(languages, str) else languages
        return Card(license=self.license, language=codes, source=self.source)


class Run(BaseModel, frozen=True, extra="forbid", hide_input_in_errors=True):
    """The options of one run. The description of a field is its help text."""

    model: Annotated[str, Field(min_length=1, description="a folder, a hub name, file.py:function, or demo")]
    corpus: Annotated[
        str,
        BeforeValidator(_readable),
        Field(
            min_length=1,
            description="a text, JSONL, CSV, Parquet or image file, a folder or glob of them, the same in an object store (s3://…), hub:NAME, demo, random-repeats or needle",
        ),
    ]
    out: Annotated[
        Place,
        PlainValidator(place_named, json_schema_input_type=str),
        Field(
            description="the folder for the dataset, or a URL such as s3://bucket/folder: new, empty, or with this same run"
        ),
    ]
    max_length: Annotated[
        Count | None,
        Field(
            description="maximum tokens in a sequence, including special ones; the model's own by default, at most 512"
        ),
    ] = None
    stride: Annotated[
        int, Field(strict=True, ge=0, description="tokens by which the windows of a document overlap")
    ] = 0
    limit: Annotated[Count | None, Field(description="maximum number of documents to measure")] = None
    tokens: Annotated[
        Literal["none", "classes", "ids", "text"],
        Field(description="what the dataset contains about the tokens; only ids and text reveal the corpus"),
    ] = "classes"
    statistics: Annotated[
        str,
        Field(
            min_length=1,
            description="what to measure: core, all, or besides the core names of columns and tables and .py files with columns of "
            "your own, separated by commas",
        ),
    ] = "core"
    ablate: Annotated[
        str | None,
        Field(
            min_length=1,
            description="measure the table ablations: what changes without heads, attention or mlp (all three by default), each set "
            "to zero (by default) or to its mean over the sample, separated by commas",
        ),
    ] = None
    sample: Annotated[
        Count, Field(description="sequences of each shard for which statistics that need whole rows are measured")
    ] = 8
    edges: Annotated[Count, Field(description="strongest keys of each query that the table edges has")] = 8
    stacks: Annotated[
        Literal["encoder", "all"],
        Field(
            description="the stacks of an encoder–decoder model to measure; all: with the same tokens for the decoder"
        ),
    ] = "encoder"
    seed: Annotated[
        int | None,
        Field(strict=True, ge=0, description="of random-repeats and needle: which documents are made; 0 by default"),
    ] = None
    blocks: Annotated[
        Count | None,
        Field(
            description="of random-repeats: documents, 64 by default; of needle: documents at each depth, 8 by default"
        ),
    ] = None
    length: Annotated[
        Count | None,
        Field(
            description="of random-repeats: tokens of a block, 64 by default; of needle: tokens of a haystack, 256 by default"
        ),
    ] = None
    depths: Annotated[
        str | None,
        Field(
            min_length=1,
            description="of needle: where the needles are, in percent, separated by commas; 0,25,50,75,100 by default",
        ),
    ] = None
    text_column: Annotated[
        str,
        Field(min_length=1, description="the column or key with a document's text; meta.text for a nested one"),
    ] = "text"
    unit: Annotated[
        Literal["document", "paragraph", "line"], Field(description="the unit of a text file that becomes one document")
    ] = "document"
    delimiter: Annotated[
        str | None,
        BeforeValidator(_unescaped_tab),
        Field(description="the field separator of CSV and TSV; a comma and a tab by default"),
    ] = None
    encoding: Annotated[
        str,
        Field(description="of text, JSONL and CSV, such as utf-16 or cp1252; auto: by the byte order mark, else UTF-8"),
    ] = "auto"
    max_document_bytes: Annotated[
        Count, Field(description="the largest document; longer ones are dropped, and files with longer lines refused")
    ] = 1 << 26
    shard_sequences: Annotated[Count, Field(description="sequences in a shard, the unit of work and of resumption")] = (
        256
    )
    batch_tokens: Annotated[
        Count | None,
        Field(description="maximum tokens in a batch, including padding; chosen for the device by default"),
    ] = None
    dtype: Annotated[
        Literal["auto", "float32", "float16", "bfloat16"], Field(description="the precision of the model")
    ] = "auto"
    device: Annotated[str, Field(min_length=1, description="auto, cpu, cuda or cuda:N")] = "auto"
    engine: Annotated[
        str,
        Field(
            min_length=1,
            description="the engine for the statistics: cpu, triton (on CUDA), or reference, which runs everywhere",
        ),
    ] = "auto"
    digest_key: Annotated[
        Path | None,
        Field(description="a file with the secret for document digests; without it, documents have no digest"),
    ] = None
    strict: Annotated[Switch, Field(description="stop at the first invalid document instead of dropping it")] = False
    trust_remote_code: Annotated[Switch, Field(description="run the Python code that comes with the model")] = False
    revision: Annotated[str | None, Field(min_length=1, description="the hub revision of the model")] = None
    card: Annotated[
        CardSettings | None, Field(description="license, language and source of the dataset, for its card")
    ] = None

    def options(self) -> "RunOptions":
        """The options for `attlas.extract.run`."""
        from attlas.extract.options import RunOptions

        card = None if self.card is None else self.card.card()
        return RunOptions(**{**self.model_dump(), "corpus": self.corpus_to_open, "card": card})

    @property
    def corpus_to_open(self) -> str:
        """The corpus by its name in the file system, which is not always valid text."""
        if os.path.lexists(self.corpus):
            return self.corpus
        from attlas.extract.corpus.names import real_name

        return real_name(self.corpus)

    @property
    def name(self) -> str:
        """The last part of the output's name."""
        return name_of_place(self.out)

    @field_validator("digest_key")
    @classmethod
    def _normalized(cls, path: Path | None) -> Path | None:
        return path if path is None else normalized_path(path)


def read_run(file: Path | None, options: Mapping[str, Any]) -> Run:
    """Read a run file, with the options of the command line taking precedence.

    Relative paths in the file are relative to its folder; those on the command line, to the current folder.
    """
    values = {} if file is None else _file_values(file)
    overrides = {name: value for name, value in options.items() if value is not None}
    return validate_run({**values, **overrides}, where=str(file) if file else "the command line")


def validate_run(values: Mapping[str, Any], *, where: str) -> Run:
    """Validate the values of a run. Raises Refusal with a message for each invalid one."""
    try:
        run = Run.model_validate(dict(values))
    except ValidationError as error:
        messages = dict.fromkeys(_message(detail, where=where) for detail in error.errors())
        raise Refusal("; ".join(messages)) from None
    if run.card is not None:
        run.card.card()  # raises Refusal
    return run


def _file_values(file: Path) -> dict[str, Any]:
    try:
        values = tomllib.loads(file.read_text("utf-8"))
    except FileNotFoundError:
        raise Refusal(f"a run file is a TOML file; there is none at {file}; check the path") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise Refusal(f"a run file must be valid TOML; {file} is not: {error}; correct it") from None
    except OSError as error:
        raise Refusal(f"a run file must be a readable file; {file}: {error.strerror}; check the path") from None
    return {name: _relative_to_run_file(name, value, file.parent) for name, value in values.items()}


def _relative_to_run_file(name: str, value: Any, folder: Path) -> Any:
    """The value, resolved against the run file's folder if it is a path."""
    if not isinstance(value, str) or (name in ("out", "corpus") and is_url(value)):
        return value
    if name == "statistics":
        return ",".join(
            str(folder / Path(n.strip()).expanduser()) if is_python_file(n) else n for n in value.split(",")
        )
    path = folder / Path(value).expanduser()
    if name in ("out", "digest_key"):
        return str(path)
    if name == "corpus" and value not in BUILT_IN and not value.startswith("hub:"):
        return str(path)
    # a hub name can look like a relative path; it is a path if it starts like one, exists, or names a Python file
    looks_like_path = value.startswith(("./", "../", "~")) or path.is_dir() or ".py:" in value
    if name == "model" and value not in BUILT_IN and looks_like_path:
        return str(path)
    return value


def _message(detail: "ErrorDetails", *, where: str) -> str:
    name, value, context = str(detail["loc"][0]), detail["input"], detail.get("ctx", {})
    if isinstance(context.get("error"), Refusal):
        return str(context["error"])
    if name == "card":
        given = f"{detail['loc'][1]} = {value!r}" if len(detail["loc"]) > 1 else repr(value)
        return f"[card] has license, language and source, each a text (language also a list); {where} has {given}; correct it"
    match detail["type"]:
        case "extra_forbidden":
            return f"{where} has no option {name!r}; {_suggestion(name)}"
        case "missing":
            meaning = Run.model_fields[name].description
            return f"a run needs --{name}: {meaning}; it is missing; add it, or set {name} in the run file"
        case "greater_than_equal":
            return f"{name} must be at least {context['ge']}; got {value}; use a larger number"
        case "literal_error":
            return f"{name} must be one of {', '.join(choices(name))}; got {value!r}; choose one of them"
        case "int_type":
            return f"{name} must be a whole number; got {value!r}; write it without quotes or fraction"
        case "bool_type":
            return f"{name} must be true or false; got {value!r}; write it without quotes"
        case _:
            return f"{name}: {detail['msg']}; got {value!r}; see attlas run --help"


def _suggestion(name: str) -> str:
    near = difflib.get_close_matches(name.replace("-", "_"), Run.model_fields, n=1, cutoff=0.5)
    return f"did you mean {near[0]!r}?" if near else f"the options are {', '.join(Run.model_fields)}"


def choices(name: str) -> tuple[str, ...]:
    """The allowed values of an option with a fixed set of them; empty for any other."""
    values = get_args(Run.model_fields[name].annotation)
    return values if values and all(isinstance(v, str) for v in values) else ()
