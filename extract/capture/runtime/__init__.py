"""One instrumented pass: attention calls are matched to layers and measured by the engine, and the stream beside them."""
