"""Run-time checks of the tensor shapes in signatures and records, at every call that the tests make."""

import ast
import re
from unittest.mock import patch

from jaxtyping import _import_hook, install_import_hook

# compiled modules are left out: numba and Triton read a function's own source and signature
CHECKED_MODULES = (
    "attlas.extract.batch_inputs",
    "attlas.extract.capture",
    "attlas.extract.collector",
    "attlas.extract.engines.block",
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


# names of dtypes in jaxtyping, and aliases of shaped types in attlas
STATES_A_SHAPE = re.compile(r"\b((Float|Int|UInt|Bool|Shaped|Num)\d*\[|Values\b|PerSequence\b)")


class ShapedFunctionTransformer(_import_hook.JaxtypingTransformer):
    """Check functions whose signature has a shape, except nested ones: wrapping them costs a millisecond per definition."""

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.FunctionDef:  # noqa: N802 - the name that `ast` calls
        signature = f"{ast.unparse(node.args)} {ast.unparse(node.returns) if node.returns else ''}"
        within = any(isinstance(parent, ast.FunctionDef) for parent in self._parents)
        return super().visit_FunctionDef(node) if STATES_A_SHAPE.search(signature) and not within else node


def check_shapes() -> None:
    """Check every call in the modules above from now on; they must not have been imported yet."""
    _import_hook.JaxtypingTransformer = ShapedFunctionTransformer
    install_import_hook(CHECKED_MODULES, "tests.shapes.checker")
    # imported here, so that they do not see the patch below
    import torch  # noqa: F401

    import attlas

    checker(lambda: None)

    # the tables import torch only for type checkers, so that commands start without it
    with patch("typing.TYPE_CHECKING", True):
        import attlas.extract.tables  # noqa: F401


def checker(function):
    from beartype import BeartypeConf, beartype

    # an int is accepted as a float (PEP 484)
    return beartype(conf=BeartypeConf(is_pep484_tower=True))(function)
