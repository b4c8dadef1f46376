"""The catalogue: every column of every measured table, each a function in a record."""
