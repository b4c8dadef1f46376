"""Altair charts in pages that work offline under a strict Content-Security-Policy.

    page = f'<meta http-equiv="Content-Security-Policy" content="{content_security_policy()}">'
    page += chart_fragment(chart, {"rows": frame}, label="…") + …
    page += runtime()                                  # once, behind the last chart

A chart names its data (`alt.NamedData("rows")`), which stand beside it in a compact form. Vega runs as an interpreter of expressions,
so the policy needs no 'unsafe-eval'; CSV and TSV data would need it, and are not for these charts. Colours are CSS variables, which
follow the page from light to dark.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import polars as pl
from markupsafe import Markup

from attlas.extract.store import Refusal

if TYPE_CHECKING:
    import altair as alt

_SCRIPT = Path(__file__).with_name("charts.js")
_DIGITS = 5
NOTICE = (
    "Charts: Vega, Vega-Lite and Vega-Embed, © University of Washington Interactive Data Lab and contributors, BSD 3-Clause; "
    "D3, © Mike Bostock, ISC."
)
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


def chart_fragment(chart: alt.TopLevelMixin, data: Mapping[str, pl.DataFrame], *, label: str) -> Markup:
    """A chart as an HTML figure. data: the frames that it names. label: what it shows, for those who do not see it."""
    spec = chart.to_dict(validate=False)
    given = spec.get("config", {})
    spec["config"] = given | _TOP | {name: given.get(name, {}) | of for name, of in _CONFIG.items()}
    content = {"spec": spec, "data": {name: _columns(frame) for name, frame in data.items()}}
    # in a script, only `<` could end it or begin a comment
    text = json.dumps(content, ensure_ascii=False, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")
    return Markup(
        '<figure class="chart" role="group" aria-label="{}"><div class="controls"></div><div class="scroll-x" tabindex="0"><div class="view"></div></div>'
        '<script type="application/json">{}</script></figure>'
    ).format(label, Markup(text))


def chart_style() -> str:
    """The styles of charts, for a page that has those of the report."""
    return _SCRIPT.with_suffix(".css").read_text("utf-8")


def runtime() -> Markup:
    """The script that draws all charts of a page, with Vega, and its licences."""
    return Markup("<!-- {} -->\n<script>{}</script>").format(Markup(NOTICE), Markup(_runtime()))


def content_security_policy() -> str:
    """The policy of a page with charts: nothing is loaded, and no script runs but the runtime."""
    digest = base64.b64encode(hashlib.sha256(_runtime().encode()).digest()).decode()
    return f"default-src 'none'; script-src 'sha256-{digest}'; style-src 'unsafe-inline'; img-src data:; base-uri 'none'; form-action 'none'"


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
        return {"words": words.to_list(), "codes": codes.to_list()}
    if column.dtype.is_float():
        finite = column.to_frame().select(pl.when(pl.first().is_finite()).then(pl.first())).to_series()
        return [None if v is None else int(v) if v == int(v) else v for v in finite.round_sig_figs(_DIGITS).to_list()]
    return column.to_list()
