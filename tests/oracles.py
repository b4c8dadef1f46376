"""Independent float64 implementations of the catalogue's formulas, written as directly as possible.

They share nothing with the code under test. `p` is the pattern
of one head on one sequence, rows are queries and columns keys, real tokens only; `s` the masked, scaled scores;
`visible` the keys the mask lets a row see; `sink` the mass of a learned sink, per row. `None` means undefined.
"""

import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]
Columns = dict[str, float | None]
Profile = dict[int, tuple[float, int]]

TOKEN_CLASSES = ("bos", "separator", "special", "whitespace", "punctuation", "number", "word_start", "subword")
HISTOGRAM_BINS = 64
# Keys with half of the mass to within one part in a million have half of it: ties must not depend on rounding in float32.
MASS_SLACK = 1e-6


def entropy(outcomes: Floats | Iterable[float]) -> float:
    """−Σ p ln p with 0 ln 0 = 0, in nats."""
    q = np.asarray(outcomes, dtype=np.float64)
    q = q[q > 0]
    return float(-(q * np.log(q)).sum()) + 0.0  # + 0.0: a certain outcome gives 0, not −0


def mean(values: Iterable[float]) -> float | None:
    numbers = list(values)
    return math.fsum(numbers) / len(numbers) if numbers else None


def ratio(numerator: float, denominator: float) -> float | None:
    return numerator / denominator if denominator != 0 else None


def population_std(values: Iterable[float]) -> float | None:
    numbers = np.asarray(list(values), dtype=np.float64)
    return float(np.sqrt(((numbers - numbers.mean()) ** 2).mean())) if numbers.size else None


def all_visible_by_default(p: Floats, visible: Bools | None) -> Bools:
    return np.ones(p.shape, dtype=bool) if visible is None else np.asarray(visible, dtype=bool)


def classify_rows(p: Floats, s: Floats | None, visible: Bools) -> tuple[list[int], int, int]:
    """The measured rows, the number of masked rows (no visible key) and of non-finite rows (in a visible key)."""
    measured, masked, nonfinite = [], 0, 0
    for i in range(len(p)):
        visible_keys = visible[i]
        if not visible_keys.any():
            masked += 1
        elif not np.isfinite(p[i, visible_keys]).all() or (s is not None and not np.isfinite(s[i, visible_keys]).all()):
            nonfinite += 1
        else:
            if (p[i, ~visible_keys] != 0).any():
                raise ValueError(f"a row has mass on visible keys only; row {i} has some elsewhere: check `visible`")
            measured.append(i)
    return measured, masked, nonfinite


def measured_rows(p: Floats, s: Floats | None, visible: Bools) -> list[int]:
    return classify_rows(p, s, visible)[0]


def row_entropies(p: Floats, rows: list[int], sink: Floats | None) -> list[float]:
    """H_i of each row; a learned sink is one more outcome."""
    if sink is None:
        return [entropy(p[i]) for i in rows]
    return [entropy([*p[i], sink[i]]) for i in rows]


def offsets(n: int) -> NDArray[np.int64]:
    """d = key − query, for every pair."""
    position = np.arange(n)
    return position[None, :] - position[:, None]


# --- heads ---------------------------------------------------------------------------------------------------------


def head_columns(
    p: Floats,
    s: Floats | None = None,
    visible: Bools | None = None,
    *,
    q: Floats | None = None,
    k: Floats | None = None,
    v: Floats | None = None,
    w_o: Floats | None = None,
    context: Floats | None = None,
    tokens: NDArray[np.int64] | Sequence[int] | None = None,
    classes: Sequence[str] | None = None,
    sink: Floats | None = None,
    grid: tuple[int, int, int] | None = None,
) -> Columns:
    """Every column of `heads` for one head on one sequence; None if an argument is missing or the column is undefined.

    `grid`: rows and columns of an image's patches, and the number of tokens before them.

    p, s, visible [n, n]; q, k [n, d_k]; v [n, d_v]; w_o [d_v, d_model] without bias; context [n, d_v], else Σ p v; tokens, classes,
    sink [n].
    """
    p = np.asarray(p, dtype=np.float64)
    visible = all_visible_by_default(p, visible)
    rows, masked, nonfinite = classify_rows(p, s, visible)
    return {
        **entropy_columns(p, visible, rows, sink),
        **concentration_columns(p, rows),
        **distance_columns(p, visible, rows),
        "distance_patches": None if grid is None else distance_patches(p, *grid, measured=rows),
        "mass_patches": None if grid is None else mass_patches(p, *grid, measured=rows),
        **mass_columns(p, rows, sink),
        **class_columns(p, rows, classes),
        **repetition_columns(p, rows, tokens),
        **received_columns(p, rows, sink),
        **score_columns(s, visible, rows),
        **write_columns(p, visible, rows, v=v, w_o=w_o, context=context),
        **vector_columns(rows, q=q, k=k, v=v, w_o=w_o),
        "sink_keys": sink_keys(p, visible, rows),
        "mean_log_self": mean(math.log(p[i, i]) for i in rows if p[i, i] > 0),
        "query_rows": len(rows),
        "masked_rows": masked,
        "nonfinite_rows": nonfinite,
    }


