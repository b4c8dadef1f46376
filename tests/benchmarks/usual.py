"""usual/*: attlas against the usual way, with eager patterns in memory, hooks and the same statistics in torch.

Both sides go from a batch of ids to Parquet and write the same columns, except those that are constant for a BERT without
padding: `mass_sink`, `query_rows`, `masked_rows`, `nonfinite_rows`, `stack`, and the numbers of document and shard. The
usual side runs in its own process, because a notebook does not use `keep_freed_memory` as a run does. It waits on a pipe
while ours runs. Both sides time only their own work.
"""

from __future__ import annotations

import copy
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor, nn

from attlas.extract.engines import choose
from attlas.extract.instrument import BATCH_TOKENS, Instrument
from attlas.extract.measurement import layout_of
from attlas.extract.model.encoder import Encoder
from attlas.extract.model.measured_model import TOKEN_INPUTS, MeasuredModel
from attlas.extract.model.token_classes import token_classes
from attlas.extract.shard import measure_sequences
from attlas.extract.store import Store
from tests.benchmarks.harness import Result, alternate, time_call
from tests.benchmarks.usual_way import (
    Call,
    Profile,
    head_columns,
    norm_quantities,
    pattern_quantities,
    profiles,
    repetitions,
    score_quantities,
    site_columns,
)
from tests.benchmarks.workloads import Workload, demo

if TYPE_CHECKING:
    from jaxtyping import Float, Int

    Columns = Mapping[str, Tensor]
    ModuleStates = Mapping[str, tuple[Tensor, Tensor]]  # (input, output) of modules by name

ROOT = Path(__file__).parents[2]
_HOOKED = ("query", "key", "value", "attention.output.dense", "LayerNorm")


def minilm_usual(work: Workload, repeats: int, *, at_once: int) -> Result:
    return compare_with_usual(demo(), work, repeats, at_once=at_once)


def compare_with_usual(encoder: Encoder, work: Workload, repeats: int, *, at_once: int) -> Result:
    """Compare both ways from a batch of the demo model's ids, without padding, to Parquet.

    `at_once` is the number of sequences that the usual side gives its model.
    """
    with (
        tempfile.TemporaryDirectory() as folder,
        usual_process(work.ids, Path(folder) / "usual", at_once=at_once) as theirs,
    ):
        ours = partial(time_call, our_way(encoder, work.ids, Path(folder) / "ours"))
        for _ in range(2):  # warm-up: compile and allocate
            ours()
            theirs()
        return alternate(ours, theirs, repeats=repeats).rates(work.tokens, "tokens/s")


def our_way(encoder: Encoder, ids: Int[Tensor, "batch token"], folder: Path) -> Callable[[], None]:
    measured_model = MeasuredModel(encoder.model, TOKEN_INPUTS, layout_of(encoder.model))
    instrument = Instrument(encoder, measured_model, choose("auto"), ids.shape[1], token_classes(encoder.tokenizer))
    numbers = np.arange(len(ids))
    sequences = pa.table({"sequence_id": numbers, "document_id": numbers, "token_ids": ids.tolist()})

    def run() -> None:
        tables, _ = measure_sequences(instrument, sequences, shard=0, batch_tokens=BATCH_TOKENS)
        for name, table in tables.items():
            Store.at(folder).write_part(name, 0, table)

    return run


def usual_way(encoder: Encoder, ids: Int[Tensor, "batch token"], folder: Path, *, at_once: int) -> Callable[[], None]:
    model = eager_copy(encoder.model)
    classes = torch.from_numpy(token_classes(encoder.tokenizer)[ids].astype(np.int64))
    folder.mkdir(exist_ok=True)

    def run() -> None:
        for name, table in usual_tables(model, ids, classes, at_once=at_once).items():
            pq.write_table(table, folder / f"{name}.parquet")

    return run


@contextmanager
def usual_process(ids: Int[Tensor, "batch token"], folder: Path, *, at_once: int) -> Iterator[Callable[[], float]]:
    """A process that does the work the usual way on request, and returns the seconds that it took."""
    command = [sys.executable, "-m", __name__]
    with subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:

        def ask(**question: Any) -> Any:
            assert process.stdin is not None and process.stdout is not None, "both are pipes"
            print(json.dumps(question), file=process.stdin, flush=True)
            answer = process.stdout.readline()
            if not answer:
                raise RuntimeError(f"the usual side's process ended by itself, with status {process.wait()}")
            return json.loads(answer)

        threads = torch.get_num_threads()
        started_with = ask(ids=ids.tolist(), folder=str(folder), at_once=at_once, threads=threads)
        assert started_with == threads, "both sides use the same number of threads"
        yield ask


def main() -> None:
    """The usual side: read the task, then do it once per line of input."""
    task = json.loads(sys.stdin.readline())
    torch.set_num_threads(task["threads"])
    run = usual_way(demo(), torch.tensor(task["ids"]), Path(task["folder"]), at_once=task["at_once"])
    print(torch.get_num_threads(), flush=True)
    for _ in sys.stdin:
        print(time_call(run), flush=True)


