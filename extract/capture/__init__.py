"""Everything that is seen inside a model is seen in this package; nothing else touches a model's internals.

A model is examined once and instrumented in every later pass:

    model, probe inputs                              model, layout, batch
          │                                                │
          ▼                                                ▼
    examine.find_layout                              watch.watching  (one forward pass inside the context)
      probe.trace_of      one recorded pass            ├─ the ways to an attention call, by the layout:
      stacks, members     layers of which stack        │    seam        scaled_dot_product_attention
      projection          what reads the contexts      │    interface   transformers' attention functions
      states, steps,      x, F and x' by value         │    softmax     a softmax that the model writes out
        paths, sites                                   │    replay      a module run again with one-hot values
      checks that no layer was missed                  ├─ Engine.attend / rows_of_scores, Engine.head_sums
          │                                            ├─ stream.Stream  states of the stream, site by site
          ▼                                            ▼
    layout.Layout                                    Observer.heads, Observer.residual  (the collector of the tables)

One attention call, from the model to its row of `heads`:

1. The model calls `scaled_dot_product_attention`. `seam.replaced_sdpa` stands in its place and hands a `Request` (query, key,
   value, mask, scale, and `call_original`, which makes the call as torch would) to `_Watch.attend`.
2. `_Watch._next` takes the layer that comes next in `Layout.attentions`. Calls have no names: they are matched by their
   order, and `_assert_as_examined` checks heads, queries and keys against what was examined.
3. The mask becomes a `Visibility`, read once for all layers that share it: padding, causality, windows, holes.
4. `Engine.attend` makes the output and those row quantities that the tables need. The output goes on to the model, with the
   model's own values where queries are padding.
5. `Engine.head_sums` sums the rows of each head and sequence; the windows of a sequence are merged by `_by_sequence`.
6. The observer gives the sums to the recorders of the tables (`extract/collector.py`). When the pass has gone through they
   are added at the places of the batch's sequences; `tables/heads.py` makes columns and rows of them once per shard.

Lifetimes. Nothing of the size of a pattern outlives its call, no state of the stream the site that waits for it, and no sum
a pass that failed. A layout lives as long as its model stays what it is (`fingerprint`). Replaced functions and hooks are
put back when the context ends, whatever happens inside it; one pass is watched at a time in a process, since the names that
are replaced belong to the process.

Invariants, each an error and never a gap: every pass shows every attention layer once and every residual site once, with
the heads and tokens that were examined; x' = x + F(x) holds at every site to a few roundings of the model's own type;
padding is neither query nor key. While the package itself calls the model's functions, interception is disabled.
"""
