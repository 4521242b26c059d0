"""Examples to try a pass on: small programs of many forms, drawn from a seed.

An example is a recipe for a program, not the program: it prints as the call that makes it (where
options of attention are tensors, as the seeds of their values), and travels to another process.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kvxform.calibrate.collecting import collect
from kvxform.errors import KvxformError
from kvxform.ir.facts import Facts
from kvxform.ir.program import Program
from kvxform.order import PlannedPass, facts_after, passes_that_ensure
from kvxform.pass_base import PASSES, GraphPass
from kvxform.pipeline import apply_pass
from kvxform.recipe import PassStep
from kvxform.testing.programs import MAKERS

HEAD_DIMS = (16, 8, 16, 4, 24, 6, 32, 5)  # powers of two more often; 5 and 6 suit few passes
CALIBRATION = (2, 32)  # windows of calibration, and tokens of one
MORE_PASSES = ("insert-cache", "page-cache", "rotate-v", "rotate-qk")  # may have run before


@dataclass(frozen=True)
class Example:
    """How to make one program.

    Attributes:
        kind: `llama`, `gpt2` or `latent`; see `kvxform.testing.programs`. Or `given`.
        options: Options of that program, as plain data; numbers for tensors are seeds of them.
        opaque: Projection that the first site does not know, `q`, `k`, `v` or `o`; or empty.
        before: Passes that have run.
        program: The program itself, if the caller gave it.
    """

    kind: str
    options: tuple[tuple[str, Any], ...] = ()
    opaque: str = ""
    before: tuple[GraphPass, ...] = ()
    program: Program | None = None

    def source(self) -> Program:
        """Return the program before any pass."""
        if self.program is not None:
            return self.program.clone()
        options = dict(self.options)
        if "dtype" in options:
            options["dtype"] = getattr(torch, options["dtype"])
        if "attention" in options:
            options["attention"] = _tensors(options["attention"], options.get("heads", 4))
        program = MAKERS[self.kind](**options)
        if self.opaque:
            first, *rest = program.sites
            changed: dict[str, Any] = {self.opaque: None}
            program.sites = (dataclasses.replace(first, **changed), *rest)
        return program

    def __str__(self) -> str:
        shown = {name: repr(value) for name, value in self.options}
        if "dtype" in shown:
            shown["dtype"] = f"torch.{dict(self.options)['dtype']}"
        options = ", ".join(f"{name}={text}" for name, text in shown.items())
        parts = [f"{self.kind}_program({options})"]
        if self.program is not None:
            parts = [f"the given program {self.program.info.name}"]
        if self.opaque:
            parts.append(f"with an opaque {self.opaque}")
        if self.before:
            parts.append(f"after {', '.join(p.pass_name() for p in self.before)}")
        return " ".join(parts)


def planned(graph_pass: GraphPass) -> PlannedPass:
    """Return a pass as a step of a recipe."""
    return PlannedPass(PassStep(graph_pass.pass_name()), graph_pass)


def calibrated(source: Program, passes: Sequence[GraphPass]) -> Program:
    """Return `source` with statistics of random ids, if one of `passes` reads any."""
    needy = [p for p in passes if p.needs_calibration]
    if not needy:
        return source
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, source.info.vocab_size, CALIBRATION, generator=generator)
    fisher = any(p.needs_fisher for p in needy)
    found = collect(source, ids, name="random ids", fisher=fisher)
    return dataclasses.replace(source, calibration=found)


def prepare(source: Program, before: Sequence[GraphPass]) -> Program:
    """Return `source` after passes.

    Raises:
        KvxformError: If one of them refuses the program.
    """
    for earlier in before:
        source, _ = apply_pass(source, planned(earlier))
    return source


def on_meta(program: Program) -> Program:
    """Return a program as a dry run sees it: weights have shapes but no values."""
    weights = {name: weight.to("meta") for name, weight in program.weights.items()}
    return dataclasses.replace(program.clone(), weights=weights, calibration=None)


def prerequisites(graph_pass: GraphPass) -> tuple[GraphPass, ...]:
    """Return passes, with default options, that must run before `graph_pass`; by facts alone.

    Where none can be found, the requirement stays open and every example will be refused.
    """
    facts, chain = Facts(), list[GraphPass]()
    for _ in range(len(graph_pass.requires) + 2):
        unmet = [r for r in graph_pass.requires if not r.is_met(facts)]
        makers = [PASSES[name] for r in unmet for name in passes_that_ensure(r, facts)]
        makers.sort(key=lambda cls: not cls.numerics.is_exact)
        if not makers:
            break
        maker = makers[0]()
        chain += [*prerequisites(maker), maker]
        for earlier in chain:
            facts = facts_after(earlier, facts)
    return tuple(chain)


def draw_examples(
    graph_pass: GraphPass, count: int, *, before: Sequence[GraphPass] | None, seed: int
) -> list[Example]:
    """Return `count` examples, simple ones first: the first two are plain.

    Args:
        graph_pass: What is tried on them.
        count: How many.
        before: Passes that have run; by default those that the pass needs, and some at random.
        seed: Another seed, other examples.
    """
    rng = random.Random(seed)
    needed = prerequisites(graph_pass) if before is None else tuple(before)
    found = [Example("llama", (("layers", 1),), before=needed), Example("gpt2", before=needed)]
    if count > 2:
        found.append(Example("latent", before=needed))
    while len(found) < count:
        example = _draw(rng)
        extra = () if before is not None else _more_passes(rng, graph_pass, example, needed)
        found.append(dataclasses.replace(example, before=(*extra, *needed)))
    return found[:count]


def _draw(rng: random.Random) -> Example:
    kind = rng.choice(("llama", "llama", "llama", "gpt2", "latent"))
    options: dict[str, Any] = {"layers": rng.randint(1, 3), "seed": rng.randint(0, 99)}
    if rng.random() < 0.3:
        options["dtype"] = rng.choice(("float32", "bfloat16"))
    opaque = rng.choice("qkvo") if rng.random() < 0.15 else ""
    if kind == "llama":
        options |= _llama_options(rng)
    elif kind == "gpt2":
        options |= {"heads": rng.randint(1, 3), "tied": rng.random() < 0.5}
        options["head_dim"] = rng.choice(HEAD_DIMS)
    else:
        options |= {"heads": rng.randint(1, 4), "shared_first": rng.random() < 0.5}
    return Example(kind, tuple(sorted(options.items())), opaque)


def _llama_options(rng: random.Random) -> dict[str, Any]:
    kv_heads, head_dim = rng.randint(1, 3), rng.choice(HEAD_DIMS)
    options: dict[str, Any] = {
        "heads": kv_heads * rng.randint(1, 3),
        "kv_heads": kv_heads,
        "head_dim": head_dim,
        "rotary_dim": rng.choice([n for n in (0, head_dim // 2, head_dim) if n % 2 == 0]),
    }
    for name in ("bias", "tied", "interleaved", "shared"):
        if rng.random() < 0.3:
            options[name] = True
    if rng.random() < 0.2:
        options["weight_offset"] = 1.0
    more = rng.choice(
        (
            {},
            {},
            {"window": 5},
            {"chunk": 6},
            {"softcap": 3.0},
            {"sink_logits": 1},
            {"alibi_slopes": 2},
        )
    )
    return {**options, "attention": more} if more else options


def _tensors(attention: Mapping[str, Any], heads: int) -> dict[str, Any]:
    """Return options of attention with a tensor `[heads]` for each seed of one."""
    found: dict[str, Any] = {}
    for name, value in attention.items():
        is_tensor = name in ("sink_logits", "alibi_slopes")
        found[name] = _noise(heads, value) if is_tensor else value
    return found


def _noise(size: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(size, generator=generator, dtype=torch.float64)


def _more_passes(
    rng: random.Random, graph_pass: GraphPass, example: Example, needed: Sequence[GraphPass]
) -> tuple[GraphPass, ...]:
    """Return some passes that may stand before `needed` and leave everything legal."""
    chosen: list[GraphPass] = []
    for name in MORE_PASSES:
        if rng.random() < 0.3 and name != graph_pass.pass_name():
            tried = [*chosen, PASSES[name]()]
            if _is_legal([*tried, *needed], graph_pass, example):
                chosen = tried
    return tuple(chosen)


def _is_legal(before: Sequence[GraphPass], graph_pass: GraphPass, example: Example) -> bool:
    facts = Facts()
    for each in (*before, graph_pass):
        if not all(r.is_met(facts) for r in each.requires):
            return False
        facts = facts_after(each, facts)
    if len({p.pass_name() for p in before}) < len(before):
        return False
    try:
        prepare(on_meta(example.source()), before)
    except KvxformError:
        return False
    return True
