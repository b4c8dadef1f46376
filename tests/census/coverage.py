"""data/COVERAGE.md: the results of the census as tables, with totals."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from importlib.metadata import version
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tests.census.census import Entry

_HEAD = """# Coverage

Every architecture that `AutoModel` of transformers {transformers} maps (torch {torch}), as a tiny random model. `attlas` measures it,
and every column that can be derived from a pattern is compared with a float64 oracle on the patterns that the model's own
eager attention returns. `make census` writes this file.

* *exact*: every pattern that the model returns is measured, and every such column agrees to 1e-5 absolute or 1e-4 relative.
* *exact by eager fallback*: the same, but the model computes softmax itself in some layer, where it is intercepted, or attends
  over blocks, by hashing or for a sample of queries, where the module is run again.
* *measured, gives no patterns to compare with*: it uses torch's or transformers' attention function but has no eager form.
* *refused*: with a reason, before anything is measured.
* *no attention*: nothing in the model makes a pattern over keys.
* *not built*: it can't be built from its configuration alone, or needs packages that are not installed.

`ways` says how calls are captured: the fast engine computes `sdpa` and `interface` calls, the model computes `softmax` ones
(on CPUs the fast engine reads their scores), and the reference engine computes `replay` ones. `layers` is the number of measured
attention layers by stack, and `compared` the number of those with a pattern from the model. `residual` says whether the stream
is measured too. `through run` concerns models with token ids: the model is saved with a tokenizer by `save_pretrained`, and
loaded, planned and measured as by `attlas run` on texts of several lengths; *yes* means the same results as for each text alone.
"""


def coverage(entries: Sequence[Entry]) -> str:
    """The content of data/COVERAGE.md."""
    entries = sorted(entries, key=lambda e: (e.modality, e.model_type))
    head = _HEAD.format(transformers=version("transformers"), torch=version("torch"))
    return (
        "\n".join(
            [
                head,
                *_outcome_table(entries),
                "",
                *_engine_table(entries),
                "",
                *_run_tables(entries),
                "",
                *_entry_table(entries),
            ]
        )
        + "\n"
    )


def _outcome_table(entries: Sequence[Entry]) -> list[str]:
    from tests.census.census import OUTCOMES

    kinds = list(dict.fromkeys(e.modality for e in entries))
    counts = Counter((e.modality, e.outcome) for e in entries)
    rows = [
        [outcome, *(counts[kind, outcome] for kind in kinds), sum(counts[kind, outcome] for kind in kinds)]
        for outcome in OUTCOMES
        if any(counts[kind, outcome] for kind in kinds)
    ]
    return _table(["outcome", *kinds, "all"], rows)


def _engine_table(entries: Sequence[Entry]) -> list[str]:
    """How many architectures are exact, run on the fast engine alone, and have their stream measured, by modality."""
    kinds = list(dict.fromkeys(e.modality for e in entries))
    rows = []
    for kind in kinds:
        measured = [e for e in entries if e.modality == kind and e.ways]
        fast, residual = sum(e.fast for e in measured), sum(e.residual == "measured" for e in measured)
        exact = sum(e.outcome.startswith("exact") for e in entries if e.modality == kind)
        attending = sum(e.outcome not in ("not built", "no attention") for e in entries if e.modality == kind)
        rows.append(
            [
                kind,
                attending,
                *(
                    f"{n} ({n / max(1, of):.1%})"
                    for n, of in ((exact, attending), (fast, len(measured)), (residual, len(measured)))
                ),
            ]
        )
    return _table(["models with attention", "architectures", "exact", "on the fast engine", "residual too"], rows)


def _run_tables(entries: Sequence[Entry]) -> list[str]:
    """How many architectures with token ids `attlas run` measures, and why it does not measure the others."""
    from tests.census.through_run import NO_IDS, YES

    entries_with_ids = [e for e in entries if e.through_run != NO_IDS]
    kinds = list(dict.fromkeys(e.modality for e in entries_with_ids))
    counts = []
    for kind in kinds:
        of_kind = [e.through_run.startswith(YES) for e in entries_with_ids if e.modality == kind]
        counts.append([kind, len(of_kind), f"{sum(of_kind)} ({sum(of_kind) / len(of_kind):.1%})"])
    reasons: dict[str, list[str]] = {}
    for one in entries_with_ids:
        if one.through_run != YES:
            reasons.setdefault(_without_class_names(one.through_run), []).append(f"`{one.model_type}`")
    ordered = sorted(reasons.items(), key=lambda item: (-len(item[1]), item[0]))
    return [
        *_table(["models with token ids", "architectures", "through `attlas run`"], counts),
        "",
        *_table(
            ["not through `attlas run`, or with a remark", "because"],
            [[", ".join(of), reason] for reason, of in ordered],
        ),
    ]


def _without_class_names(reason: str) -> str:
    """A reason without names of model classes, so that equal ones can be grouped."""
    return re.sub(r"\b[A-Z]\w*(Model|Encoder|Decoder|Transformer)\b", "…", reason)


def _entry_table(entries: Sequence[Entry]) -> list[str]:
    from tests.census.through_run import NO_IDS, YES

    rows = [
        [
            f"`{e.model_type}`",
            e.modality,
            e.outcome,
            e.stacks,
            ", ".join(e.ways),
            e.compared or "",
            "yes" if e.residual == "measured" else e.residual,
            "" if e.through_run == NO_IDS else "yes" if e.through_run.startswith(YES) else "no",
            e.reason,
        ]
        for e in entries
    ]
    head = ["architecture", "takes", "outcome", "layers", "ways", "compared", "residual", "through run", "remark"]
    return _table(head, rows)


def _table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> list[str]:
    lines = [head, ["---"] * len(head), *rows]
    return ["| " + " | ".join(_cell(value) for value in line) + " |" for line in lines]


def _cell(value: object) -> str:
    return str(value).replace("|", "\\|").replace("\n", " ")
