"""One instrumented pass: attention calls matched to layers and handed to the engine, the residual stream beside them."""
