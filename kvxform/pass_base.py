"""What a pass is: options, a contract, a pure `match` and the one function that mutates, `rewrite`.

A pass is a frozen dataclass. Its fields are its options in recipes and on the command line; its
name is its class name in kebab case (`RotateQk` -> `rotate-qk`).
"""

from __future__ import annotations

import dataclasses
import enum
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, TypeVar

from torch import Tensor, fx

from kvxform.codecs.basis import Basis
from kvxform.ir.facts import FactValue, Requirement
from kvxform.ir.plan import CachePlan, SitePlan
from kvxform.ir.program import META_KEYS, AttentionSite, Program
from kvxform.ir.stream_plan import StreamPlan
from kvxform.ir.types import ValueType


class Exactness(enum.Enum):
    """How a pass may change what the model computes."""

    EXACT = "exact"
    APPROX = "approximate"
    NEEDS_TRAINING = "needs training"


@dataclass(frozen=True)
class Numerics:
    """The contract of a pass.

    Attributes:
        exactness: EXACT is an algebraic identity: logits and cache state equal to rounding.
        metric: What an APPROX pass is measured by, for instance `kl`.
        bound: Largest allowed value of the metric, or None to measure only.
    """

    exactness: Exactness
    metric: str | None = None
    bound: float | None = None

    @property
    def is_exact(self) -> bool:
        """Whether the contract is an identity."""
        return self.exactness is Exactness.EXACT


EXACT = Numerics(Exactness.EXACT)


def approx(metric: str, bound: float | None = None) -> Numerics:
    """Return the contract of an approximate pass."""
    return Numerics(Exactness.APPROX, metric, bound)


@dataclass(frozen=True)
class Loss:
    """What an approximation of keys or values gives up, on the calibration text.

    Attributes:
        layer: Layer that owns them.
        stream: `key` or `value`.
        error: Norm of what is lost as a share of the norm of what there was.
        heads: Heads that are approximated together; empty for all of the layer.
    """

    layer: int
    stream: str
    error: float
    heads: tuple[int, ...] = ()


@dataclass(frozen=True)
class Match:
    """One place where a pass applies; all that `rewrite` needs travels in here.

    Attributes:
        layer: Layer of the site, or None for matches that belong to no site.
        node: Name of the anchor node in the graph, or empty.
        data: Whatever `match` found; plain data and node names, not nodes.
        losses: What the pass gives up there, for the report.
        note: A sentence for the report about what is done there, or empty.
    """

    layer: int | None = None
    node: str = ""
    data: Mapping[str, Any] = field(default_factory=dict)
    losses: tuple[Loss, ...] = ()
    note: str = ""


@dataclass(frozen=True)
class NoMatch:
    """One place where a pass might have applied, and why it does not.

    Attributes:
        reason: A sentence without a full stop.
        layer: Layer of the site, or None.
        node: Name of the first node that differs, or empty.
        done: True if the pass had already been applied there.
        hint: What the user can do about it, or empty.
    """

    reason: str
    layer: int | None = None
    node: str = ""
    done: bool = False
    hint: str = ""


