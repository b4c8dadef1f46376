"""Parquet to answers: what the heads and the residual stream of a measured model do, with intervals.

Every function here takes a dataset, as `attlas.open_dataset` gives it, and returns a Polars frame. The module of each says what it
answers, by which formula, and how to read it.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from attlas.analysis.defects import find_defects as find_defects
    from attlas.analysis.documents import dropped_documents as dropped_documents
    from attlas.analysis.documents import outlying_documents as outlying_documents
    from attlas.analysis.findings import find_findings as find_findings
    from attlas.analysis.kinds import head_kinds as head_kinds
    from attlas.analysis.pruning import proxy_correlations as proxy_correlations
    from attlas.analysis.pruning import pruning_candidates as pruning_candidates
    from attlas.analysis.pruning import removal_effects as removal_effects
    from attlas.analysis.redundancy import head_redundancy as head_redundancy
    from attlas.analysis.similarity import head_clusters as head_clusters
    from attlas.analysis.similarity import head_similarity as head_similarity

_PLACES = {
    "dropped_documents": "documents",
    "find_defects": "defects",
    "find_findings": "findings",
    "head_clusters": "similarity",
    "head_kinds": "kinds",
    "head_redundancy": "redundancy",
    "head_similarity": "similarity",
    "outlying_documents": "documents",
    "proxy_correlations": "pruning",
    "pruning_candidates": "pruning",
    "removal_effects": "pruning",
}
__all__ = [
    "dropped_documents",
    "find_defects",
    "find_findings",
    "head_clusters",
    "head_kinds",
    "head_redundancy",
    "head_similarity",
    "outlying_documents",
    "proxy_correlations",
    "pruning_candidates",
    "removal_effects",
]


def __getattr__(name: str) -> Any:
    """A public function, with the libraries behind it, at its first use."""
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    value = getattr(import_module(f"{__name__}.{_PLACES[name]}"), name)
    globals()[name] = value
    return value
