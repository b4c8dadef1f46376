"""The entry points: command line, run files, Prefect flows."""
