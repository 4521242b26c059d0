"""Program: one captured model, as a graph in the kvx dialect with its weights, sites and plan.

Graph contract:

- placeholders are `input_ids` and `position_ids`, int64 `[B, S]`, and `cache` (a handle) once
  `insert-cache` has run; the single output is the logits `[B, S, vocab]`;
- weights are `get_attr` nodes whose target is a key of `Program.weights`;
- every other node is `call_function` on an `aten` or `kvx` op;
- `node.meta` holds `type` (ir.types), `module` (path of the source module), `origin` (what it was,
  with source line) and `via` (passes that made or changed it, oldest first), and nothing else.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, fx

import kvxform.ir.ops as kvx
from kvxform.codecs.basis import Basis
from kvxform.ir.calibration import Calibration
from kvxform.ir.facts import Facts
from kvxform.ir.plan import CachePlan
from kvxform.ir.store import WeightStore

META_KEYS = ("type", "module", "origin", "via")


@dataclass(frozen=True)
class Projection:
    """Which weight entries make the heads of q, k or v, or read the heads into the residual.

    Channel d of head h lies at index `start + h * head_stride + d` of the head axis of `weight`.
    The head axis is the output axis for q, k, v and the input axis for o.

    Attributes:
        weight: Key in `Program.weights`; a matrix.
        bias: Key of the bias `[out]`, or None.
        layout: `out_in` (nn.Linear) or `in_out` (GPT-2 Conv1D).
        start: First index of head 0.
        head_stride: Distance between heads.
    """

    weight: str
    bias: str | None = None
    layout: Literal["out_in", "in_out"] = "out_in"
    start: int = 0
    head_stride: int = 0

    def indices(self, num_heads: int, head_dim: int) -> Tensor:
        """Return indices on the head axis, int64 `[num_heads, head_dim]`."""
        heads = torch.arange(num_heads) * self.head_stride
        return self.start + heads[:, None] + torch.arange(head_dim)


def projection_weights(*projections: Projection | None) -> list[str]:
    """Return the names of the weights and biases of projections, each once."""
    found = [p for p in projections if p is not None]
    names = [name for p in found for name in (p.weight, p.bias) if name is not None]
    return list(dict.fromkeys(names))


@dataclass(frozen=True)
class RopeSpec:
    """Rotary embedding of a site; see `kvx::rope`. `inv_freq` is a key in `Program.weights`.

    At a site with a latent it turns the part of the keys that all heads share, and its match in q.
    """

    inv_freq: str
    rotary_dim: int
    attention_scaling: float = 1.0
    interleaved: bool = False


@dataclass(frozen=True)
class LatentSpec:
    """K and V of all heads made from one narrow vector per token, the latent (DeepSeek MLA).

    With latent c `[rank]` and a key part e `[rope_dim]` that all heads share: K_h is `up_k_h c`
    joined with e, and V_h is `up_v_h c`. `ir.latent` finds c and e in the graph.

    Attributes:
        rank: Channels of the latent.
        rope_dim: Channels of the shared part of a key.
        up_k: Rows that make the `head_dim - rope_dim` other channels of the keys of each KV head.
        up_v: Rows that make the values of each KV head.
        shared_first: Whether the shared part comes first in a key, rather than last.
    """

    rank: int
    rope_dim: int
    up_k: Projection
    up_v: Projection
    shared_first: bool = False


@dataclass(frozen=True)
class ResidualSpec:
    """K and V of all heads made when they are read; see `ir.residual`. Keys in `Program.weights`.

    Attributes:
        width: Channels of what is cached of a token.
        key: Matrices `[Hk, width, D]`, before RoPE.
        value: Matrices `[Hk, width, Dv]`.
        key_bias: `[Hk, 1, D]`, or None.
        value_bias: `[Hk, 1, Dv]`, or None; added to what attention returns.
    """

    width: int
    key: str
    value: str
    key_bias: str | None = None
    value_bias: str | None = None


@dataclass(frozen=True)
class AttentionSite:
    """One attention of the Program.

    Attributes:
        layer: Index in graph order; the `layer` of its attention op and of its plan.
        module: Path of the source module, for instance `model.layers.3.self_attn`.
        num_q_heads: Query heads, H.
        num_kv_heads: KV heads, Hk.
        head_dim: Channels of q and k, D.
        v_head_dim: Channels of v.
        scale: Factor of the scores.
        q: Projection of q, or None if it is not a plain linear layer.
        k: Projection of k, likewise.
        v: Projection of v, likewise.
        o: Output projection, likewise.
        rope: Rotary embedding, or None.
        window: Sliding window in tokens, or None.
        softcap: Softcap of the scores, or None.
        chunk: Length of chunks that see only themselves, or None.
        sink_logits: Key of the sink logits `[H]`, or None.
        alibi_slopes: Key of the ALiBi slopes `[H]`, or None.
        k_basis: Rotation that keys are in when they reach the attention op.
        v_basis: The same for values.
        shared_with: Earlier layer whose keys and values it reads, or None if it has its own.
        latent: What K and V of all heads are made from, or None. Gone once that is what is cached.
        payload: What is cached of a token: `kv`; `k` if values are the keys before RoPE; or
            `latent`, one key per token for all heads whose first `v_head_dim` channels are the
            value; `residual`, what all heads are made from. `v_basis` does not apply to the last
            three.
        residual: What makes K and V of a `residual` payload, or None.
        notes: What was left in the graph as it is, and why; the site works all the same.
    """

    layer: int
    module: str
    num_q_heads: int
    num_kv_heads: int
    head_dim: int
    v_head_dim: int
    scale: float
    q: Projection | None = None
    k: Projection | None = None
    v: Projection | None = None
    o: Projection | None = None
    rope: RopeSpec | None = None
    window: int | None = None
    softcap: float | None = None
    chunk: int | None = None
    sink_logits: str | None = None
    alibi_slopes: str | None = None
    k_basis: Basis = field(default_factory=Basis)
    v_basis: Basis = field(default_factory=Basis)
    shared_with: int | None = None
    latent: LatentSpec | None = None
    payload: Literal["kv", "k", "latent", "residual"] = "kv"
    residual: ResidualSpec | None = None
    notes: tuple[str, ...] = ()

    @property
    def owner(self) -> int:
        """Layer whose keys and values are read: its own unless layers share."""
        return self.layer if self.shared_with is None else self.shared_with


@dataclass(frozen=True)
class RejectedSite:
    """A candidate that was left alone, or something else that mixes tokens.

    Attributes:
        module: Path of the source module.
        reason: Why, without a full stop.
        origin: Op and source line of the candidate.
        matched: What was proven before it failed, in order.
        node: Op and source line of the first node that differs, or empty.
        hint: What would have to change, or empty.
        kind: `attention`, or `mixer` for a layer with a state of another kind.
    """

    module: str
    reason: str
    origin: str = ""
    matched: tuple[str, ...] = ()
    node: str = ""
    hint: str = ""
    kind: Literal["attention", "mixer"] = "attention"


@dataclass(frozen=True)
class ModelInfo:
    """Facts about the source that lowerings and reports need.

    Attributes:
        name: What the user called it.
        family: `model_type` of a Hugging Face model, or the class name.
        vocab_size: Rows of the logits.
        dtype: Compute dtype by torch name.
        context_length: Longest supported sequence, or None.
        bos_token_id: Token ids, or None.
        eos_token_ids: Tokens that end a generation.
        pad_token_id: Padding token, or None.
        tokenizer_path: Folder of tokenizer files, or None; not part of an artifact.
    """

    name: str
    family: str
    vocab_size: int
    dtype: str = "float32"
    context_length: int | None = None
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    pad_token_id: int | None = None
    tokenizer_path: str | None = None


@dataclass
class Program:
    """One captured model. Passes get a clone; weights are shared and never written in place.

    `store` keeps the weights of a large model in files; without it they are in memory.
    `calibration` holds statistics of the source model while passes run; it is never saved, and
    None in a dry run over shapes. `touched` names the weights that healing may train, each with the
    pass that changed what it does; see `Rewriter.set_weight`.
    """

    graph: fx.Graph
    weights: dict[str, Tensor]
    sites: tuple[AttentionSite, ...]
    info: ModelInfo
    rejected: tuple[RejectedSite, ...] = ()
    plan: CachePlan | None = None
    facts: Facts = field(default_factory=Facts)
    passes: tuple[str, ...] = ()
    touched: dict[str, str] = field(default_factory=dict)
    store: WeightStore | None = field(default=None, repr=False, compare=False)
    calibration: Calibration | None = field(default=None, repr=False, compare=False)

    def clone(self) -> Program:
        """Return an independent Program that shares only weight tensors."""
        return dataclasses.replace(
            self,
            graph=copy.deepcopy(self.graph),
            weights=dict(self.weights),
            touched=dict(self.touched),
        )

    def site(self, layer: int) -> AttentionSite:
        """Return the site of `layer`; KeyError if there is none."""
        for site in self.sites:
            if site.layer == layer:
                return site
        raise KeyError(layer)

    @property
    def dtype(self) -> torch.dtype:
        """Compute dtype of the model."""
        dtype = getattr(torch, self.info.dtype)
        assert isinstance(dtype, torch.dtype)
        return dtype

    @property
    def is_cached(self) -> bool:
        """Whether `insert-cache` has run."""
        return any(n.op == "placeholder" and n.target == "cache" for n in self.graph.nodes)

    def calls(self, *targets: Callable[..., Any]) -> Iterator[fx.Node]:
        """Yield `call_function` nodes with one of `targets`, in graph order."""
        for node in self.graph.nodes:
            if node.op == "call_function" and node.target in targets:
                yield node

    def readers(self, owner: int) -> tuple[AttentionSite, ...]:
        """Return the sites that read the keys and values of layer `owner`, itself included."""
        return tuple(site for site in self.sites if site.owner == owner)

    def attention_node(self, layer: int) -> fx.Node:
        """Return the attention or cached_attention node of `layer`; KeyError if there is none."""
        for node in self.calls(*kvx.ATTENTION_OPS):
            if node.kwargs["layer"] == layer:
                return node
        raise KeyError(layer)

    def append_node(self, layer: int) -> fx.Node | None:
        """Return the cache_append node of `layer`, or None before `insert-cache`."""
        for node in self.calls(kvx.CACHE_APPEND):
            if node.kwargs["layer"] == layer:
                return node
        return None

    def placeholder(self, name: str) -> fx.Node:
        """Return the placeholder called `name`; KeyError if there is none."""
        node: fx.Node
        for node in self.graph.nodes:
            if node.op == "placeholder" and node.target == name:
                return node
        raise KeyError(name)

    def to_module(self) -> fx.GraphModule:
        """Return a runnable module: `(input_ids, position_ids[, cache]) -> logits [B, S, vocab]`.

        The module shares the weight tensors and has a copy of the graph.
        """
        used = {n.target for n in self.graph.nodes if n.op == "get_attr"}
        return fx.GraphModule(
            {name: self.weights[name] for name in used}, copy.deepcopy(self.graph), "KvxProgram"
        )


def default_positions(input_ids: Tensor) -> Tensor:
    """Return positions 0..S-1 for every row, int64 `[B, S]`."""
    return torch.arange(input_ids.shape[1], device=input_ids.device).expand_as(input_ids)
