"""The capture methods: ways to get hold of an attention call while a model runs.

`assemble.intercept_attention` installs them for one pass and sends every call to one receiver.

* `sdpa`: calls of torch's scaled_dot_product_attention. Models on torch.nn and most of transformers.
* `interface`: calls through transformers' attention interface. Soft-capping, learned sinks.
* `softmax`: a softmax that the model computes itself, followed to its product with values.
* `replay`: a module run again with one-hot values, where no pattern is ever computed.
"""
