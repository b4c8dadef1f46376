"""A user's own model, named as `file.py:function`. Naming it is the consent to run it; code in a folder never runs."""

from __future__ import annotations

import ast
import difflib
import hashlib
import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from attlas.extract.errors import Refusal, first_line
from attlas.extract.python_files import failing_line, import_file, importable

if TYPE_CHECKING:
    from torch import nn

# by modality: what comes with the model, then the inputs that its forward must accept
_REQUIRED = {"texts": ("tokenizer", "input_ids", "attention_mask"), "images": ("processor", "pixel_values")}


@dataclass(frozen=True)
class UserModel:
    """What a user's function returned, and the SHA-256 of its file."""

    model: nn.Module
    reader: Any  # the tokenizer or image processor
    digest: str


def is_user_code(name: str) -> bool:
    """Whether a model's name is that of a Python file, with or without a function."""
    return (name.endswith(".py") or ".py:" in name) and not Path(name).is_dir()


def display_name(name: str) -> str:
    """The name without folders: `module.py:build` for `some/where/module.py:build`."""
    file, function = _file_and_function(name)
    return f"{file.name}:{function}"


def check_user_code(name: str) -> None:
    """Raise Refusal for a missing file, a syntax error or a missing function. The file does not run."""
    file, function = _file_and_function(name)
    if not file.is_file():
        raise Refusal(f"a model of your own is named file.py:function; there is no file {file}; check the path")
    try:
        tree = ast.parse(file.read_bytes(), str(file))
    except (SyntaxError, ValueError) as error:
        line = f", line {error.lineno}" if isinstance(error, SyntaxError) else ""
        raise Refusal(
            f"a model of your own must be valid Python; {file}{line}: {first_line(error)}; fix that line"
        ) from error
    names = set(_defined_names(tree))
    if function in names or "*" in names:
        return
    functions = [n.name for n in tree.body if isinstance(n, ast.FunctionDef)]
    near = difflib.get_close_matches(function, sorted(names), n=1) or functions
    hint = f"did you mean {near[0]}?" if near else "define it there"
    raise Refusal(f"a model of your own is named file.py:function; {file} defines no {function!r}; {hint}")


def build_user_model(name: str, *, modality: str) -> UserModel:
    """Run the file and its function, with torch's random seed set to 0. Raises Refusal.

    The function returns a module, or (module, tokenizer), or for images (module, processor). A module returned by itself
    has the tokenizer or processor as an attribute of that name.
    """
    import torch

    check_user_code(name)
    file, function = _file_and_function(name)
    with importable(file.parent), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        result = _call(file, function)
    model, reader = result if isinstance(result, tuple) and len(result) == 2 else (result, None)
    if not isinstance(model, torch.nn.Module):
        raise Refusal(
            f"{function} must return a torch module, or (module, tokenizer); that of {file} returned "
            f"{_description(result)}; return one of them"
        )
    _check_signature(name, model, modality)
    reader = getattr(model, _REQUIRED[modality][0], None) if reader is None else reader
    return UserModel(model, _checked_reader(name, reader, modality), hashlib.sha256(file.read_bytes()).hexdigest())


def check_forward_pass(name: str, model: nn.Module, largest_id: int) -> None:
    """Run the module on one token, the tokenizer's largest id, and raise Refusal if it fails."""
    import torch

    from attlas.extract.capture.compiled import compilation_disabled

    ids = torch.tensor([[largest_id]])
    fast_path = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)  # as in a measurement
    with torch.inference_mode():
        try:
            with compilation_disabled():
                model(input_ids=ids, attention_mask=torch.ones_like(ids))
        except IndexError as error:
            raise Refusal(
                f"the model's embedding table must have a row for every id of the tokenizer; the module of {name} has no "
                f"row for {largest_id}, the largest id ({first_line(error)}); enlarge the table"
            ) from error
        except Exception as error:
            _refuse_failure(_file_and_function(name)[0], error)
        finally:
            torch.backends.mha.set_fastpath_enabled(fast_path)


def _file_and_function(name: str) -> tuple[Path, str]:
    file, _, function = name.rpartition(".py")
    if not function.startswith(":") or not function[1:].isidentifier():
        raise Refusal(
            f"a model of your own is named file.py:function, and the function returns the module; got {name}; "
            "add the function's name, such as :build"
        )
    return Path(f"{file}.py").expanduser(), function[1:]


def _defined_names(tree: ast.Module) -> Iterator[str]:
    """Names that the module may define at its top level; `*` if a star import may define any."""
    for node in ast.walk(tree):
        match node:
            case ast.FunctionDef(name=name) | ast.ClassDef(name=name):
                yield name
            case ast.Import(names=aliases) | ast.ImportFrom(names=aliases):
                yield from (a.asname or a.name for a in aliases)
            case ast.Name(id=name, ctx=ast.Store()):
                yield name


def _call(file: Path, function: str) -> Any:
    try:
        return getattr(import_file(file, prefix="attlas_model"), function)()
    except (Exception, SystemExit) as error:
        _refuse_failure(file, error)


def _refuse_failure(file: Path, error: BaseException) -> NoReturn:
    """Raise Refusal with the line of the user's file that failed, and the error."""
    raise Refusal(
        f"a model of your own must build and run; {file}{failing_line(file, error)}: {type(error).__name__}: {first_line(error)}; fix that line"
    ) from error


def _check_signature(name: str, model: nn.Module, modality: str) -> None:
    parameters = inspect.signature(model.forward).parameters
    if any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        return
    required = _REQUIRED[modality][1:]
    if not set(required) <= set(parameters):
        signature = ", ".join(str(p) for p in parameters.values())
        raise Refusal(
            f"a model's forward must accept {' and '.join(required)}; the module of {name} has forward({signature}); "
            "wrap it in a module that accepts these names"
        )


def _checked_reader(name: str, reader: Any, modality: str) -> Any:
    """The tokenizer as a transformers tokenizer; an image processor as it is."""
    kind = _REQUIRED[modality][0]
    if reader is None:
        raise Refusal(
            f"a run over {modality} needs a {kind}; {name} returned a module without one; "
            f"return (module, {kind}), or set the module's attribute {kind}"
        )
    if modality == "images":
        return reader
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

    if isinstance(reader, Tokenizer):
        return PreTrainedTokenizerFast(tokenizer_object=reader)
    if not isinstance(reader, PreTrainedTokenizerBase):
        raise Refusal(
            f"a tokenizer must be one of transformers or tokenizers; {name} returned {_description(reader)}; "
            "wrap it with PreTrainedTokenizerFast(tokenizer_object=…)"
        )
    return reader


def _description(value: Any) -> str:
    if isinstance(value, tuple):
        return f"a tuple of {len(value)}: {', '.join(type(v).__name__ for v in value)}"
    return "None" if value is None else f"an object of type {type(value).__name__}"
