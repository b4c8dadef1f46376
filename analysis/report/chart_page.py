"""Pages of charts: what all of them have."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from markupsafe import Markup

from attlas.analysis.report.charts import NOTICE, chart_style, content_security_policy, runtime
from attlas.analysis.report.page import page_environment

_STYLE = Path(__file__).with_name("style.css")


def render_chart_page(template: str, context: Mapping[str, Any]) -> str:
    """A page from a template that extends chart_page.html, with the styles and the script of its charts."""
    common = {
        "policy": Markup(content_security_policy()),
        "style": Markup(_STYLE.read_text("utf-8") + chart_style()),
        "runtime": runtime(),
        "notice": NOTICE,
    }
    return page_environment().get_template(template).render({**common, **context})
