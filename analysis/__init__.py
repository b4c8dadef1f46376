"""Parquet to answers: what the heads and the residual stream of a measured model do, with intervals.

Every function here takes a dataset, as `attlas.open_dataset` gives it, and returns a Polars frame (a lazy one, if it is of profiles). The module of each says what it
answers, by which formula, and how to read it.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from attlas.analysis.defects import find_defects as find_defects
    from attlas.analysis.distance import distance_by_position as distance_by_position
    from attlas.analysis.distance import distance_ranking as distance_ranking
    from attlas.analysis.distance import offset_profile as offset_profile
    from attlas.analysis.documents import dropped_documents as dropped_documents
    from attlas.analysis.documents import outlying_documents as outlying_documents
    from attlas.analysis.entropy import entropy_by_head as entropy_by_head
    from attlas.analysis.entropy import entropy_by_layer as entropy_by_layer
    from attlas.analysis.entropy import entropy_by_length as entropy_by_length
    from attlas.analysis.entropy import entropy_by_position as entropy_by_position
    from attlas.analysis.findings import find_findings as find_findings
    from attlas.analysis.heads import head_estimates as head_estimates
    from attlas.analysis.heads import head_means as head_means
    from attlas.analysis.kinds import head_kinds as head_kinds
    from attlas.analysis.massive import massive_activations as massive_activations
    from attlas.analysis.pruning import proxy_correlations as proxy_correlations
    from attlas.analysis.pruning import pruning_candidates as pruning_candidates
    from attlas.analysis.pruning import removal_effects as removal_effects
    from attlas.analysis.redundancy import head_redundancy as head_redundancy
    from attlas.analysis.residual import residual_through_depth as residual_through_depth
    from attlas.analysis.similarity import head_clusters as head_clusters
    from attlas.analysis.similarity import head_similarity as head_similarity
    from attlas.analysis.sinks import attention_sinks as attention_sinks

_PLACES = {
    "attention_sinks": "sinks",
    "distance_by_position": "distance",
    "distance_ranking": "distance",
    "dropped_documents": "documents",
    "entropy_by_head": "entropy",
    "entropy_by_layer": "entropy",
    "entropy_by_length": "entropy",
    "entropy_by_position": "entropy",
    "find_defects": "defects",
    "find_findings": "findings",
    "head_clusters": "similarity",
    "head_estimates": "heads",
    "head_kinds": "kinds",
    "head_means": "heads",
    "head_redundancy": "redundancy",
    "head_similarity": "similarity",
    "massive_activations": "massive",
    "offset_profile": "distance",
    "outlying_documents": "documents",
    "proxy_correlations": "pruning",
    "pruning_candidates": "pruning",
    "removal_effects": "pruning",
    "residual_through_depth": "residual",
}
__all__ = [
    "attention_sinks",
    "distance_by_position",
    "distance_ranking",
    "dropped_documents",
    "entropy_by_head",
    "entropy_by_layer",
    "entropy_by_length",
    "entropy_by_position",
    "find_defects",
    "find_findings",
    "head_clusters",
    "head_estimates",
    "head_kinds",
    "head_means",
    "head_redundancy",
    "head_similarity",
    "massive_activations",
    "offset_profile",
    "outlying_documents",
    "proxy_correlations",
    "pruning_candidates",
    "removal_effects",
    "residual_through_depth",
]


def __getattr__(name: str) -> Any:
    """A public function, with the libraries behind it, at its first use."""
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    value = getattr(import_module(f"{__name__}.{_PLACES[name]}"), name)
    globals()[name] = value
    return value
