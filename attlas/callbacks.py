"""Measuring while a model trains: what `transformers.Trainer` takes as a callback.

    from attlas.callbacks import MeasureAttention

    Trainer(…, callbacks=[MeasureAttention("probe.txt", every=100, out="runs/attention")])

`attlas trend 'runs/attention/*'` then shows every head through the training. The README shows a complete example.
"""

from attlas.extract.training import MeasureAttention as MeasureAttention
from attlas.extract.training import MeasurementWarning as MeasurementWarning

__all__ = ["MeasureAttention", "MeasurementWarning"]