def entropy_columns(p: Floats, visible: Bools, rows: list[int], sink: Floats | None) -> Columns:
    entropies = row_entropies(p, rows, sink)
    keys = [int(visible[i].sum()) for i in rows]
    return {
        "entropy_nats": mean(entropies),
        "entropy_std_nats": population_std(entropies),
        "entropy_normalized": mean(h / math.log(m) for h, m in zip(entropies, keys, strict=True) if m >= 2),
        "attended_keys": mean(math.exp(h) for h in entropies),
    }


def concentration_columns(p: Floats, rows: list[int]) -> Columns:
    return {
        "collision_probability": mean(float((p[i] ** 2).sum()) for i in rows),
        "max_weight": mean(float(p[i].max()) for i in rows),
    }


def distance_columns(p: Floats, visible: Bools, rows: list[int]) -> Columns:
    d = offsets(len(p)).astype(np.float64)
    distances = [float((p[i] * np.abs(d[i])).sum()) for i in rows]
    signed = [float((p[i] * d[i]).sum()) for i in rows]
    squared = [float((p[i] * d[i] ** 2).sum()) for i in rows]
    opportunity = [float(np.abs(d[i, visible[i]]).mean()) for i in rows]
    return {
        "distance_tokens": mean(distances),
        "offset_tokens": mean(signed),
        "offset_std_tokens": mean(math.sqrt(max(0.0, q - o**2)) for q, o in zip(squared, signed, strict=True)),
        "distance_vs_uniform": ratio(sum(distances), sum(opportunity)),
    }


def distance_patches(
    p: Floats, rows: int, columns: int, prefix: int, *, measured: list[int] | None = None
) -> float | None:
    """Mean distance of patch queries to patch keys, in patches, the pattern renormalised over patches row by row.

    Patches stand row by row after `prefix` other tokens. A row without mass on patches is left out.
    """
    place = {prefix + n: divmod(n, columns) for n in range(rows * columns)}
    means = []
    for i, (row, column) in place.items():
        mass = math.fsum(float(p[i, j]) for j in place)
        if mass > 0 and (measured is None or i in measured):
            far = math.fsum(float(p[i, j]) * math.hypot(row - r, column - c) for j, (r, c) in place.items())
            means.append(far / mass)
    return mean(means)


def mass_patches(p: Floats, rows: int, columns: int, prefix: int, *, measured: list[int] | None = None) -> float | None:
    """Mean mass of patch queries on patch keys, of the rows that `distance_patches` is the mean over."""
    patches = range(prefix, prefix + rows * columns)
    masses = [math.fsum(float(p[i, j]) for j in patches) for i in patches if measured is None or i in measured]
    return mean(mass for mass in masses if mass > 0)


def mass_where(p: Floats, rows: list[int], where: Bools) -> float | None:
    """Mean over rows of the mass on the pairs (query, key) marked in `where` [n, n]."""
    return mean(float(p[i, where[i]].sum()) for i in rows)


def mass_columns(p: Floats, rows: list[int], sink: Floats | None) -> Columns:
    d = offsets(len(p))
    return {
        "mass_self": mass_where(p, rows, d == 0),
        "mass_previous": mass_where(p, rows, d == -1),
        "mass_next": mass_where(p, rows, d == 1),
        "mass_backward": mass_where(p, rows, d < 0),
        "mass_forward": mass_where(p, rows, d > 0),
        "mass_first": mean(float(p[i, 0]) for i in rows),
        "mass_sink": None if sink is None else mean(float(sink[i]) for i in rows),
    }


def class_columns(p: Floats, rows: list[int], classes: Sequence[str] | None) -> Columns:
    if classes is None:
        return {f"mass_{name}": None for name in TOKEN_CLASSES}
    if unknown := set(classes) - set(TOKEN_CLASSES):
        raise ValueError(f"a token's class is one of {TOKEN_CLASSES}; got {sorted(unknown)}")
    member = {name: np.array([c == name for c in classes], dtype=bool) for name in TOKEN_CLASSES}
    return {f"mass_{name}": mean(float(p[i, member[name]].sum()) for i in rows) for name in TOKEN_CLASSES}


