"""Everything that is observed inside a model; no other package touches a model's internals.

A model is examined once (`discovery`) and instrumented for every later pass (`runtime`). Both get hold of its attention
calls in the same way (`intercept`):

    model, probe inputs                                 model, layout, batch
          │                                                   │
          ▼                                                   ▼
    discovery.find_layout                               runtime.instrumented_pass
      trace_of           one recorded pass ───┐           │  one forward pass inside the context
      call_filters       calls left out       │           │
      windows            calls joined         └───────────┼─▶ intercept.assemble.intercept_attention
      completeness       no layer is missing              │     sdpa        scaled_dot_product_attention
      stacks             stack and layer of a call        │     interface   transformers' attention functions
      projection         what reads its contexts          │     softmax     a softmax that the model computes itself
      sites              x, F and x' by their values      │     replay      a module run again with one-hot values
          │                                               ├─▶ receiver.CallReceiver   matches calls to layers, measures them
          │                                               ├─▶ stream.Stream           measures sites as they complete
          ▼                                               ▼
    layout.Layout                                       Observer.heads, Observer.residual   (the collector of the tables)

The modules beside the three packages are shared by them and import none of them. `discovery` and `runtime` import
`intercept` but not each other.

One attention call, from the model to its row of `heads`:

1. The model calls `scaled_dot_product_attention`. `intercept.sdpa` has replaced it, and sends a `Request` (query, key, value,
   mask, scale, and `call_original`, which makes the call as torch would) to `CallReceiver.attend`.
2. `LayerSequence.next` returns the layer that comes next in `Layout.attentions`. Calls have no names: they are matched by
   their order, and `assert_shape` checks heads, queries and keys against the layout and the batch.
3. `Visibilities` turns the mask into a `Visibility`, once for all layers that share it: padding, causality, windows, holes.
4. `Engine.attend` computes the output and the row quantities that the tables need. The output goes back to the model, with
   the model's own values where queries are padding (`OriginalOutput`).
5. `Engine.head_sums` sums the rows of each head and sequence. `merge_windows` merges the windows of a sequence.
6. The observer gives the sums to the recorders of the tables (`extract/collector.py`). When the pass has succeeded, they are
   added to the batch's sequences. `tables/heads.py` makes columns and rows of them once per shard.

Glossary, one noun per thing:

* attention layer (`Attention`): one attention call of every pass. A *call* is one execution of it: a `Call` in a trace, a
  `Request` on its way to the engine, a `RecordedCall` of a module that can be replayed.
* capture method: how a call is intercepted, one of the four above. The manifest's key for it is `way`.
* receiver: the one object that gets all calls of a pass, however they were captured.
* trace: everything recorded in one pass. An *event* is one forward call of a module in it.
* contexts: the output of an attention call before its projection.
* stack, layer: an encoder, a decoder, its cross-attention, …, and the number of a layer within it.
* sublayer: what reads the stream and adds one *update* to it. At a *site* the stream goes from x (`before`) by the update F to
  x' (`after`).
* hook point: the input or the output of a module at its n-th call, where a tensor is read.
* state: a distinct tensor of the stream's width. Its *derivation* says from which earlier state it is made, and how. Together
  they are the *state graph*, and a stream is a *path* in it.
* axis: which tokens of each sequence are real (`engines.visibility.Axis`).
* stream reader: what measures the sites of a pass, chosen by the engine: `stream.Stream` in torch, `CompiledStream` on the CPU,
  `FusedStream` on CUDA, where nothing waits for the device before the pass is over.
* piece: a call for one window or image, where a module makes several calls for one sequence.

Lifetimes. Nothing of the size of a pattern outlives its call, no state of the stream outlives the sites that read it, and no
sum outlives a pass that failed. What a pass keeps is freed when it ends, so there are no reference cycles. A layout is valid
as long as its model does not change (`fingerprint`). Replaced functions and hooks are restored when the context ends, also
after an error. They belong to the process, so one pass is instrumented at a time.

Invariants, each an error and never a gap: every pass shows every attention layer once and every residual site once, with
the heads and tokens of the layout; x' = x + F(x) holds at every site to a few roundings of the model's own type; padding is
neither query nor key. While the package itself calls the model's functions, interception is disabled.
"""
