"""From one recorded pass to the layout of a model."""
