"""data/COVERAGE.md: the census as a table, with totals."""

from __future__ import annotations

import re
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
measured as well. `through run` is of those that read ids of a tokenizer: saved with one by `save_pretrained`, loaded, planned
and measured as `attlas run` does it on texts of several lengths, the same numbers as the model gives for each alone.
"""


def coverage(entries: Sequence[Entry]) -> str:
    """The page."""
    entries = sorted(entries, key=lambda e: (e.modality, e.model_type))
    head = _HEAD.format(transformers=version("transformers"), torch=version("torch"))
    return (
        "\n".join([head, *_totals(entries), "", *_fast(entries), "", *_through_run(entries), "", *_lines(entries)])
        + "\n"
    )


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


def _through_run(entries: Sequence[Entry]) -> list[str]:
    """Of those that read ids, how many `attlas run` measures, and why it does not measure the others."""
    from tests.census.through_run import NO_IDS, YES

    asked = [e for e in entries if e.through_run != NO_IDS]
    kinds = list(dict.fromkeys(e.modality for e in asked))
    counts = []
    for kind in kinds:
        of_kind = [e.through_run.startswith(YES) for e in asked if e.modality == kind]
        counts.append([kind, len(of_kind), f"{sum(of_kind)} ({sum(of_kind) / len(of_kind):.1%})"])
    reasons: dict[str, list[str]] = {}
    for one in asked:
        if one.through_run != YES:
            reasons.setdefault(_of_any_model(one.through_run), []).append(f"`{one.model_type}`")
    ordered = sorted(reasons.items(), key=lambda item: (-len(item[1]), item[0]))
    return [
        *_table(["of those that read ids", "architectures", "through `attlas run`"], counts),
        "",
        *_table(
            ["not through `attlas run`, or not without a remark", "because"],
            [[", ".join(of), reason] for reason, of in ordered],
        ),
    ]


def _of_any_model(reason: str) -> str:
    """A reason without the names of a model's classes, so that like ones stand together."""
    return re.sub(r"\b[A-Z]\w*(Model|Encoder|Decoder|Transformer)\b", "…", reason)


def _lines(entries: Sequence[Entry]) -> list[str]:
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
