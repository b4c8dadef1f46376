"""CSV cells that a spreadsheet takes for text: names in a corpus are chosen by whoever made it."""

from __future__ import annotations

import polars as pl
import polars.selectors as cs

_FORMULA = r"^[=+\-@\t\r]"
_NUMBER = r"^[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?$"


def without_formulas(frame: pl.DataFrame) -> pl.DataFrame:
    """The frame with an apostrophe before every text that a spreadsheet would run as a formula (OWASP, CSV injection).

    Numbers that are text, such as -1.5, stay as they are.
    """
    text = cs.string()
    is_formula = text.str.contains(_FORMULA) & ~text.str.contains(_NUMBER)
    return frame.with_columns(pl.when(is_formula).then(pl.lit("'") + text).otherwise(text).name.keep())
