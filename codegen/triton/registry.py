"""Which function makes the template and the variables of which spec."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from kvxform.codegen.triton.spec import KernelSpec
from kvxform.errors import CodegenError

S = TypeVar("S", bound=KernelSpec, contravariant=True)


@dataclass(frozen=True)
class Emission:
    """What the text of one kernel is made of.

    Attributes:
        template: Name of a file in `templates/`.
        variables: What the template may use, besides what every template gets (`emit`).
    """

    template: str
    variables: dict[str, Any]


class MakeContext(Protocol[S]):
    """A function that turns a spec into an `Emission`.

    It raises CodegenError KVX401 for what its template cannot express. With `interpret` the text
    must run in Triton's interpreter: no inline assembly, no Gluon.
    """

    def __call__(self, spec: S, *, interpret: bool) -> Emission:
        """Return the template and its variables."""
        ...


EMITTERS: dict[type[KernelSpec], MakeContext[Any]] = {}


def emits(spec_class: type[S]) -> Callable[[MakeContext[S]], MakeContext[S]]:
    """Register the decorated function as the one that emits specs of `spec_class`."""

    def register(make_context: MakeContext[S]) -> MakeContext[S]:
        assert spec_class not in EMITTERS, f"two emitters of {spec_class.__name__}"
        EMITTERS[spec_class] = make_context
        return make_context

    return register


def find_emitter(spec: KernelSpec) -> MakeContext[Any]:
    """Return what emits `spec`: the function that the module of its kind has registered.

    Raises:
        CodegenError: KVX401 if no module is called as the kind of the spec.
    """
    module = f"{__package__}.{spec.kind}"
    if type(spec) not in EMITTERS and importlib.util.find_spec(module):
        importlib.import_module(module)
    if type(spec) not in EMITTERS:
        raise CodegenError(
            "KVX401", "a kernel must be of a known kind", where="triton", got=repr(spec.kind)
        )
    return EMITTERS[type(spec)]
