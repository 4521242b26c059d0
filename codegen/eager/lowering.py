"""The eager lowering: a Program as plain torch calls, on any device; the oracle of the others."""

from __future__ import annotations

import functools

import torch
from torch import Tensor, fx

import kvxform.ir.ops as kvx
from kvxform.codegen.eager.cache import PagedCache, check_plan
from kvxform.codegen.eager.specialise import specialise
from kvxform.codegen.eager.step import Step
from kvxform.errors import CodegenError
from kvxform.ir.cache import CacheState, watched
from kvxform.ir.execution import CacheSizes, LiveCache, StepInputs
from kvxform.ir.program import Program
from kvxform.ir.types import TensorType

_ATEN = torch.ops.aten
POINTWISE_OPS = frozenset(
    {
        _ATEN.mul.Tensor,
        _ATEN.mul.Scalar,
        _ATEN.div.Tensor,
        _ATEN.div.Scalar,
        _ATEN.tanh.default,
        _ATEN.to.dtype,
        _ATEN._to_copy.default,
        _ATEN.clone.default,
        _ATEN.alias.default,
    }
)


class EagerExecutable:
    """A Program that can be called.

    Args:
        program: With or without a cache; its weights are shared, not copied.
        fuse_norms: See `specialise`.

    Raises:
        CodegenError: KVX401 if the plan asks for something this lowering cannot do.
    """

    def __init__(self, program: Program, *, fuse_norms: bool = False) -> None:
        if program.is_cached != (program.plan is not None):
            raise CodegenError(
                "KVX401",
                "a program has a cache input if and only if it has a plan",
                where="eager",
                hint="run insert-cache",
            )
        for node in program.calls(kvx.CACHED_ATTENTION):
            if node.kwargs.get("causal") is False:
                raise CodegenError(
                    "KVX401", "cached attention must be causal", where="eager", at=node.name
                )
        if program.plan is not None:
            check_plan(program.plan, program.plan.page_size(program.plan.granule()))
        self.program, self._fuse_norms = program, fuse_norms
        self._full = specialise(program.clone(), fuse_norms=fuse_norms)

    @functools.cached_property
    def device(self) -> torch.device:
        """Where the weights live."""
        weights = self.program.weights.values()
        return next((w.device for w in weights), torch.device("cpu"))

    @torch.inference_mode()
    def __call__(
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        cache: CacheState | None = None,
        *,
        last: Tensor | None = None,
    ) -> Tensor:
        """Run the program.

        Args:
            input_ids: int64 `[B, S]`, padded on the right.
            position_ids: int64 `[B, S]`.
            cache: The cache of a cached program, inside a step.
            last: Index of one token per row, `[B]`, to return only its logits.

        Returns:
            Logits `[B, S, vocab]`, or `[B, vocab]` if `last` is given.
        """
        args = (input_ids, position_ids, *([] if cache is None else [watched(cache)]))
        if last is None:
            logits: Tensor = self._full(*args)
            return logits
        if self._last is not None:
            one: Tensor = self._last(*args, last)
            return one[:, 0]
        logits = self._full(*args)
        return logits[torch.arange(len(last), device=last.device), last]

    def new_cache(self, sizes: CacheSizes) -> PagedCache:
        """Return an empty cache."""
        assert self.program.plan is not None, "asked for by sessions of cached programs"
        return PagedCache(
            self.program.plan,
            num_pages=sizes.num_pages,
            page_size=sizes.page_size,
            num_rows=sizes.num_rows,
            device=self.device,
        )

    def step(
        self, input_ids: Tensor, inputs: StepInputs, cache: LiveCache, *, all_logits: bool = False
    ) -> Tensor:
        """Feed new tokens to a cache; see `Executable.step`."""
        assert isinstance(cache, PagedCache), "made by `new_cache`"
        inputs.check()
        step = Step(
            list(inputs.rows),
            list(inputs.starts),
            list(inputs.counts),
            inputs.block_table,
            cache.page_size,
            self.device,
        )
        new = torch.arange(input_ids.shape[1], device=self.device)
        positions = torch.tensor(inputs.positions, device=self.device)[:, None] + new
        cache.begin(step)
        last = None if all_logits else step.counts - 1
        logits = self(input_ids.to(self.device), positions, cache, last=last)
        cache.commit()
        return logits

    @functools.cached_property
    def _last(self) -> fx.GraphModule | None:
        """The program with `last` as one more input, cut before its final linear layer.

        None if the logits are not a plain linear layer of the hidden states.
        """
        program = self.program.clone()
        final = _final_linear(program)
        if final is None:
            return None
        hidden = final.all_input_nodes[0]
        placeholders = [n for n in program.graph.nodes if n.op == "placeholder"]
        with program.graph.inserting_after(placeholders[-1]):
            last = program.graph.placeholder("last")
        with program.graph.inserting_before(final):
            picked = program.graph.call_function(pick_tokens, (hidden, last))
        final.replace_input_with(hidden, picked)
        return specialise(program, fuse_norms=self._fuse_norms)


def pick_tokens(hidden: Tensor, last: Tensor) -> Tensor:
    """Return one token of each row: hidden `[B, S, n]`, last `[B]` -> `[B, 1, n]`."""
    rows = torch.arange(hidden.shape[0], device=hidden.device)
    return hidden[rows, last][:, None]


def _final_linear(program: Program) -> fx.Node | None:
    """Return the linear layer that makes the logits, behind pointwise calls at most."""
    output = next(n for n in program.graph.nodes if n.op == "output")
    node = output.args[0]
    if isinstance(node, tuple | list) and len(node) == 1:
        node = node[0]
    while isinstance(node, fx.Node) and node.target in POINTWISE_OPS:
        if any(isinstance(arg, fx.Node) for arg in node.args[1:]):
            return None
        node = node.args[0]
    if not isinstance(node, fx.Node) or node.target is not _ATEN.linear.default:
        return None
    hidden = node.args[0]
    is_alone = len(node.users) == 1 and isinstance(hidden, fx.Node)
    kind = hidden.meta.get("type") if isinstance(hidden, fx.Node) else None
    return node if is_alone and isinstance(kind, TensorType) and len(kind.shape) == 3 else None
