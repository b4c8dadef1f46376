"""Parquet to answers: what the heads and the residual stream of a measured model do, with intervals."""
