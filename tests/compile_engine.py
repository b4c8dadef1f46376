"""Compile the CPU engine, and keep the code for all processes: `python -m tests.compile_engine`."""

from attlas.extract.engines import choose

if __name__ == "__main__":
    choose("cpu").make_ready()
