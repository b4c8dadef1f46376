"""The options of `attlas run`, derived from the fields of `Run`."""

import inspect
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import typer

from attlas.flows.config import FILE_ONLY, Run, choices
from attlas.flows.places import Place

_METAVARS = {int: "N", Path: "PATH"}


def with_run_options(command: Any) -> Any:
    """Give the command an option for each field of `Run` but those of the file alone; options that are not set leave the run file's values."""
    own = [p for p in inspect.signature(command).parameters.values() if p.kind is not inspect.Parameter.VAR_KEYWORD]
    options = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=_option(name))
        for name in Run.model_fields
        if name not in FILE_ONLY
    ]
    parameters = [*own, *options]
    command.__signature__ = inspect.Signature(parameters)
    command.__annotations__ = {p.name: p.annotation for p in parameters}
    return command


def _option(name: str) -> Any:
    field, flag = Run.model_fields[name], name.replace("_", "-")
    kind = _option_type(field.annotation)
    default = "" if field.is_required() or field.default in (None, False) else f" [default: {field.default}]"
    text = f"{field.description}{default}"
    if kind is bool:
        return Annotated[bool | None, typer.Option(f"--{flag}/--no-{flag}", help=text, show_default=False)]
    metavar = "|".join(choices(name)) or ("DIR|URL" if field.annotation == Place else _METAVARS.get(kind, "NAME"))
    return Annotated[kind | None, typer.Option(f"--{flag}", help=text, metavar=metavar, show_default=False)]


def _option_type(annotation: Any) -> type:
    """The type of a field's values, such as int for `Annotated[int, …] | None`; str for a literal and a place."""
    origin = get_origin(annotation)
    if origin is Literal or annotation == Place:  # `Run` validates them
        return str
    if origin in (Union, UnionType):
        return _option_type(next(a for a in get_args(annotation) if a is not type(None)))
    return _option_type(get_args(annotation)[0]) if origin is Annotated else annotation
