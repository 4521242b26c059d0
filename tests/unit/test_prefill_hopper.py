"""The prefill for Hopper: when it is chosen, what it is emitted as, and its machine code.

Triton's interpreter cannot run it: results are checked on a GPU (`tests/gpu/test_prefill.py`).
"""

from __future__ import annotations

import ast
import dataclasses
import types
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from sass import Build, MachineCode, compile_kernels, count
from triton_cases import int_stream, make_site

from kvxform.codegen.triton.emit import emit
from kvxform.codegen.triton.loading import load
from kvxform.codegen.triton.prefill_hopper import is_hopper, reason_against
from kvxform.codegen.triton.sites import prefill_spec
from kvxform.codegen.triton.spec import PrefillSpec
from kvxform.errors import CodegenError

QUERIES, BLOCK_N = 32, 128
PLAIN = PrefillSpec(32, 8, 128, 128, "bfloat16", for_hopper=True)
ROTATED = dataclasses.replace(PLAIN, query_block=128, has_signs=True, has_lse=True)


def functions(text: str) -> dict[str, ast.FunctionDef]:
    return {node.name: node for node in ast.parse(text).body if isinstance(node, ast.FunctionDef)}


def arguments(text: str) -> list[str]:
    launcher = functions(text)["prefill"].args
    return [a.arg for a in (*launcher.args, *launcher.kwonlyargs)]


def test_a_plan_gets_it_where_it_fits() -> None:
    assert prefill_spec(make_site(int_stream(128), heads=(32, 8))).for_hopper
    assert prefill_spec(make_site(int_stream(64, sink=4)), query_block=32).for_hopper
    # Near miss: the same with tokens that stay exact.
    assert not prefill_spec(make_site(int_stream(64, keep=8))).for_hopper


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"dtype": "float32"}, "its dtype has no 16 bits"),
        ({"value_dim": 64}, "K and V have different head_dim"),
        ({"key_dim": 96, "value_dim": 96}, "head_dim is none of (64, 128)"),
        ({"key_chunk": 32}, "some tokens stay exact"),
        ({"value_keep": 1}, "some tokens stay exact"),
        ({"window": 4096}, "its window ends"),
        ({"chunk": 4096}, "its window ends"),
        ({"softcap": 30.0}, "scores are more than products"),
        ({"has_alibi": True}, "scores are more than products"),
        ({"has_sink_logits": True}, "there are sink logits"),
        ({"num_kv_heads": 1}, "the query heads of a KV head are none of (1, 2, 4, 8, 16)"),
        ({"num_q_heads": 24}, "the query heads of a KV head are none of (1, 2, 4, 8, 16)"),
        ({"query_block": 256}, "its Hadamard has none of (16, 32, 64, 128) channels"),
    ],
)
def test_what_it_leaves_to_the_other_kernel(changes: dict[str, Any], reason: str) -> None:
    spec = dataclasses.replace(PLAIN, **changes)
    assert reason_against(PLAIN) is None
    assert reason_against(spec) == reason
    with pytest.raises(CodegenError, match="KVX401") as error:
        emit(spec)
    assert f"must be of the plain kind; got {reason}" in str(error.value)


def test_the_twin_is_the_plain_kernel() -> None:
    twin = emit(ROTATED, interpret=True).text
    plain = emit(dataclasses.replace(ROTATED, for_hopper=False), interpret=True).text
    assert "gluon" not in twin
    assert functions(twin).keys() == functions(plain).keys()
    assert arguments(twin) == arguments(plain) == arguments(emit(ROTATED).text)


def test_options_leave_no_trace() -> None:
    text = emit(PLAIN).text
    tree = ast.parse(text)
    names = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    names |= {node.arg for node in ast.walk(tree) if isinstance(node, ast.arg)}
    for word in ("lse", "LN_2", "signs", "hadamard"):
        assert not [name for name in names if word in name], word
    assert "rotate_queries" in functions(emit(ROTATED).text)
    assert {"lse", "signs"} <= set(arguments(emit(ROTATED).text))


def test_no_device_without_the_capability_is_hopper() -> None:
    assert not is_hopper(torch.device("cpu"))