def repetition_columns(p: Floats, rows: list[int], tokens: NDArray[np.int64] | Sequence[int] | None) -> Columns:
    if tokens is None:
        return {"mass_same_token": None, "mass_induction": None}
    n = len(p)
    same, induction = np.zeros((n, n), dtype=bool), np.zeros((n, n), dtype=bool)
    for i in range(n):
        for j in range(n):
            same[i, j] = j != i and tokens[j] == tokens[i]
            induction[i, j] = 1 <= j <= i and j - 1 != i and tokens[j - 1] == tokens[i]
    return {"mass_same_token": mass_where(p, rows, same), "mass_induction": mass_where(p, rows, induction)}


def received_columns(p: Floats, rows: list[int], sink: Floats | None) -> Columns:
    if not rows:
        names = ("received_entropy_nats", "mutual_information_nats", "received_max", "received_max_key")
        return dict.fromkeys(names)
    received = p[rows].mean(axis=0)
    outcomes = received if sink is None else np.append(received, np.asarray(sink, dtype=np.float64)[rows].mean())
    received_entropy = entropy(outcomes)
    key = int(np.argmax(received))  # argmax is the first of equals
    return {
        "received_entropy_nats": received_entropy,
        "mutual_information_nats": received_entropy - float(np.mean(row_entropies(p, rows, sink))),
        "received_max": float(received[key]),
        "received_max_key": key,
    }


def score_columns(s: Floats | None, visible: Bools, rows: list[int]) -> Columns:
    if s is None or not rows:
        return {"score_max": None, "score_mean": None, "score_std": None}
    scores = np.concatenate([np.asarray(s[i, visible[i]], dtype=np.float64) for i in rows])
    return {"score_max": float(scores.max()), "score_mean": mean(scores), "score_std": population_std(scores)}


def write_columns(
    p: Floats, visible: Bools, rows: list[int], *, v: Floats | None, w_o: Floats | None, context: Floats | None
) -> Columns:
    """Norms of the context (before W_O) and of the output (after it), and the share of the first key."""
    columns: Columns = {"context_norm": None, "output_norm": None, "value_weighted_first": None}
    if context is None and v is not None:
        v = np.asarray(v, dtype=np.float64)
        # visible keys only, because 0 times an invisible value may be NaN
        context = np.zeros((len(p), v.shape[1]))
        for i in rows:
            context[i] = p[i, visible[i]] @ v[visible[i]]
    if context is not None:
        context = np.asarray(context, dtype=np.float64)
        columns["context_norm"] = mean(float(np.linalg.norm(context[i])) for i in rows)
    if context is not None and w_o is not None:
        columns["output_norm"] = mean(float(np.linalg.norm(context[i] @ w_o)) for i in rows)
    if v is not None and w_o is not None:
        weighted = norm_weighted_pattern(p, visible, rows, v=v, w_o=w_o)
        columns["value_weighted_first"] = ratio(float(weighted[:, 0].sum()), float(weighted.sum()))
    return columns


def vector_columns(
    rows: list[int], *, q: Floats | None, k: Floats | None, v: Floats | None, w_o: Floats | None
) -> Columns:
    """Mean norms of queries, keys and written values, and the first token's written value against that of the others."""
    written = None if v is None or w_o is None else np.asarray(v, dtype=np.float64) @ w_o
    columns = {
        name: None if vectors is None else mean(math.sqrt(math.fsum(x * x for x in vector)) for vector in vectors)
        for name, vectors in (("query_norm", None if q is None else q[rows]), ("key_norm", k), ("value_norm", written))
    }
    norms = [] if written is None else [float(np.linalg.norm(vector)) for vector in written]
    others = mean(norms[1:])
    return columns | {"value_ratio_first": None if others is None else ratio(norms[0], others)}


def sink_keys(p: Floats, visible: Bools, rows: list[int]) -> int | None:
    """Keys with more than 0.3 of the attention of the rows that see them, of those that half of the rows see."""
    if not rows:
        return None
    count = 0
    for j in range(p.shape[1]):
        seen_by = [i for i in rows if visible[i, j]]
        if seen_by and 2 * len(seen_by) >= len(rows):
            count += math.fsum(float(p[i, j]) for i in seen_by) / len(seen_by) > 0.3
    return count


def norm_weighted_pattern(p: Floats, visible: Bools, rows: list[int], *, v: Floats, w_o: Floats) -> Floats:
    """p·‖v_j W_O‖ for the measured rows, not renormalised (Kobayashi 2020)."""
    norms = np.array([np.linalg.norm(value @ w_o) for value in np.asarray(v, dtype=np.float64)])
    weighted = np.zeros((len(rows), p.shape[1]))
    for row, i in enumerate(rows):
        weighted[row, visible[i]] = p[i, visible[i]] * norms[visible[i]]
    return weighted


# --- heads, on the sample ------------------------------------------------------------------------------------------


