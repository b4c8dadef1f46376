"""What needs a GPU: tests marked `gpu` and a benchmark. `make gpu` runs both; `make gpu-rehearsal` runs the same code on a CPU."""
