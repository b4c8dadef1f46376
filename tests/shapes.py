"""Shapes in signatures and records, checked at every call that the tests make."""

import ast
import re
from unittest.mock import patch

from jaxtyping import _import_hook, install_import_hook

# compiled modules are left out: numba and Triton read a function's own source and signature
CHECKED = (
    "attlas.extract.batch_inputs",
    "attlas.extract.capture",
    "attlas.extract.collector",
    "attlas.extract.engines.cpu",
    "attlas.extract.engines.observations",
    "attlas.extract.engines.patches",
    "attlas.extract.engines.profiles",
    "attlas.extract.engines.reference",
    "attlas.extract.engines.rows",
    "attlas.extract.engines.sums",
    "attlas.extract.engines.visibility",
    "attlas.extract.measurement",
    "attlas.extract.memory",
    "attlas.extract.model.images",
    "attlas.extract.model.inputs",
    "attlas.extract.model.measured_model",
    "attlas.extract.model.packing",
    "attlas.extract.model.probe_inputs",
    "attlas.extract.model.special_tokens",
    "attlas.extract.model.token_classes",
    "attlas.extract.tables",
)


# jaxtyping's names for dtypes, and ours for shapes that return
STATES_A_SHAPE = re.compile(r"\b((Float|Int|UInt|Bool|Shaped|Num)\d*\[|Values\b|PerSequence\b)")


class StatedShapes(_import_hook.JaxtypingTransformer):
    """Check the functions that state a shape, and no function within another: each time one is made costs a millisecond."""

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.FunctionDef:  # noqa: N802 - the name that `ast` calls
        signature = f"{ast.unparse(node.args)} {ast.unparse(node.returns) if node.returns else ''}"
        within = any(isinstance(parent, ast.FunctionDef) for parent in self._parents)
        return super().visit_FunctionDef(node) if STATES_A_SHAPE.search(signature) and not within else node


def check_shapes() -> None:
    """Check every call of the modules above from now on; they must not be imported yet."""
    _import_hook.JaxtypingTransformer = StatedShapes
    install_import_hook(CHECKED, "tests.shapes.checker")
    # what is imported here first does not see the change below
    import torch  # noqa: F401

    checker(lambda: None)

    # the catalogue's modules name torch for type checkers alone, so that commands start without it
    with patch("typing.TYPE_CHECKING", True):
        import attlas.extract.tables  # noqa: F401


def checker(function):
    from beartype import BeartypeConf, beartype

    # where a float is asked for, an int serves (PEP 484)
    return beartype(conf=BeartypeConf(is_pep484_tower=True))(function)
