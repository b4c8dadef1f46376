"""The model to measure: what a user names, loaded as a module with its tokenizer or image processor, and its inputs."""
