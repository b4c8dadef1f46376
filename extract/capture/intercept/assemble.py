"""All capture methods behind one context manager: one receiver gets every attention call of a pass."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Protocol

from torch import Tensor, nn

from attlas.extract.capture.intercept.interface import intercept_interface
from attlas.extract.capture.intercept.recorded_call import RecordedCall
from attlas.extract.capture.intercept.replay import ReplayedModules
from attlas.extract.capture.intercept.request import Request
from attlas.extract.capture.intercept.sdpa import intercept_sdpa
from attlas.extract.capture.intercept.softmax import Product, SoftmaxTracker
from attlas.extract.capture.layout import CaptureMethod


class Receiver(Protocol):
    """Receives the attention calls of a pass, in the form in which each capture method delivers them."""

    def attend(self, request: Request) -> Tensor:
        """Return the output of a call that the model is about to make (`sdpa`, `interface`)."""
        ...

    def receive_product(self, product: Product) -> None:
        """Take the product of a softmax with values that the model has computed (`softmax`)."""
        ...

    def receive_recorded_call(self, call: RecordedCall) -> None:
        """Take the call of a module that can be replayed, just after it returned (`replay`)."""
        ...


@contextmanager
def intercept_attention(
    model: nn.Module,
    receiver: Receiver,
    methods: Collection[CaptureMethod],
    *,
    replayed_modules: Iterable[str] = (),
    finds_imported: bool = True,
) -> Iterator[None]:
    """Send every attention call made in this context to the receiver.

    Calls of scaled_dot_product_attention are always intercepted, `interface` and `softmax` if they are among the methods,
    and replay takes the modules that are named. Calls made inside these modules go through to the model. With
    `finds_imported`, calls of the function are also found where a module has imported it.
    """
    modules = ReplayedModules(receiver.receive_recorded_call)

    def attend(request: Request) -> Tensor:
        return request.call_original() if modules.is_running else receiver.attend(request)

    def receive_product(product: Product) -> None:
        if not modules.is_running:
            receiver.receive_product(product)

    with ExitStack() as stack:
        stack.enter_context(intercept_sdpa(attend, finds_imported=finds_imported))
        if "interface" in methods:
            stack.enter_context(intercept_interface(model, attend))
        if "softmax" in methods:
            stack.enter_context(SoftmaxTracker(receive_product))
        stack.enter_context(modules.hooks(model, replayed_modules))
        yield
