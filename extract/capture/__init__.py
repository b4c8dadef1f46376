"""The seam: everything that is seen inside a model is seen here, and nothing else touches a model's internals.

`examine` finds what a model is made of (its `layout`) by watching it run once; `watch` sees every later forward pass.
"""