def sample_columns(
    p: Floats,
    s: Floats | None = None,
    visible: Bools | None = None,
    *,
    v: Floats | None = None,
    w_o: Floats | None = None,
) -> Columns:
    """The columns of `heads` that need whole rows; shares of mass are shares of what the row gives to its keys."""
    p = np.asarray(p, dtype=np.float64)
    visible = all_visible_by_default(p, visible)
    rows = measured_rows(p, s, visible)
    return {
        **norm_columns(p, visible, rows, v=v, w_o=w_o),
        "keys_for_half_mass": mean(keys_for_mass(p[i, visible[i]], 0.5) for i in rows),
        "keys_for_90_mass": mean(keys_for_mass(p[i, visible[i]], 0.9) for i in rows),
        "gini": mean(gini(p[i, visible[i]]) for i in rows),
        "pattern_effective_rank": pattern_rank(p[rows]),
        **{f"mass_top_{k}": mean(math.fsum(sorted(p[i], reverse=True)[:k]) for i in rows) for k in (4, 16, 64)},
        "mass_streaming": mean(
            math.fsum(float(p[i, j]) for j in range(p.shape[1]) if j < 4 or i - 64 < j <= i) for i in rows
        ),
    }


def pattern_rank(p: Floats) -> float | None:
    """exp of the entropy of the normalised squared singular values of some rows of a pattern."""
    squares = np.linalg.svd(p, compute_uv=False) ** 2
    return math.exp(entropy(squares / squares.sum())) if squares.sum() > 0 else None


def norm_columns(p: Floats, visible: Bools, rows: list[int], *, v: Floats | None, w_o: Floats | None) -> Columns:
    if v is None or w_o is None:
        return {"norm_entropy_nats": None, "norm_distance_tokens": None, "norm_max_weight": None}
    weighted = norm_weighted_pattern(p, visible, rows, v=v, w_o=w_o)
    distance = np.abs(np.arange(p.shape[1])[None, :] - np.arange(len(p))[:, None])
    # a row in which no value writes anything has no norm-weighted pattern and is left out
    pairs = [(i, row / row.sum()) for i, row in zip(rows, weighted, strict=True) if row.sum() > 0]
    return {
        "norm_entropy_nats": mean(entropy(row) for _, row in pairs),
        "norm_distance_tokens": mean(float((row * distance[i]).sum()) for i, row in pairs),
        "norm_max_weight": mean(float(row.max()) for _, row in pairs),
    }


def keys_for_mass(weights: Floats, share: float) -> int:
    """The fewest keys that hold `share` of the row's mass."""
    held, enough = 0.0, share * float(weights.sum()) * (1 - MASS_SLACK)
    for count, weight in enumerate(sorted(weights, reverse=True), start=1):
        held += weight
        if held >= enough:
            return count
    return len(weights)


def gini(weights: Floats) -> float:
    """Mean absolute difference of two visible keys' weights over twice their mean: 0 when equal, (m − 1)/m for one."""
    total = float(weights.sum())
    differences = float(np.abs(weights[:, None] - weights[None, :]).sum())
    return differences / (2 * len(weights) * total) if total > 0 else 0.0


def class_flow(p: Floats, classes: Sequence[str]) -> dict[tuple[str, str], tuple[float, int]]:
    """Σ p by the classes of query and key, and the rows of the query's class."""
    flow: dict[tuple[str, str], tuple[float, int]] = {}
    for i, of_query in enumerate(classes):
        for of_key in TOKEN_CLASSES:
            total, count = flow.get((of_query, of_key), (0.0, 0))
            mass = math.fsum(float(p[i, j]) for j, other in enumerate(classes) if other == of_key)
            flow[of_query, of_key] = (total + mass, count + 1)
    return flow


# --- residual ------------------------------------------------------------------------------------------------------


def residual_columns(
    x: Floats | None,
    update: Floats | None,
    after: Floats,
    *,
    norm_input: Floats | None = None,
    norm_output: Floats | None = None,
    norm_kind: str = "layer",
    eps: float = 0.0,
    contexts: Floats | None = None,
    patterns: Floats | None = None,
    v: Floats | None = None,
    w_o: Floats | None = None,
    gain: Floats | None = None,
) -> Columns:
    """The columns of `residual` for one site on one sequence: x, update, after [n, d]; contexts [heads, n, d_head].

    Of an attention sublayer also the heads' patterns [heads, n, n], values [heads, n, d_head] and w_o [heads, d_head, d],
    and γ of a LayerNorm that reads `after`.

    Each is a mean of per-token values; a token for which one is undefined (nothing to divide by) is left out of it.
    """
    return {
        **update_columns(x, update, after),
        "anisotropy": anisotropy(after),
        **outlier_columns(after),
        **norm_reading_columns(norm_input, norm_output, kind=norm_kind, eps=eps),
        **heads_columns(contexts),
        **token_columns(x, update, after),
        **mixing_columns(x, patterns, v, w_o, gain),
        "head_diversity_nats": None if patterns is None else head_diversity(patterns),
    }


