"""How much a measured pass asks of torch on a GPU, counted without one: each operation is a launch, which small models wait for.

The engine's kernels are left out; what they would have written is arbitrary.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from attlas.extract import engines
from attlas.extract.batch_inputs import with_sample
from attlas.extract.capture.runtime import stream
from attlas.extract.capture.runtime.batch import Batch, Tokens
from attlas.extract.capture.runtime.instrumented_pass import factors_for
from attlas.extract.capture.runtime.receiver import CallReceiver
from attlas.extract.collector import open_collector
from attlas.extract.engines.visibility import right_padded_axis
from attlas.extract.measurement import layout_of, observe
from attlas.extract.tables import measured_columns
from tests.extract.models import tiny

pytest.importorskip("triton")
from attlas.extract.engines.triton import chosen, layers, residual, summing

SEQUENCES, TOKENS = 12, 40
# that give another shape to what is there, or room for what is not
_FREE = frozenset(
    [
        "alias",
        "as_strided",
        "detach",
        "empty",
        "expand",
        "lift_fresh",
        "new_empty",
        "new_empty_strided",
        "permute",
        "reshape",
        "resolve_conj",
        "resolve_neg",
        "select",
        "slice",
        "split",
        "split_with_sizes",
        "squeeze",
        "stride",
        "t",
        "to",
        "transpose",
        "unbind",
        "unflatten",
        "unsqueeze",
        "view",
    ]
)
_WAITING = ("_local_scalar_dense", "is_nonzero", "nonzero", "equal", "masked_select", "unique")


class _Operations(TorchDispatchMode):
    """Counts the operations of torch that would launch a kernel, or wait for one."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = function._schema.name.removeprefix("aten::")
        if name not in _FREE:
            self.counts[name] += 1
        return function(*args, **(kwargs or {}))


def operations(run: Callable[[], Any]) -> Counter[str]:
    with _Operations() as operations:
        run()
    return operations.counts


def added_by_measuring(family: str, layers_of_model: int) -> tuple[Counter[str], Counter[str]]:
    """The operations that a measured pass with all core statistics makes besides the plain one's; and those of them that wait."""
    model = tiny(family, num_hidden_layers=layers_of_model)
    ids = torch.randint(2, 60, (SEQUENCES, TOKENS), generator=torch.Generator().manual_seed(1))
    lengths = [TOKENS - n for n in range(SEQUENCES)]
    mask = (torch.arange(TOKENS) < torch.tensor(lengths)[:, None]).long()
    inputs = {"input_ids": ids, "attention_mask": mask}
    layout, engine = layout_of(model), engines._ENGINES["triton"]()
    numbers = np.arange(SEQUENCES)
    collector = open_collector(measured_columns(), model, layout, sequence_ids=numbers, document_ids=numbers)
    factors = factors_for(model, layout, collector.needs)

    def measured() -> None:
        axis = right_padded_axis(lengths, TOKENS, ids.device)
        batch = Batch(SEQUENCES, {"input_ids": Tokens(axis, ids, ids % 8)})
        batch = with_sample(batch, numbers < 8, ids.device)
        observe(model, layout, inputs, batch=batch, engine=engine, collector=collector, factors=factors)

    def plain() -> None:
        with torch.inference_mode():
            model(**inputs)

    measured()  # what is looked up once for a model is known then
    ours, own = operations(measured), operations(plain)
    added = ours - own
    return added, Counter({name: n for name, n in added.items() if name in _WAITING})


@pytest.fixture
def without_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels are not run, and a device is not waited for after each call, as on a GPU."""

    def mark(receiver: CallReceiver, device: torch.device) -> torch.Tensor:
        if receiver._unmeasured is None:
            receiver._unmeasured = torch.zeros(1, dtype=torch.int32, device=device)
        return receiver._unmeasured

    for module in (engines.triton, chosen, layers, residual, summing):  # pyright: ignore[reportAttributeAccessIssue]
        monkeypatch.setattr(module, "launch", lambda *_arguments, **_options: None)
    monkeypatch.setattr(CallReceiver, "_mark_of_unmeasured", mark)
    monkeypatch.setattr(stream, "assert_identity", lambda *_: None)


@pytest.mark.usefixtures("without_kernels")
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("family", ["bert", "llama"])
def test_a_layer_adds_few_operations_and_nothing_waits_within_a_pass(family: str) -> None:
    few, waits = added_by_measuring(family, 2)
    many, waits_of_many = added_by_measuring(family, 6)
    of_layer = {name: n / 4 for name, n in (many - few).items()}
    # three sums come in one operation on a GPU; the others are for padding, and a NaN where a statistic is not known
    assert sum(of_layer.values()) <= 6, of_layer
    assert sum(few.values()) - 2 * sum(of_layer.values()) <= 105, few
    # three to read the mask, which layers share; one when the pass is over, whether rows were not measured
    assert waits == waits_of_many == {"is_nonzero": 4}
