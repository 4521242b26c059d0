"""Rules of the verifier for what attention undoes when it reads: bases, and RoPE to come."""

from __future__ import annotations

from torch import fx

import kvxform.ir.ops as kvx
from kvxform.codecs.basis import Basis
from kvxform.ir.program import AttentionSite, Program
from kvxform.ir.verify_graph import invalid


def verify_key_reads(program: Program) -> None:
    """Check that attention turns keys and values exactly where they are cached so.

    Raises:
        PassError: KVX215.
    """
    assert program.plan is not None, "the program is cached"
    for site in program.sites:
        node = program.attention_node(site.layer)
        is_before = program.plan.site(site.layer).key.rope == "pre"
        if is_before != (node.kwargs.get("inv_freq") is not None):
            rule = "attention must turn keys if and only if they are cached before RoPE"
            raise invalid(rule, program.plan.site(site.layer).key.rope, node)
        wanted: dict[str, object] = {
            "key_basis": site.k_basis.inverse,
            "value_basis": site.v_basis.inverse,
        }
        if site.residual is not None:
            wanted |= {
                "key_basis": site.residual.key,
                "value_basis": site.residual.value,
                "key_bias": site.residual.key_bias,
            }
        if is_before:
            wanted |= _rope_options(program, site)
        for name, value in wanted.items():
            given = node.kwargs.get(name, _DEFAULTS.get(name))
            found = given.target if isinstance(given, fx.Node) else given
            if found != value:
                raise invalid(f"{name} must be that of what is cached, {value}", found, node)


_DEFAULTS = {"attention_scaling": 1.0, "interleaved": False}


def _rope_options(program: Program, site: AttentionSite) -> dict[str, object]:
    """Return what the attention of `site` must say of RoPE; weights by name."""
    rope, append = program.site(site.owner).rope, program.append_node(site.owner)
    assert append is not None, "the chain of handles has been checked"
    keys = append.args[0]
    if rope is None or (isinstance(keys, fx.Node) and keys.target is kvx.ROPE):
        raise invalid("keys cached before RoPE must not have been turned", keys, append)
    if site.k_basis != Basis() and site.k_basis.inverse is None:
        rule = "keys cached before RoPE must be in a basis that is undone when they are read"
        raise invalid(rule, str(site.k_basis), append)
    return {
        "inv_freq": rope.inv_freq,
        "rotary_dim": rope.rotary_dim,
        "attention_scaling": rope.attention_scaling,
        "interleaved": rope.interleaved,
    }
