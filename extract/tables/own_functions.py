"""Call the functions of a user's file: exceptions and wrong shapes become refusals that name the function and its line."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np

from attlas.extract.engines.quantities import ROW_QUANTITIES
from attlas.extract.errors import Refusal, first_line
from attlas.extract.python_files import failing_line
from attlas.extract.tables.column import Column
from attlas.extract.tables.heads import HeadQuantities
from attlas.extract.tables.own import OwnRowQuantity

if TYPE_CHECKING:
    from attlas.extract.engines.block import Block


class _Given(HeadQuantities):
    """The quantities by the names that the user's file has for them; notes their shape."""

    def __init__(self, file: Path, own: Column[Any, Any], quantities: HeadQuantities, names: Mapping[str, str]) -> None:
        self._file, self._own, self._quantities, self._names = file, own, quantities, names
        self.shape: tuple[int, ...] | None = None

    def __getitem__(self, name: str) -> np.ndarray:
        if name not in self._names and not _is_quantity(name):
            near = difflib.get_close_matches(name, [*_quantity_names(), *self._names], n=3, cutoff=0.5)
            hint = f"did you mean {', '.join(near)}?" if near else f"some are {', '.join(_quantity_names()[:5])}"
            raise Refusal(
                f"{self._own.name} of {self._file.name} asks for the head quantity {name!r}; there is none; {hint}"
            )
        values = self._quantities[self._names.get(name, name)]
        self.shape = values.shape
        return values


def _quantity_names() -> list[str]:
    from attlas.extract.engines.sums import HEAD_QUANTITIES

    merged = (name for name, row in ROW_QUANTITIES.items() if row.merge is not None and ":" not in name)
    return sorted({*HEAD_QUANTITIES, *merged})


def _is_quantity(name: str) -> bool:
    from attlas.extract.engines.sums import HEAD_QUANTITIES

    return name in HEAD_QUANTITIES or (name in ROW_QUANTITIES and ROW_QUANTITIES[name].merge is not None)


def head_values(file: Path, own: Column[Any, Any], names: Mapping[str, str], o: HeadQuantities) -> np.ndarray:
    given = _Given(file, own, o, names)
    with np.errstate(all="ignore"):  # undefined is NaN, which becomes null
        values = np.asarray(_call(file, own.name, own.compute, given))
    if given.shape is None:
        raise Refusal(
            f"a column of heads is made of head quantities; {own.name} of {file.name} asks for none; use o[…]"
        )
    _check_shape(file, own.name, values.shape, given.shape, "[sequence, head]")
    return values.astype(np.float64)


def site_values(file: Path, own: Column[Any, Any], o: Any) -> Any:
    values = _call(file, own.name, own.compute, o)
    if values is not None:
        _check_shape(file, own.name, tuple(getattr(values, "shape", ())), (len(o.real),), "[batch]")
    return values


def row_values(file: Path, own: OwnRowQuantity, block: Block) -> Any:
    values = _call(file, own.record.name, own.compute, block)
    _check_shape(
        file, own.record.name, tuple(getattr(values, "shape", ())), tuple(block.measured.shape), "[batch, head, row]"
    )
    return values


def _call(file: Path, name: str, function: Callable[[Any], Any] | None, argument: Any) -> Any:
    assert function is not None, "a user's column has a function"
    try:
        return function(argument)
    except Refusal:
        raise
    except Exception as error:
        from attlas.extract.memory import is_out_of_memory

        if is_out_of_memory(error):
            raise
        refuse_failure(file, name, error)


def _check_shape(file: Path, name: str, got: tuple[int, ...], expected: tuple[int, ...], axes: str) -> None:
    if tuple(got) != tuple(expected):
        raise Refusal(
            f"{name} of {file.name} must give {axes}, here {list(expected)}; it gave {list(got)}; keep these dimensions"
        )


def refuse_failure(file: Path, name: str, error: BaseException) -> NoReturn:
    raise Refusal(
        f"statistics of your own must run; {name} of {file.name}{failing_line(file, error)}: {type(error).__name__}: "
        f"{first_line(error)}; fix that line"
    ) from error


# --- trials, on small inputs: two sequences, three heads


def try_on_heads(compute: Callable[[Any], Any]) -> None:
    class Anything(HeadQuantities):
        def __init__(self) -> None: ...

        def __getitem__(self, name: str) -> np.ndarray:
            return np.full((2, 3), 0.5)

    compute(Anything())


def try_on_sites(compute: Callable[[Any], Any]) -> None:
    import torch

    from attlas.extract.engines.observations import NormObservation, ResidualObservation

    state = torch.linspace(-1, 1, 2 * 4 * 6).view(2, 4, 6)
    real = torch.ones(2, 4, dtype=torch.bool)
    compute(ResidualObservation(real, state))  # where nothing is added
    norm = NormObservation(state, state, "layer", 1e-5)
    contexts = torch.ones(2, 3, 4, 2)
    compute(ResidualObservation(real, state, stream=state / 2, update=state / 2, norm=norm, contexts=contexts))


def try_on_block(compute: Callable[[Block], Any]) -> None:
    import torch

    from attlas.extract.engines.reference import blocks_of
    from attlas.extract.engines.rows import AttentionCall
    from attlas.extract.engines.visibility import visibility_from_mask, whole_axis

    vectors = torch.linspace(-1, 1, 2 * 3 * 4 * 5).view(2, 3, 4, 5)
    visibility = visibility_from_mask(None, causal=True, queries=whole_axis(2, 4, vectors.device))
    ids = torch.zeros(2, 4, dtype=torch.long)
    call = AttentionCall(vectors, vectors, vectors, visibility, 1.0, write=torch.eye(5).expand(3, 5, 5), token_ids=ids)
    for block in blocks_of(call, 3):
        compute(block)
