"""What an instrumented pass hands its results to."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

from attlas.extract.capture.layout import Attention, Site
from attlas.extract.engines.needs import Needs
from attlas.extract.engines.observations import HeadObservation, ResidualObservation
from attlas.extract.engines.stream_profiles import SiteSums
from attlas.extract.engines.sums import HeadSums


@runtime_checkable
class Observer(Protocol):
    """Takes the results of a pass as they come. Only what it `needs` is computed."""

    needs: Needs

    def heads(self, attention: Attention, sums: HeadSums, calls: Sequence[HeadObservation]) -> None: ...

    def residual(self, site: Site, sums: SiteSums) -> None: ...

    def layer(self, site: Site, sums: SiteSums) -> None: ...

    def state(self, site: Site, o: ResidualObservation) -> None: ...


class BatchObserver(Observer, Protocol):
    """An observer that counts a batch as a whole: it is told that the pass went through, or that it is made again."""

    def drop(self) -> None: ...

    def settle(self) -> None: ...
