"""Altair charts in pages that work offline under a strict Content-Security-Policy.

    page = f'<meta http-equiv="Content-Security-Policy" content="{content_security_policy()}">'
    page += chart_fragment(chart, {"rows": frame}, label="…") + …
    page += runtime()                                  # once, behind the last chart

A chart names its data (`alt.NamedData("rows")`), which stand beside it in a compact form, or once for all charts of a page
(`shared_data`). Vega runs as an interpreter of expressions, so the policy needs no 'unsafe-eval'; CSV and TSV data would need it, and
are not for these charts. Colours are CSS variables, which follow the page from light to dark.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import polars as pl
from markupsafe import Markup

from attlas.extract.printable import printable
from attlas.extract.store import Refusal

if TYPE_CHECKING:
    import altair as alt

_SCRIPT = Path(__file__).with_name("charts.js")
_DIGITS = 7
_FEW = 32  # longer columns of numbers are written as float32 in base64
NOTICE = (
    "Charts: Vega, Vega-Lite and Vega-Embed, © University of Washington Interactive Data Lab and contributors, BSD 3-Clause; "
    "D3, © Mike Bostock, ISC."
)
TIP = {"content": "data"}  # of a mark, for `tooltip`: Vega would write the texts of all marks at once
_FONT = 'system-ui, "DejaVu Sans", sans-serif'
_TOP = {"background": "transparent", "font": _FONT}
_CONFIG: Mapping[str, Mapping[str, Any]] = {
    "view": {"stroke": "var(--line)", "fill": "none"},
    "axis": {
        "labelColor": "var(--soft)",
        "titleColor": "var(--soft)",
        "tickColor": "var(--line)",
        "domainColor": "var(--line)",
        "gridColor": "var(--line)",
        "gridOpacity": 0.5,
        "labelFontSize": 10,
        "titleFontSize": 11,
        "titleFontWeight": "normal",
    },
    "header": {"labelColor": "var(--soft)", "titleColor": "var(--soft)", "labelFontSize": 11},
    "legend": {"labelColor": "var(--soft)", "titleColor": "var(--soft)"},
    "title": {"color": "var(--ink)"},
}


def chart_fragment(
    chart: alt.TopLevelMixin,
    data: Mapping[str, pl.DataFrame],
    *,
    label: str,
    name: str = "chart",
    shared: Sequence[str] = (),
    tips: Mapping[str, str] | None = None,
    cross: str | None = None,
    part: str | None = None,
    on_canvas: bool = False,
) -> Markup:
    """A chart as an HTML figure, with buttons for its data and its picture.

    data: the frames that it names; shared: those of `shared_data` that it names. label: what it shows, for those who do not see it.
    name: of the files that it is saved as. on_canvas: for tens of thousands of marks. tips: what the tip of a mark with TIP shows, titles by
    field. cross: the frame of which `rows` has all pairs of rows, the second running fastest; it gets their fields, `name` and `other_name`.
    part: the column of `rows` and the parameter whose value chooses the rows that are drawn.
    """
    spec = chart.to_dict(validate=False)
    given = spec.get("config", {})
    spec["config"] = given | _TOP | {name: given.get(name, {}) | of for name, of in _CONFIG.items()}
    content = {"spec": spec, "data": {name: _columns(frame) for name, frame in data.items()}, "shared": list(shared)}
    content |= {"tips": dict(tips) if tips else None, "cross": cross, "part": part}
    return Markup(
        '<figure class="chart" role="group" aria-label="{}" data-name="{}" data-renderer="{}"><div class="controls"></div>'
        '<div class="scroll-x" tabindex="0"><div class="view"></div></div>'
        '<div class="saving"><button type="button" data-save="csv">Data (CSV)</button>'
        '<button type="button" data-save="png">Picture (PNG)</button></div>'
        '<script type="application/json">{}</script></figure>'
    ).format(label, name, "canvas" if on_canvas else "svg", _json(content))


def shared_data(frames: Mapping[str, pl.DataFrame]) -> Markup:
    """Frames that several charts and the scripts of a page use, for before its first chart."""
    return Markup('<script type="application/json" id="data">{}</script>').format(
        _json({name: _columns(frame) for name, frame in frames.items()})
    )


def _json(content: Any) -> Markup:
    """JSON inside a script, where only `<` could end it or begin a comment."""
    text = json.dumps(content, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    return Markup(text.replace("<", "\\u003c"))


def chart_style() -> str:
    """The styles of charts, for a page that has those of the report."""
    return _SCRIPT.with_suffix(".css").read_text("utf-8")


def runtime(*scripts: str) -> Markup:
    """The script that draws all charts of a page, with Vega, its licences, and the page's own scripts."""
    own = (Markup("<script>{}</script>").format(Markup(script)) for script in scripts)
    return Markup("<!-- {} -->\n<script>{}</script>{}").format(Markup(NOTICE), Markup(_runtime()), Markup("").join(own))


def content_security_policy(*scripts: str) -> str:
    """The policy of a page with charts: nothing is loaded, and no script runs but the runtime and the page's own."""
    digests = [base64.b64encode(hashlib.sha256(code.encode()).digest()).decode() for code in (_runtime(), *scripts)]
    allowed = " ".join(f"'sha256-{digest}'" for digest in digests)
    return f"default-src 'none'; script-src {allowed}; style-src 'unsafe-inline'; img-src data:; base-uri 'none'; form-action 'none'"


@cache
def _runtime() -> str:
    """Vega for the version of Vega-Lite that Altair writes, and the code that draws the charts."""
    import altair
    import vl_convert

    version = ".".join(altair.SCHEMA_VERSION.removeprefix("v").split(".")[:2])
    known = vl_convert.get_vegalite_versions()
    if version not in known:
        raise Refusal(
            f"charts need a vl-convert-python with the Vega-Lite that Altair writes, {version}; the installed one has {', '.join(known)}; "
            "pip install --upgrade vl-convert-python"
        )
    code = vl_convert.javascript_bundle(_SCRIPT.read_text("utf-8"), vl_version=version)
    assert "</script" not in code.lower() and "<!--" not in code and "\r" not in code, "it would end early, or change"
    return code


def _columns(frame: pl.DataFrame) -> dict[str, Any]:
    """A frame by columns; numbers with a few digits, texts as numbers of words."""
    return {"names": frame.columns, "values": [_values(column) for column in frame.iter_columns()]}


def _values(column: pl.Series) -> Any:
    if column.dtype == pl.String:
        words = column.drop_nulls().unique(maintain_order=True)
        codes = column.replace_strict(words, pl.Series(range(len(words)), dtype=pl.Int32), default=None)
        return {"words": [printable(word) for word in words], "codes": codes.to_list()}
    if not column.dtype.is_float():
        return column.to_list()
    finite = column.to_frame().select(pl.when(pl.first().is_finite()).then(pl.first())).to_series()
    if len(finite) > _FEW:
        floats = finite.cast(pl.Float64).fill_null(np.nan).to_numpy().astype("<f4")
        return {"floats": base64.b64encode(floats.tobytes()).decode()}
    return [None if v is None else int(v) if v == int(v) else v for v in finite.round_sig_figs(_DIGITS).to_list()]
