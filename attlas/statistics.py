"""Columns of your own: what a file that is given to `--statistics` imports.

    from attlas.statistics import column, row_quantity

The README shows a complete file.
"""

from attlas.extract.tables.own import column as column
from attlas.extract.tables.own import row_quantity as row_quantity

__all__ = ["column", "row_quantity"]