def usual_tables(
    model: nn.Module, ids: Int[Tensor, "batch token"], classes: Int[Tensor, "batch token"], *, at_once: int = 1
) -> dict[str, pa.Table]:
    """The three tables; `classes` are indices into TOKEN_CLASSES, `at_once` is the number of sequences per forward pass.

    One at a time is twice as fast as eight: its patterns fit into caches and into blocks that glibc keeps when freed.
    """
    with torch.inference_mode():
        grams = write_grams(model)
        parts = [quantities(model, part, grams) for part in ids.split(at_once)]
        heads, sites = (
            {name: torch.cat([p[name] for p in of], 1) for name in of[0]} for of in zip(*parts, strict=True)
        )
        return {
            "heads": _table(head_columns(heads, classes), ("layer", "sequence_id", "head")),
            "residual": _residual_table(sites),
            "profiles": _profiles_table(profiles(heads)),
        }


def eager_copy(model: nn.Module) -> nn.Module:
    """A copy of the model with eager attention, which returns patterns."""
    copied: Any = copy.deepcopy(model)
    copied.set_attn_implementation("eager")
    return copied


def write_grams(model: Any) -> list[Float[Tensor, "head width width"]]:
    """W_O^h W_O^hᵀ of every head, by layer."""
    heads = model.config.num_attention_heads
    projections = [layer.attention.output.dense.weight.unflatten(1, (heads, -1)) for layer in model.encoder.layer]
    return [torch.einsum("ohw,ohv->hwv", w, w) for w in projections]


def quantities(
    model: Any, ids: Int[Tensor, "batch token"], grams: Sequence[Tensor]
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Quantities of heads [layer, batch, head, …] and columns of the stream's sites [site, batch]."""
    with record_module_states(model) as states:
        patterns = model(input_ids=ids, output_attentions=True).attentions
    same, follows = repetitions(ids)
    calls = [call_of(states, layer, gram) for layer, gram in enumerate(grams)]
    heads = [
        pattern_quantities(p, same, follows) | score_quantities(call) | norm_quantities(call)
        for p, call in zip(patterns, calls, strict=True)
    ]
    norms = [pair for name, pair in states.items() if name.endswith("LayerNorm")]
    attentions = [(call.contexts, of["context_norm"]) for call, of in zip(calls, heads, strict=True)]
    return _stacked(heads), _stacked(site_columns(norms, attentions, epsilon=model.config.layer_norm_eps))


@contextmanager
def record_module_states(model: nn.Module) -> Iterator[ModuleStates]:
    """Inputs and outputs of the modules that the statistics need, in the order of their calls in this context."""
    states = {}

    def keep(name: str) -> Any:
        return lambda module, read, wrote: states.__setitem__(name, (read[0], wrote))

    with ExitStack() as stack:
        for name, module in model.named_modules():
            if name.endswith(_HOOKED):
                stack.callback(module.register_forward_hook(keep(name)).remove)
        yield states


def call_of(states: ModuleStates, layer: int, gram: Float[Tensor, "head width width"]) -> Call:
    attention = f"encoder.layer.{layer}.attention"

    def by_head(states: Tensor) -> Tensor:
        return states.unflatten(-1, gram.shape[:2]).transpose(1, 2)

    query, key, value = (by_head(states[f"{attention}.self.{name}"][1]) for name in ("query", "key", "value"))
    return Call(query, key, value, contexts=by_head(states[f"{attention}.output.dense"][0]), gram=gram)


def _stacked(tables: Sequence[Columns]) -> dict[str, Tensor]:
    """Columns stacked over layers or sites; NaN where one lacks the column."""
    names = dict.fromkeys(name for table in tables for name in table)
    undefined = torch.full((next(iter(tables[0].values())).shape[0],), torch.nan)
    return {name: torch.stack([table.get(name, undefined) for table in tables]) for name in names}


def _table(columns: Columns, axes: Sequence[str]) -> pa.Table:
    """A row for every combination of the axes; NaN becomes null."""
    numbers = np.indices(next(iter(columns.values())).shape)
    values = dict(zip(axes, numbers, strict=True)) | {name: of.numpy() for name, of in columns.items()}
    return pa.table({name: pa.array(of.ravel(), from_pandas=True) for name, of in values.items()})


def _residual_table(columns: Columns) -> pa.Table:
    table = _table(columns, ("place", "sequence_id"))
    place = table["place"].to_numpy()
    site = np.where(place == 0, "embedding", np.where(place % 2, "attention", "mlp"))
    layer = (place - 1).clip(0) // 2
    return table.drop_columns("place").append_column("layer", [layer]).append_column("site", [site])


def _profiles_table(profiles: Mapping[str, Profile]) -> pa.Table:
    """A row for every bin with a positive count."""
    tables = []
    for name, profile in profiles.items():
        counts = profile.counts.expand_as(profile.sums)
        layer, head, place = kept = counts.nonzero(as_tuple=True)
        columns = {"layer": layer, "head": head, "bin": profile.bins[place], "sum": profile.sums[kept]}
        numbers = {key: of.numpy() for key, of in (columns | {"count": counts[kept]}).items()}
        tables.append(pa.table({"profile": np.full(len(place), name)} | numbers))
    return pa.concat_tables(tables)


if __name__ == "__main__":
    main()