def layer_columns(x: Floats, after: Floats) -> Columns:
    """The columns of `layers`: the stream before and after a layer, [n, d]."""
    x, after = np.asarray(x, dtype=np.float64), np.asarray(after, dtype=np.float64)
    return {
        "block_influence": 1
        - mean(float(a @ b / np.linalg.norm(a) / np.linalg.norm(b)) for a, b in zip(x, after, strict=True)),
        "block_angle": mean(a / math.pi for a in defined(angle(a, b) for a, b in zip(x, after, strict=True))),
        "block_gain": mean_ratio(norms(after), norms(x)),
    }


def norm_histogram(states: Iterable[Floats]) -> dict[int, int]:
    """Tokens by ⌊4·log₂ ‖x'‖⌋, over sequences of states [n, d]."""
    return dict(Counter(math.floor(4 * math.log2(norm)) for of_sequence in states for norm in norms(of_sequence)))


def massive_histogram(states: Iterable[Floats]) -> dict[int, int]:
    """Tokens by ⌊log₁₀ (max|x'| ÷ median|x'|)⌋; of an even number of entries the lower middle one."""
    decades: Counter[int] = Counter()
    for of_sequence in states:
        for token in np.sort(np.abs(np.asarray(of_sequence, dtype=np.float64)), axis=1):
            decades[math.floor(math.log10(token[-1] / token[(len(token) - 1) // 2]))] += 1
    return dict(decades)


def massive_mass(p: Floats, stream: Floats) -> float | None:
    """Mean mass of a head's rows on massive keys, from the stream that its layer reads (Sun 2024)."""
    sizes = np.abs(np.asarray(stream, dtype=np.float64))
    middle = float(np.sort(sizes, axis=None)[(sizes.size - 1) // 2])
    massive = [j for j, size in enumerate(sizes.max(axis=1)) if size >= 100 and size >= 1000 * middle]
    return mean(math.fsum(float(row[j]) for j in massive) for row in p)


def token_columns(x: Floats | None, update: Floats | None, after: Floats) -> Columns:
    """What a mean over tokens does not say: medians, where the largest entry is, how the states lie to each other."""
    after = np.asarray(after, dtype=np.float64)
    stream = after if x is None else np.asarray(x, dtype=np.float64)
    ratios = None
    if x is not None and update is not None:
        ratios = [a / b for a, b in zip(norms(update), norms(x), strict=True) if b != 0]
    squares = np.linalg.svd(after, compute_uv=False) ** 2
    return {
        "stream_norm_median": float(np.median(norms(stream))),
        "update_ratio_median": float(np.median(ratios)) if ratios else None,
        "max_abs_token": int(np.abs(after).max(axis=1).argmax()),
        "rank_collapse": ratio(float(np.linalg.norm(after - after.mean(axis=0))), float(np.linalg.norm(after))),
        "curvature": mean(defined(angle(b - a, c - b) for a, b, c in zip(after, after[1:], after[2:], strict=False))),
        "effective_rank": math.exp(entropy(squares / squares.sum())) if squares.sum() else None,
    }


def defined(values: Iterable[float | None]) -> list[float]:
    return [value for value in values if value is not None]


def angle(a: Floats, b: Floats) -> float | None:
    """The angle between two vectors in a plane that they span: atan2 of what is across and along; None if one is zero."""
    if not a.any() or not b.any():
        return None
    along = float(a @ b) / float(np.linalg.norm(a))
    across = float(np.linalg.norm(b - along * a / np.linalg.norm(a)))
    return math.atan2(across, along)


def mixing_columns(
    x: Floats | None, patterns: Floats | None, v: Floats | None, w_o: Floats | None, gain: Floats | None
) -> Columns:
    """Kobayashi 2021: what other tokens write against the token's own value, that and its state, and both after the norm."""
    columns: Columns = {"mixing_ratio_attention": None, "mixing_ratio": None, "mixing_ratio_norm": None}
    if x is None or patterns is None or v is None or w_o is None:
        return columns
    heads, n, _ = np.asarray(patterns).shape
    of_attention, with_state, after_norm = [], [], []
    for i in range(n):
        writes = [[float(patterns[h][i, j]) * (v[h][j] @ w_o[h]) for j in range(n)] for h in range(heads)]
        own = np.sum([writes[h][i] for h in range(heads)], axis=0)
        others = np.sum([writes[h][j] for h in range(heads) for j in range(n) if j != i] + [0 * own], axis=0)
        size = float(np.linalg.norm(others))
        of_attention.append(size / (size + float(np.linalg.norm(own))))
        kept = np.asarray(x[i], dtype=np.float64) + own
        with_state.append(size / (size + float(np.linalg.norm(kept))))
        if gain is not None:
            sizes = [float(np.linalg.norm(gain * (part - part.mean()))) for part in (others, kept)]
            after_norm.append(sizes[0] / sum(sizes))
    return {
        "mixing_ratio_attention": mean(of_attention),
        "mixing_ratio": mean(with_state),
        "mixing_ratio_norm": mean(after_norm),
    }


def head_diversity(patterns: Floats) -> float | None:
    """Generalised Jensen–Shannon divergence of the heads' rows, averaged over rows; patterns [heads, n, n]."""
    rows = np.asarray(patterns, dtype=np.float64).transpose(1, 0, 2)
    return mean(entropy(heads.mean(axis=0)) - math.fsum(map(entropy, heads)) / len(heads) for heads in rows)


def mean_ratio(numerators: Iterable[float], denominators: Iterable[float]) -> float | None:
    return mean(a / b for a, b in zip(numerators, denominators, strict=True) if b != 0)


def norms(x: Floats) -> list[float]:
    return [float(np.linalg.norm(token)) for token in np.asarray(x, dtype=np.float64)]


def cosines(a: Floats, b: Floats) -> float | None:
    a, b = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    dots = [float(one @ other) for one, other in zip(a, b, strict=True)]
    return mean_ratio(dots, [m * n for m, n in zip(norms(a), norms(b), strict=True)])


def update_columns(x: Floats | None, update: Floats | None, after: Floats) -> Columns:
    columns: Columns = dict.fromkeys(
        ("stream_norm", "update_norm", "update_ratio", "update_cosine", "step_cosine", "stream_gain")
    )
    if update is not None:
        columns["update_norm"] = mean(norms(update))
    if x is not None:
        columns["stream_norm"] = mean(norms(x))
        columns["step_cosine"] = cosines(x, after)
        columns["stream_gain"] = mean_ratio(norms(after), norms(x))
    if x is not None and update is not None:
        columns["update_ratio"] = mean_ratio(norms(update), norms(x))
        columns["update_cosine"] = cosines(x, update)
    return columns


def mean_pair_cosine(vectors: Floats) -> float | None:
    """Mean cosine over the pairs of different rows; rows of zeros have no direction and are left out."""
    units = [u / np.linalg.norm(u) for u in np.asarray(vectors, dtype=np.float64) if u.any()]
    return mean(float(units[i] @ units[j]) for i in range(len(units)) for j in range(i))


def anisotropy(after: Floats) -> float | None:
    return mean_pair_cosine(after)


def outlier_columns(after: Floats) -> Columns:
    d = after.shape[1]
    sizes = np.abs(np.asarray(after, dtype=np.float64))
    largest = sizes.max(axis=0)  # per dimension, over tokens
    squares = [float((row**2).sum()) for row in sizes]
    fourths = [float((row**4).sum()) for row in sizes]
    return {
        "max_abs": float(largest.max()),
        "outlier_dim": int(np.argmax(largest)),
        "outlier_ratio": mean_ratio([float(row.max()) for row in sizes], [math.sqrt(q / d) for q in squares]),
        "kurtosis": mean_ratio([d * f for f in fourths], [q**2 for q in squares]),
    }


def norm_reading_columns(norm_input: Floats | None, norm_output: Floats | None, *, kind: str, eps: float) -> Columns:
    """What the norm at this site computed: μ, √(σ² + ε) (or rms), and the gain of γ and β."""
    columns: Columns = {"norm_mean": None, "norm_scale": None, "norm_output_gain": None}
    if kind not in ("layer", "rms"):
        raise ValueError(f'a norm is "layer" or "rms"; got {kind!r}')
    if norm_input is None:
        return columns
    stream = np.asarray(norm_input, dtype=np.float64)
    centres = stream.mean(axis=1) if kind == "layer" else np.zeros(len(stream))
    spreads = np.array([math.sqrt(((row - c) ** 2).mean() + eps) for row, c in zip(stream, centres, strict=True)])
    columns["norm_mean"] = mean(centres) if kind == "layer" else None
    columns["norm_scale"] = mean(spreads)
    if norm_output is not None:
        bare = [(row - c) / r if r else row * 0 for row, c, r in zip(stream, centres, spreads, strict=True)]
        columns["norm_output_gain"] = mean_ratio(norms(norm_output), norms(np.array(bare)))
    return columns


def heads_columns(contexts: Floats | None) -> Columns:
    """Two ways of combining the heads, and how alike their contexts are; contexts [heads, n, d_head]."""
    if contexts is None:
        return {"heads_concat_norm": None, "heads_mean_norm": None, "heads_cosine": None}
    tokens = np.asarray(contexts, dtype=np.float64).transpose(1, 0, 2)
    alike = [mean_pair_cosine(heads) for heads in tokens]
    return {
        "heads_concat_norm": mean(float(np.linalg.norm(heads.ravel())) for heads in tokens),
        "heads_mean_norm": mean(float(np.linalg.norm(heads.mean(axis=0))) for heads in tokens),
        "heads_cosine": mean(c for c in alike if c is not None),
    }


def mixing_ratio(p: Floats, v: Floats, w_o: Floats, x: Floats, *, rows: Sequence[int] | None = None) -> float | None:
    """Context against self (Kobayashi 2021): p [heads, n, n], v [heads, n, d_v], w_o [heads, d_v, d], x [n, d]."""
    p, v, w_o = (np.asarray(a, dtype=np.float64) for a in (p, v, w_o))
    heads, n = p.shape[:2]
    others, selves = [], []
    for i in range(n) if rows is None else rows:
        other, own = np.zeros(x.shape[1]), np.array(x[i], dtype=np.float64)
        for h in range(heads):
            for j in range(n):
                written = p[h, i, j] * (v[h, j] @ w_o[h])
                if j == i:
                    own += written
                else:
                    other += written
        others.append(float(np.linalg.norm(other)))
        selves.append(float(np.linalg.norm(own)))
    return mean_ratio(others, [a + b for a, b in zip(others, selves, strict=True)])


def head_diversity_nats(p: Floats, *, sink: Floats | None = None, rows: Sequence[int] | None = None) -> float | None:
    """Mean over queries of H(mean over heads of p) − mean over heads of H(p); p [heads, n, n], sink [heads, n]."""
    p = np.asarray(p, dtype=np.float64)
    outcomes = p if sink is None else np.concatenate([p, sink[:, :, None]], axis=2)
    return mean(
        entropy(outcomes[:, i].mean(axis=0)) - float(np.mean([entropy(head) for head in outcomes[:, i]]))
        for i in (range(p.shape[1]) if rows is None else rows)
    )


def effective_rank(x: Floats) -> float | None:
    """exp of the entropy of the squared singular values, normalised to sum 1; None for a matrix of zeros."""
    squares = np.linalg.svd(np.asarray(x, dtype=np.float64), compute_uv=False) ** 2
    return math.exp(entropy(squares / squares.sum())) if squares.sum() > 0 else None


# --- profiles ------------------------------------------------------------------------------------------------------


def doubling_bin(distance: int) -> int:
    """0, 1, 2, 3–4, 5–8, 9–16, … are bins 0, 1, 2, 3, 4, 5, …"""
    if distance == 0:
        return 0
    number, last = 1, 1
    while distance > last:
        number, last = number + 1, 2 * last
    return number


def signed_bin(d: int) -> int:
    return doubling_bin(d) if d >= 0 else -doubling_bin(-d)


def histogram_bin(share: float) -> int:
    # A float32 row may sum to a little over 1 and its entropy fall a little under 0: still the first bin.
    return max(0, min(HISTOGRAM_BINS - 1, math.floor(HISTOGRAM_BINS * share)))


def sum_by_bin(entries: Iterable[tuple[int, float]]) -> Profile:
    """Sum and count of (bin, value) entries, by bin; empty bins are absent."""
    profile: Profile = {}
    for number, value in entries:
        total, count = profile.get(number, (0.0, 0))
        profile[number] = (total + value, count + 1)
    return profile


def profile_of(
    p: Floats,
    visible: Bools | None,
    s: Floats | None,
    entries: Callable[[Floats, Bools, list[int]], Iterable[tuple[int, float]]],
) -> Profile:
    """The profile of what `entries` yields for (pattern, visible keys, measured rows)."""
    p = np.asarray(p, dtype=np.float64)
    visible = all_visible_by_default(p, visible)
    return sum_by_bin(entries(p, visible, measured_rows(p, s, visible)))


def offset_profile(p: Floats, visible: Bools | None = None, *, s: Floats | None = None) -> Profile:
    """Mass by signed offset; the count is of visible pairs, whether or not they hold mass."""

    def entries(p: Floats, visible_keys: Bools, rows: list[int]) -> Iterable[tuple[int, float]]:
        for i in rows:
            for j in range(p.shape[1]):
                if visible_keys[i, j]:
                    yield signed_bin(j - i), float(p[i, j])

    return profile_of(p, visible, s, entries)


def entropy_histogram(
    p: Floats, visible: Bools | None = None, *, s: Floats | None = None, sink: Floats | None = None
) -> Profile:
    """Rows by H/ln m, of the rows that see two keys or more; sum = count."""

    def entries(p: Floats, visible_keys: Bools, rows: list[int]) -> Iterable[tuple[int, float]]:
        wide = [i for i in rows if visible_keys[i].sum() >= 2]
        for i, h in zip(wide, row_entropies(p, wide, sink), strict=True):
            yield histogram_bin(h / math.log(visible_keys[i].sum())), 1.0

    return profile_of(p, visible, s, entries)


def max_weight_histogram(p: Floats, visible: Bools | None = None, *, s: Floats | None = None) -> Profile:
    """Rows by their largest weight; sum = count."""

    def entries(p: Floats, _: Bools, rows: list[int]) -> Iterable[tuple[int, float]]:
        return ((histogram_bin(float(p[i].max())), 1.0) for i in rows)

    return profile_of(p, visible, s, entries)


def entropy_by_position(
    p: Floats, visible: Bools | None = None, *, s: Floats | None = None, sink: Floats | None = None
) -> Profile:
    """H_i by the query's position."""

    def entries(p: Floats, _: Bools, rows: list[int]) -> Iterable[tuple[int, float]]:
        return ((doubling_bin(i), h) for i, h in zip(rows, row_entropies(p, rows, sink), strict=True))

    return profile_of(p, visible, s, entries)


def distance_by_position(p: Floats, visible: Bools | None = None, *, s: Floats | None = None) -> Profile:
    """Σ p·abs(d) by the query's position."""

    def entries(p: Floats, _: Bools, rows: list[int]) -> Iterable[tuple[int, float]]:
        d = np.abs(offsets(len(p)))
        return ((doubling_bin(i), float((p[i] * d[i]).sum())) for i in rows)

    return profile_of(p, visible, s, entries)


def received_by_position(p: Floats, visible: Bools | None = None, *, s: Floats | None = None) -> Profile:
    """Σ_i p[i, j] by the key's position; the count is of keys, every real token being one."""

    def entries(p: Floats, _: Bools, rows: list[int]) -> Iterable[tuple[int, float]]:
        return ((doubling_bin(j), float(p[rows, j].sum())) for j in range(p.shape[1]))

    return profile_of(p, visible, s, entries)


# --- weights -------------------------------------------------------------------------------------------------------


def weights_columns(w_q: Floats, w_k: Floats, w_v: Floats, w_o: Floats) -> Columns:
    """The columns of `weights` for one head: w_q, w_k [d_model, d_h], w_v [d_model, d_v], w_o [d_v, d_model]."""
    qk = np.asarray(w_q, dtype=np.float64) @ np.asarray(w_k, dtype=np.float64).T / math.sqrt(w_q.shape[1])
    ov = np.asarray(w_v, dtype=np.float64) @ np.asarray(w_o, dtype=np.float64)
    symmetric = (qk + qk.T) / 2
    # W_O W_V has the eigenvalues of W_V W_O less its zeros, which in the larger matrix come back as rounding noise.
    eigenvalues = np.linalg.eigvals(np.asarray(w_o, dtype=np.float64) @ np.asarray(w_v, dtype=np.float64))
    return {
        "qk_norm": float(np.sqrt((qk**2).sum())),
        "ov_norm": float(np.sqrt((ov**2).sum())),
        "qk_spectral": float(np.linalg.svd(qk, compute_uv=False).max()),
        "ov_spectral": float(np.linalg.svd(ov, compute_uv=False).max()),
        "qk_effective_rank": effective_rank(qk),
        "ov_effective_rank": effective_rank(ov),
        "ov_copying": ratio(float(eigenvalues.real.sum()), float(np.abs(eigenvalues).sum())),
        "qk_symmetry": ratio(float((symmetric**2).sum()), float((qk**2).sum())),
    }


# --- inference -----------------------------------------------------------------------------------------------------


def cluster_mean(
    y: Floats | Sequence[float], w: Floats | Sequence[float], document: NDArray[np.int64] | Sequence[int]
) -> tuple[float, float | None, float]:
    """θ = Σ w y / Σ w, its delete-one-document jackknife error (None for fewer than two), and G_eff."""
    y, w, document = np.asarray(y, dtype=np.float64), np.asarray(w, dtype=np.float64), np.asarray(document)
    theta = float((w * y).sum() / w.sum())
    groups = sorted(set(document.tolist()))
    g = len(groups)
    weights = np.array([w[document == name].sum() for name in groups])
    effective = float(w.sum() ** 2 / (weights**2).sum())
    if g < 2:
        return theta, None, effective
    without = np.array([(w * y)[document != name].sum() / w[document != name].sum() for name in groups])
    return theta, math.sqrt((g - 1) / g * ((without - without.mean()) ** 2).sum()), effective
