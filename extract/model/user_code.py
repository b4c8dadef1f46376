"""A user's own encoder: `file.py:function`. The name itself asks for the code to run; no folder's code ever does."""

from __future__ import annotations

import ast
import difflib
import hashlib
import importlib.util
import inspect
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from extract.errors import Refusal, first_line

if TYPE_CHECKING:
    from torch import nn

_READS = {"texts": ("tokenizer", "input_ids", "attention_mask"), "images": ("processor", "pixel_values")}


@dataclass(frozen=True)
class Built:
    """What a user's function returned, and the SHA-256 of the file that it is in."""

    model: nn.Module
    reader: Any  # the tokenizer, or the preprocessor of images
    digest: str


def is_model_code(name: str) -> bool:
    return (name.endswith(".py") or ".py:" in name) and not Path(name).is_dir()


def shown_name(name: str) -> str:
    """`module.py:build` of `some/where/module.py:build`."""
    file, function = _parts(name)
    return f"{file.name}:{function}"


def check_model_code(name: str) -> None:
    """Refuse, without running it, a file that is missing, is no Python, or has no such function."""
    file, function = _parts(name)
    if not file.is_file():
        raise Refusal(f"a model of your own is file.py:function; there is no file {file}; check the path")
    try:
        tree = ast.parse(file.read_bytes(), str(file))
    except (SyntaxError, ValueError) as error:
        where = f", line {error.lineno}" if isinstance(error, SyntaxError) else ""
        raise Refusal(f"a model of your own is Python; {file}{where}: {first_line(error)}; mend that place") from error
    names = set(_defined(tree))
    if function in names or "*" in names:
        return
    functions = [n.name for n in tree.body if isinstance(n, ast.FunctionDef)]
    near = difflib.get_close_matches(function, sorted(names), n=1) or functions
    hint = f"did you mean {near[0]}?" if near else "define it there"
    raise Refusal(f"a model of your own is file.py:function; {file} defines no {function!r}; {hint}")


def build_model(name: str, *, reads: str) -> Built:
    """Run the file and its function; torch's random numbers begin at seed 0. Raises Refusal.

    The function returns a module, or (module, tokenizer) — for images (module, processor) —, or a module that has
    the tokenizer as an attribute of that name.
    """
    import torch

    check_model_code(name)
    file, function = _parts(name)
    with _importable(file.parent), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        made = _run(file, lambda: _called(_imported(file), function))
    model, reader = made if isinstance(made, tuple) and len(made) == 2 else (made, None)
    if not isinstance(model, torch.nn.Module):
        raise Refusal(
            f"{function} returns a torch module, or (module, tokenizer); that of {file} returned "
            f"{_described(made)}; return one of them"
        )
    _check_forward(name, model, reads)
    reader = getattr(model, _READS[reads][0], None) if reader is None else reader
    return Built(model, _reader(name, reader, reads), hashlib.sha256(file.read_bytes()).hexdigest())


def try_out(name: str, model: nn.Module, largest_id: int) -> None:
    """Give the module one token, the tokenizer's largest id, so that what can't work is refused before a run."""
    import torch

    from extract.capture.compiled import uncompiled

    ids = torch.tensor([[largest_id]])
    fused = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)  # as when it is measured
    with torch.inference_mode():
        try:
            with uncompiled():
                model(input_ids=ids, attention_mask=torch.ones_like(ids))
        except IndexError as error:
            raise Refusal(
                f"a tokenizer's ids are rows of the model's embedding table; the module of {name} has no row for "
                f"{largest_id}, the largest id of its tokenizer ({first_line(error)}); make the table larger"
            ) from error
        except Exception as error:
            _refuse_failed(_parts(name)[0], error)
        finally:
            torch.backends.mha.set_fastpath_enabled(fused)


def _parts(name: str) -> tuple[Path, str]:
    file, _, function = name.rpartition(".py")
    if not function.startswith(":") or not function[1:].isidentifier():
        raise Refusal(
            f"a model of your own is file.py:function, and the function returns the module; got {name}; "
            "add the function's name, such as :build"
        )
    return Path(f"{file}.py").expanduser(), function[1:]


def _defined(tree: ast.Module) -> Iterator[str]:
    """The names that a module's top level defines, inside conditions too; `*` where an import brings unknown ones."""
    for node in ast.walk(tree):
        match node:
            case ast.FunctionDef(name=name) | ast.ClassDef(name=name):
                yield name
            case ast.Import(names=aliases) | ast.ImportFrom(names=aliases):
                yield from (a.asname or a.name for a in aliases)
            case ast.Name(id=name, ctx=ast.Store()):
                yield name


@contextmanager
def _importable(folder: Path) -> Iterator[None]:
    """The file may import what lies beside it, as a script does."""
    before, sys.path = sys.path, [str(folder.resolve()), *sys.path]
    try:
        yield
    finally:
        sys.path = before


def _imported(file: Path) -> Any:
    spec = importlib.util.spec_from_file_location(f"attlas_model_{file.stem}", file)
    assert spec is not None and spec.loader is not None, "a .py file has a loader"
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses and pickles look their module up
    spec.loader.exec_module(module)
    return module


def _called(module: Any, function: str) -> Any:
    return getattr(module, function)()


def _run(file: Path, code: Callable[[], Any]) -> Any:
    try:
        return code()
    except (Exception, SystemExit) as error:
        _refuse_failed(file, error)


def _refuse_failed(file: Path, error: BaseException) -> NoReturn:
    """Say where in the user's file it failed, and how."""
    frames = traceback.extract_tb(error.__traceback__)
    lines = [f.lineno for f in frames if Path(f.filename).resolve() == file.resolve()]
    where = f", line {lines[-1]}" if lines else ""
    raise Refusal(
        f"a model of your own must build and run; {file}{where}: {type(error).__name__}: {first_line(error)}; mend that place"
    ) from error


def _check_forward(name: str, model: nn.Module, reads: str) -> None:
    parameters = inspect.signature(model.forward).parameters
    if any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        return
    needed = _READS[reads][1:]
    if not set(needed) <= set(parameters):
        signature = ", ".join(str(p) for p in parameters.values())
        raise Refusal(
            f"a run gives a model {' and '.join(needed)}; the module of {name} has forward({signature}); "
            "take them by these names, in a module around it"
        )


def _reader(name: str, reader: Any, reads: str) -> Any:
    """The tokenizer, as one of transformers; for images what makes pixels of them."""
    kind = _READS[reads][0]
    if reader is None:
        raise Refusal(
            f"a run over {reads} needs a {kind}; {name} gave a module without one; "
            f"return (module, {kind}), or set the module's attribute {kind}"
        )
    if reads == "images":
        return reader
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

    if isinstance(reader, Tokenizer):
        return PreTrainedTokenizerFast(tokenizer_object=reader)
    if not isinstance(reader, PreTrainedTokenizerBase):
        raise Refusal(
            f"a tokenizer is one of transformers or tokenizers; {name} gave {_described(reader)}; "
            "PreTrainedTokenizerFast(tokenizer_object=…) makes one"
        )
    return reader


def _described(value: Any) -> str:
    if isinstance(value, tuple):
        return f"a tuple of {len(value)}: {', '.join(type(v).__name__ for v in value)}"
    return "None" if value is None else f"a {type(value).__name__}"
