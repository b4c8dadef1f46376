"""The ways to an attention call: by torch's own function, the attention interface, a softmax, or a module run again."""
