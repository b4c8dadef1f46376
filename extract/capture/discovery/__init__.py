"""From one recorded pass to the layout of a model: its attention layers, stacks, projections, residual sites, patch grid."""
