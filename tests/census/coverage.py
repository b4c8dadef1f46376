"""data/COVERAGE.md: the census as a table, with totals."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from importlib.metadata import version
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tests.census.census import Entry

_HEAD = """# Coverage

Every architecture that `AutoModel` of transformers {transformers} maps (torch {torch}), as a tiny random model of its own
configuration: measured by `attlas`, and every column that follows from a pattern compared with the float64 oracle on the
patterns that the model's own eager attention gives. `make census` writes this file.

* *exact*: every pattern that the model gives is measured, and every such column agrees to 1e-5 or 1e-4 of its value.
* *exact by eager fallback*: the same, of a model that computes softmax by hand in some layer, where it is watched, or attends over blocks,
  by hashing or for a sample, where the module is run again.
* *measured, gives no patterns to compare with*: it attends by torch's or transformers' function, but has no eager form.
* *refused*: by name, before anything is measured.
* *no attention*: nothing in it makes a pattern over keys.
* *not built*: not from its configuration alone, or not with the packages here.

`ways` says how its calls are seen: `sdpa` and `interface` calls are made by the fast engine, `softmax` ones by the
model (on CPUs the fast engine reads its scores), `replay` ones by the reference engine. `layers` are the attention layers
measured, by stack; `compared` those for which the model has a pattern of its own. `residual` says whether the stream is
measured as well.
"""


def coverage(entries: Sequence[Entry]) -> str:
    """The page."""
    entries = sorted(entries, key=lambda e: (e.modality, e.model_type))
    head = _HEAD.format(transformers=version("transformers"), torch=version("torch"))
    return "\n".join([head, *_totals(entries), "", *_fast(entries), "", *_lines(entries)]) + "\n"


def _totals(entries: Sequence[Entry]) -> list[str]:
    from tests.census.census import OUTCOMES

    kinds = list(dict.fromkeys(e.modality for e in entries))
    counts = Counter((e.modality, e.outcome) for e in entries)
    rows = [
        [outcome, *(counts[kind, outcome] for kind in kinds), sum(counts[kind, outcome] for kind in kinds)]
        for outcome in OUTCOMES
        if any(counts[kind, outcome] for kind in kinds)
    ]
    return _table(["outcome", *kinds, "all"], rows)


def _fast(entries: Sequence[Entry]) -> list[str]:
    """Of the architectures that are measured, how many never leave the fast engine, and how many show their stream."""
    kinds = list(dict.fromkeys(e.modality for e in entries))
    shown = []
    for kind in kinds:
        measured = [e for e in entries if e.modality == kind and e.ways]
        fast, residual = sum(e.fast for e in measured), sum(e.residual == "measured" for e in measured)
        exact = sum(e.outcome.startswith("exact") for e in entries if e.modality == kind)
        attending = sum(e.outcome not in ("not built", "no attention") for e in entries if e.modality == kind)
        shown.append(
            [
                kind,
                attending,
                *(
                    f"{n} ({n / max(1, of):.1%})"
                    for n, of in ((exact, attending), (fast, len(measured)), (residual, len(measured)))
                ),
            ]
        )
    return _table(["of those built that attend", "architectures", "exact", "on the fast engine", "residual too"], shown)


def _lines(entries: Sequence[Entry]) -> list[str]:
    rows = [
        [
            f"`{e.model_type}`",
            e.modality,
            e.outcome,
            e.stacks,
            ", ".join(e.ways),
            e.compared or "",
            "yes" if e.residual == "measured" else e.residual,
            e.reason,
        ]
        for e in entries
    ]
    return _table(["architecture", "takes", "outcome", "layers", "ways", "compared", "residual", "remark"], rows)


def _table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> list[str]:
    lines = [head, ["---"] * len(head), *rows]
    return ["| " + " | ".join(_cell(value) for value in line) + " |" for line in lines]


def _cell(value: object) -> str:
    return str(value).replace("|", "\\|").replace("\n", " ")
