"""A tiny random model of every architecture transformers can build, with inputs for it: what a census measures."""
