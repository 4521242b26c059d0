"""Twelve planted changes: a diff reports each in the right layer with the right cause.

Half of them are in a program, half in a runtime, where graph, plan and weights are the same. The
last one renames everything, which is no change.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from cached import cached_program
from programs import apply, llama_program
from session_faults import after_commit
from torch import Tensor

import kvxform.ir.ops as kvx
from kvxform import diff
from kvxform.diffing.records import DiffResult, Finding
from kvxform.ir.program import Program
from kvxform.passes.base.insert_cache import InsertCache
from kvxform.passes.structure.share_kv_layers import ShareKvLayers
from kvxform.runtime.model import OptimizedModel
from kvxform.runtime.session import Session

LAYER = 1
EVERY = (0, 1)
CODECS = {
    "key": {"codec": "int", "bits": 4, "clip": 0.9},
    "value": {"codec": "int", "bits": 4, "zero": "float"},
    "regions": {"sink": 2, "dtype": "float32"},
}
Edit = Callable[[Program], None]
Plant = Callable[[Session], None]


def base(**model: Any) -> Program:
    return cached_program(CODECS, 16, layers=2, attention={"window": 24}, **model)


def edited(edit: Edit) -> OptimizedModel:
    program = base()
    edit(program)
    return OptimizedModel(program)


def planted(plant: Plant) -> OptimizedModel:
    """Return a model whose sessions have a fault."""

    class Faulty(OptimizedModel):
        def new_session(self, *args: Any, **options: Any) -> Session:
            session = super().new_session(*args, **options)
            plant(session)
            return session

    return Faulty(base())


def permute_rows(program: Program) -> None:
    name = f"layers.{LAYER}.attn.q.weight"
    order = torch.arange(len(program.weights[name]))
    order[[3, 7]] = order[[7, 3]]
    program.weights[name] = program.weights[name][order]


def change_theta(program: Program) -> None:
    frequencies = program.weights["inv_freq"]
    count = len(frequencies)
    program.weights["other"] = 500000.0 ** (-torch.arange(count, dtype=frequencies.dtype) / count)
    site = program.site(LAYER)
    changed = dataclasses.replace(site, rope=dataclasses.replace(site.rope, inv_freq="other"))
    program.sites = tuple(changed if s is site else s for s in program.sites)
    for node in program.calls(kvx.ROPE):
        if node.meta["module"] == site.module:
            node.args[2].target = "other"


def narrow_window(program: Program) -> None:
    change_attention(program, window=23)


def drop_attention_scale(program: Program) -> None:
    change_attention(program, scale=1.0)


def change_attention(program: Program, **options: Any) -> None:
    node = program.attention_node(LAYER)
    node.kwargs = {**node.kwargs, **options}
    changed = dataclasses.replace(program.site(LAYER), **options)
    program.sites = tuple(changed if s.layer == LAYER else s for s in program.sites)


def forget_sink(program: Program) -> None:
    change_regions(program, sink=0)


def narrow_regions(program: Program) -> None:
    change_regions(program, dtype="float16")


def change_regions(program: Program, **changes: Any) -> None:
    assert program.plan is not None
    streams = {
        name: dataclasses.replace(stream, regions=dataclasses.replace(stream.regions, **changes))
        for name, stream in program.plan.site(LAYER).streams.items()
    }
    program.plan = program.plan.replace_site(LAYER, **streams)


def round_weight(program: Program) -> None:
    name = f"layers.{LAYER}.mlp.up.weight"
    if name not in program.weights:
        name = next(n for n in program.weights if n.startswith(f"layers.{LAYER}.mlp"))
    weight = program.weights[name]
    program.weights[name] = weight.half().to(weight.dtype)


def rename_all(program: Program) -> None:
    """Give every node, weight and module another name, and every origin another line."""
    names = {name: f"w{i}" for i, name in enumerate(sorted(program.weights, reverse=True))}
    program.weights = {names[name]: weight for name, weight in program.weights.items()}
    for i, node in enumerate(program.graph.nodes):
        if node.op == "get_attr":
            node.target = names[node.target]
        if node.op in ("placeholder", "output"):
            continue
        node.name = f"n{i}"
        node.meta["module"] = node.meta["module"].replace("layers", "blocks")
        node.meta["origin"] = node.meta["origin"].replace(":1)", ":77)")
    text = {**names, **{s.module: s.module.replace("layers", "blocks") for s in program.sites}}
    program.sites = tuple(renamed(site, text) for site in program.sites)


def renamed(record: Any, names: dict[str, str]) -> Any:
    """Return a record of dataclasses with other names of weights and modules."""
    if dataclasses.is_dataclass(record):
        fields = {f.name: getattr(record, f.name) for f in dataclasses.fields(record)}
        return dataclasses.replace(record, **{k: renamed(v, names) for k, v in fields.items()})
    return names.get(record, record) if isinstance(record, str) else record


class Encoder:
    """A codec whose planes are changed once they are encoded."""

    def __init__(self, codec: Any, change: Callable[[dict[str, Tensor]], None]) -> None:
        self._codec, self._change = codec, change

    def encode(self, x: Tensor) -> dict[str, Tensor]:
        planes = self._codec.encode(x)
        self._change(planes)
        return planes

    def __getattr__(self, name: str) -> Any:
        return getattr(self._codec, name)


def drop_scale(session: Session) -> None:
    change_planes(session, -1, lambda planes: planes["scale"].fill_(1.0))


def shift_zero(session: Session) -> None:
    change_planes(session, 0, lambda planes: planes["zero"].add_(1))


def change_planes(session: Session, index: int, change: Callable[..., object]) -> None:
    store = session._cache._stores[LAYER]._stores[index]
    store._codec = Encoder(store._codec, change)


def lose_sink(session: Session) -> None:
    def change() -> None:
        for store in session._cache._stores[LAYER]._stores:
            store.sink.zero_()

    after_commit(session, change)


def swap_pages(session: Session) -> None:
    """Two pages of one layer change places at the end of the first step."""
    done = []

    def change() -> None:
        if not done:
            for store in session._cache._stores[LAYER]._stores:
                for pool in store.pools.values():
                    pool[[1, 2]] = pool[[2, 1]]
        done.append(True)

    after_commit(session, change)


def encode_again(session: Session) -> None:
    """Every step decodes and encodes again what is already in the pages."""

    def change() -> None:
        for store in session._cache._stores[LAYER]._stores:
            planes = {name: pool.transpose(1, 2) for name, pool in store.pools.items()}
            again = store._codec.encode(store._codec.decode(planes, torch.float32))
            for name, pool in store.pools.items():
                pool.copy_(again[name].transpose(1, 2))

    after_commit(session, change)


def count_padding(session: Session) -> None:
    """Rows that were padded count their positions from the columns, not from their tokens."""
    executable = session._executable

    class Physical:
        program, device = executable.program, executable.device

        def step(self, ids: Tensor, inputs: Any, cache: Any, **options: Any) -> Tensor:
            shift = [ids.shape[1] - count for count in inputs.counts]
            moved = [p + n for p, n in zip(inputs.positions, shift, strict=True)]
            inputs = dataclasses.replace(inputs, positions=moved)
            return executable.step(ids, inputs, cache, **options)

    session._executable = Physical()


def found(result: DiffResult, rule: str) -> Finding:
    """Return the finding of a rule; it must be the first one and no note."""
    assert result.exit_code == 1
    first = result.findings[0]
    assert first.rule == rule, result.findings
    assert first.severity != "note"
    return first


PROGRAM_FAULTS: dict[str, tuple[Edit, str, str]] = {
    "permuted weight": (permute_rows, "weight-permuted", "3 and 7 exchanged"),
    "theta in one layer": (change_theta, "rope-frequencies", "theta 10000 -> 500000"),
    "window off by one": (narrow_window, "window", "window 24 -> 23"),
    "scale dropped": (drop_attention_scale, "attention-scale", "scale 0.25 -> 1.0"),
    "sink lost": (forget_sink, "sink", "sink 2 -> 0"),
    "stored dtype narrowed": (narrow_regions, "dtype", "float32 -> float16"),
    "weight narrowed": (round_weight, "dtype", "float16"),
}
VARIANTS = ("scale dropped", "sink lost", "weight narrowed")  # there is a runtime fault like it
RUNTIME_FAULTS: dict[str, tuple[Plant, str, str, tuple[int, ...]]] = {
    "scale of codes dropped": (drop_scale, "scale", "dropped scales of values", (LAYER,)),
    "zero point shifted": (shift_zero, "zero-point", "shifted by 1", (LAYER,)),
    "sink lost": (lose_sink, "sink", "first tokens are lost", (LAYER,)),
    "page table swapped": (swap_pages, "page-order", "changed places", (LAYER,)),
    "encoded again each step": (encode_again, "encoded-again", "in B", (LAYER,)),
    "physical positions": (count_padding, "positions", "padded rows alone", EVERY),
}


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=[pytest.mark.slow] * (n in VARIANTS)) for n in PROGRAM_FAULTS],
)
def test_fault_of_a_program_is_found_in_its_layer(name):
    edit, rule, words = PROGRAM_FAULTS[name]
    result = diff(OptimizedModel(base()), edited(edit), progress=False)
    finding = found(result, rule)
    assert words in finding.message
    assert finding.layers == (LAYER,)
    assert result.numeric is not None
    assert result.numeric.first_layer in (LAYER, None)


@pytest.mark.parametrize("name", RUNTIME_FAULTS)
def test_fault_of_a_runtime_is_found_in_its_layer(name):
    plant, rule, words, layers = RUNTIME_FAULTS[name]
    result = diff(OptimizedModel(base()), planted(plant), progress=False)
    finding = found(result, rule)
    assert words in finding.message
    assert finding.layers == layers
    assert finding.severity == "error"
    assert not result.structure.nodes
    assert not result.weights


def shared(owners: dict[str, int]) -> OptimizedModel:
    program, _ = apply(ShareKvLayers("explicit", map=owners), llama_program(layers=4))
    program, _ = apply(InsertCache(), program)
    return OptimizedModel(program)


def test_wrong_owner_is_found_in_the_layer_that_reads():
    result = diff(shared({"3": 1}), shared({"3": 0}), progress=False)
    finding = found(result, "layer-owner")
    assert finding.layers == (3,)


def test_another_name_is_no_change():
    result = diff(OptimizedModel(base()), edited(rename_all), progress=False)
    assert result.exit_code == 0
    assert {finding.rule for finding in result.findings} == {"renamed", "moved"}
    assert result.numeric.logits.max_abs == 0.0


def test_nothing_is_found_between_equal_models():
    result = diff(OptimizedModel(base()), OptimizedModel(base()), progress=False)
    assert result.is_same
    assert result.findings == ()