class _Program:
    """What `find_block` asks of Gluon, for one program."""

    def __init__(self, program: int, programs: int, memory: dict[int, int]) -> None:
        self.program, self.programs, self.memory = program, programs, memory

    def program_id(self, axis: int) -> int:
        assert axis == 0
        return self.program

    def num_programs(self, axis: int) -> int:
        assert axis == 0
        return self.programs

    def load(self, address: int) -> int:
        return self.memory[address]

    where = staticmethod(lambda condition, a, b: a if condition else b)
    minimum = staticmethod(min)
    cdiv = staticmethod(lambda a, b: -(-a // b))


def find_blocks(
    program: int, programs: int, starts: tuple[int, ...], counts: tuple[int, ...]
) -> Iterator[tuple[int, ...]]:
    """Yield what `find_block` returns to a program at its turns, for blocks that there are."""
    batch, blocks = len(starts), -(-max(counts) // QUERIES)
    fake = _Program(program, programs, dict(enumerate((*starts, *counts))))
    names = {"gl": fake, "KV_HEADS": 8, "QUERIES": QUERIES}
    find = types.FunctionType(load(emit(PLAIN)).find_block.fn.__code__, names)
    for turn in range(-(-batch * 8 * blocks // programs)):
        is_block, *found = find(turn, (0, batch, batch, blocks), BLOCK_N)
        if is_block:
            yield tuple(found)


@pytest.mark.parametrize(
    ("starts", "counts", "programs"),
    [
        ((0,), (8192,), 132),
        ((6144,), (2048,), 132),
        ((9,), (33,), 7),
        ((700, 0, 5), (300, 0, 1), 240),
    ],
)
def test_programs_share_all_blocks(
    starts: tuple[int, ...], counts: tuple[int, ...], programs: int
) -> None:
    done: Counter[tuple[int, int, int]] = Counter()
    tiles = [0] * programs
    for program in range(programs):
        for b, head, first, start, new, num_tiles in find_blocks(program, programs, starts, counts):
            done[b, head, first] += 1
            tiles[program] += num_tiles
            assert (start, new) == (starts[b], counts[b])
            end = start + min(first + QUERIES, new)
            assert num_tiles == (-(-end // BLOCK_N) if first < new else 1)
    firsts = range(0, max(counts), QUERIES)
    wanted = {(b, h, first) for b in range(len(starts)) for h in range(8) for first in firsts}
    assert done == Counter(wanted)
    if counts == (8192,):  # many turns: all get as much
        assert max(tiles) <= 1.01 * sum(tiles) / programs


def build(spec: PrefillSpec) -> Build:
    """Return the compilation of the kernel of `spec`."""
    source = emit(spec)
    (chosen,) = load(source).CONFIGS
    element = {"float16": "fp16", "bfloat16": "bf16"}[spec.dtype]
    layout = "NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=4)"
    tensor = f"tensordesc<{element}[1, 1, {chosen.block_n}, {spec.key_dim}],{layout}>"
    kinds = {"starts_ptr": "*i32", "counts_ptr": "*i32", "lse_ptr": "*fp32", "signs_ptr": "*fp32"}
    constants = {"BLOCK_N": chosen.block_n, "NUM_STAGES": chosen.num_stages}
    parameters = {}
    for name in (a.arg for a in functions(source.text)["prefill_kernel"].args.args):
        if name in constants:
            continue
        if name.endswith("_ptr"):
            parameters[name] = kinds.get(name, f"*{element}")
        elif name.endswith("_desc"):
            parameters[name] = tensor
        else:
            parameters[name] = (
                "fp32" if name == "scale" else "i32:16" if "stride" in name else "i32"
            )
    return Build(
        source.text,
        "prefill_kernel",
        tuple(parameters.items()),
        tuple(constants.items()),
        num_warps=4,
        maxnreg=load(source).LAUNCH_REGISTERS,
        is_gluon=True,
    )


def check_machine_code(code: MachineCode, products: int) -> None:
    """Check the loop over tiles that all queries see: the shortest that multiplies twice."""
    assert count(code.whole, "UTMALDG") >= 2  # K and V come through TMA
    assert count(code.whole, "USETMAXREG") >= 3
    assert count(code.whole, "HMMA") == 0
    both = [body for body in code.listings if sum(n.startswith("HGMMA") for n in body) == products]
    assert len(both) >= 4  # two teams, tiles with and without queries that must not see all
    loop = min(both, key=len)
    assert not [name for name in loop if name.split(".")[0] in ("LDL", "STL", "I2F", "LDS", "STS")]
    # The second wait is for the product with V: it comes after the exponentials.
    waits = [i for i, name in enumerate(loop) if name.startswith("WARPGROUP.DEPBAR")]
    exponentials = [i for i, name in enumerate(loop) if name.startswith("MUFU.EX2")]
    assert len(waits) == 2
    assert waits[0] < exponentials[0]
    assert exponentials[-1] < waits[1]


@pytest.mark.slow
def test_products_go_on_while_weights_are_made() -> None:
    code = compile_kernels(build(dataclasses.replace(PLAIN, query_block=128)))[0]
    assert code.spills == 0
    check_machine_code(code, 16)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("spec", "products"),
    [
        (ROTATED, 16),
        (PrefillSpec(8, 2, 64, 64, "float16", for_hopper=True, query_block=16), 12),
    ],
    ids=["128", "64"],
)
def test_machine_code(spec: PrefillSpec, products: int) -> None:
    check_machine_code(compile_kernels(build(spec))[0], products)