class Rewriter:
    """The only thing that changes a Program; stamps every new node with its provenance.

    Args:
        program: What is changed, in place.
        pass_name: Who changes it.
        numerics: The contract of the pass; weights that a pass with a loss sets may be healed.
    """

    def __init__(self, program: Program, pass_name: str, numerics: Numerics = EXACT) -> None:
        self.program = program
        self.pass_name = pass_name
        self.numerics = numerics
        self.modified = False

    def node(self, name: str) -> fx.Node:
        """Return the node called `name`; KeyError if it is gone."""
        node: fx.Node
        for node in self.program.graph.nodes:
            if node.name == name:
                return node
        raise KeyError(name)

    def call_after(
        self,
        anchor: fx.Node,
        target: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any] | None = None,
        *,
        type_: ValueType,
        like: fx.Node | None = None,
    ) -> fx.Node:
        """Insert a call right after `anchor`; provenance comes from `like` (default: `anchor`)."""
        with self.program.graph.inserting_after(anchor):
            node = self.program.graph.call_function(target, args, dict(kwargs or {}))
        self._stamp(node, like or anchor, type_)
        return node

    def call_before(
        self,
        anchor: fx.Node,
        target: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any] | None = None,
        *,
        type_: ValueType,
        like: fx.Node | None = None,
    ) -> fx.Node:
        """Insert a call right before `anchor`; provenance comes from `like` (default: `anchor`)."""
        with self.program.graph.inserting_before(anchor):
            node = self.program.graph.call_function(target, args, dict(kwargs or {}))
        self._stamp(node, like or anchor, type_)
        return node

    def placeholder(self, name: str, type_: ValueType) -> fx.Node:
        """Append a placeholder after the existing ones."""
        last = [n for n in self.program.graph.nodes if n.op == "placeholder"][-1]
        with self.program.graph.inserting_after(last):
            node = self.program.graph.placeholder(name)
        node.meta = {"type": type_, "module": "", "origin": "", "via": (self.pass_name,)}
        self.modified = True
        return node

    def get_weight_node(self, name: str, anchor: fx.Node, type_: ValueType) -> fx.Node:
        """Return a new `get_attr` node for weight `name`, placed right before `anchor`."""
        with self.program.graph.inserting_before(anchor):
            node = self.program.graph.create_node("get_attr", name)
        self._stamp(node, anchor, type_)
        return node

    def set_args(self, node: fx.Node, args: tuple[Any, ...] | None = None, **kwargs: Any) -> None:
        """Change arguments of `node` in place; `kwargs` are merged into the present ones."""
        if args is not None:
            node.args = args
        if kwargs:
            node.kwargs = {**node.kwargs, **kwargs}
        self._touch(node)

    def replace(self, old: fx.Node, new: fx.Node) -> None:
        """Let every user of `old` use `new`, and erase `old`."""
        old.replace_all_uses_with(new)
        self.program.graph.erase_node(old)
        self.modified = True

    def set_weight(self, name: str, value: Tensor, *, made_from: Iterable[str] = ()) -> None:
        """Bind weight `name` to a new tensor; the old tensor is not written to.

        A pass with a loss leaves its mark on it (`Program.touched`). After an exact pass the weight
        keeps the mark it had, or takes that of the first marked weight in `made_from`.
        """
        store, touched = self.program.store, self.program.touched
        self.program.weights[name] = value if store is None else store.keep(value)
        self.modified = True
        if not self.numerics.is_exact:
            self.mark_touched([name])
            return
        marks = [touched[source] for source in (name, *made_from) if source in touched]
        if marks:
            touched[name] = marks[0]

    def mark_touched(self, names: Iterable[str]) -> None:
        """Let healing train weights that now do something else although they are as they were."""
        for name in names:
            assert name in self.program.weights, "only weights are trained"
            self.program.touched[name] = self.pass_name

    def update_site(self, layer: int, **changes: Any) -> AttentionSite:
        """Replace fields of the AttentionSite of `layer`."""
        site = dataclasses.replace(self.program.site(layer), **changes)
        self.program.sites = tuple(site if s.layer == layer else s for s in self.program.sites)
        self.modified = True
        return site

    def set_sites(self, sites: tuple[AttentionSite, ...]) -> None:
        """Replace all sites, where a pass adds layers."""
        self.program.sites = sites
        self.modified = True

    def set_plan(self, plan: CachePlan) -> None:
        """Replace the CachePlan."""
        self.program.plan = plan
        self.modified = True

    def update_site_plan(self, layer: int, **changes: Any) -> SitePlan:
        """Replace fields of the plan of `layer`."""
        assert self.program.plan is not None, "insert-cache has run"
        self.set_plan(self.program.plan.replace_site(layer, **changes))
        return self.program.plan.site(layer)

    def set_basis(
        self, layer: int, *, key: Basis | None = None, value: Basis | None = None
    ) -> None:
        """Record a new basis of K or V on the site, and on its plan if there is one."""
        changes = {"k_basis": key, "v_basis": value}
        self.update_site(layer, **{k: v for k, v in changes.items() if v is not None})
        if self.program.plan is None:
            return
        site_plan = self.program.plan.site(layer)
        if key is not None:
            self.update_site_plan(layer, key=dataclasses.replace(site_plan.key, basis=key))
        if value is not None and isinstance(site_plan.value, StreamPlan):
            self.update_site_plan(layer, value=dataclasses.replace(site_plan.value, basis=value))

    def remove_dead_calls(self) -> None:
        """Remove every call and weight node that nothing reads."""
        graph = self.program.graph
        for node in reversed(list(graph.nodes)):
            if node.op in ("call_function", "get_attr") and not node.users:
                graph.erase_node(node)

    def finish(self) -> None:
        """Remove dead nodes and weights, and check the graph."""
        graph = self.program.graph
        self.remove_dead_calls()
        used = {n.target for n in graph.nodes if n.op == "get_attr"}
        used |= {b.weight for s in self.program.sites for b in (s.k_basis, s.v_basis)}
        for name in [n for n in self.program.weights if n not in used]:
            del self.program.weights[name]
            self.program.touched.pop(name, None)
        graph.lint()

    def _stamp(self, node: fx.Node, like: fx.Node, type_: ValueType) -> None:
        node.meta = {key: like.meta.get(key, "") for key in META_KEYS}
        node.meta["type"] = type_
        self._touch(node)

    def _touch(self, node: fx.Node) -> None:
        via = tuple(node.meta.get("via") or ())
        if self.pass_name not in via:
            node.meta["via"] = (*via, self.pass_name)
        self.modified = True


@dataclass(frozen=True)
class GraphPass(ABC):
    """One rewrite of a Program.

    Class attributes:
        numerics: The contract.
        requires: Facts that must hold before.
        invalidates: Facts that go back to their defaults.
        source: Where the method comes from: paper and section.
    """

    numerics: ClassVar[Numerics]
    requires: ClassVar[tuple[Requirement, ...]] = ()
    invalidates: ClassVar[tuple[str, ...]] = ()
    source: ClassVar[str] = ""

    @classmethod
    def pass_name(cls) -> str:
        """Return the recipe name, derived from the class name."""
        return re.sub(r"(?<!^)(?=[A-Z])", "-", cls.__name__).lower()

    def ensures(self) -> Mapping[str, FactValue]:
        """Return the facts that hold afterwards."""
        return {}

    @property
    def needs_calibration(self) -> bool:
        """Whether the pass, with its options, reads `Program.calibration`.

        Where it is None although the pass needs it, the run is a dry one over shapes.
        """
        return self.needs_fisher

    @property
    def needs_fisher(self) -> bool:
        """Whether it reads gradients from the calibration, which cost a backward pass."""
        return False

    @abstractmethod
    def match(self, program: Program) -> list[Match | NoMatch]:
        """Find where the pass applies. Pure: reads the program and changes nothing."""

    @abstractmethod
    def rewrite(self, program: Program, match: Match, rewriter: Rewriter) -> None:
        """Apply the pass at one match, through `rewriter` only. Must work on meta tensors."""


PASSES: dict[str, type[GraphPass]] = {}
P = TypeVar("P", bound=type[GraphPass])


def register_pass(cls: P) -> P:
    """Make a pass known under its name; the only registration place."""
    PASSES[cls.pass_name()] = cls
    return cls
