"""Emitted kernels: their structure for some plans, and what must hold of every text.

A golden outline has types, functions with parameters, what each does how often, and the passes that
its comments name. One small file is there whole, to show what users read.
"""

from __future__ import annotations

import ast
import re
import subprocess
from collections.abc import Callable

import pytest
import ruff
from outline import (
    idle_operations,
    outline,
    pass_comments,
    static_branches,
    unused_definitions,
    unused_parameters,
)
from triton_cases import codec_stream, int_stream, plain_stream

from kvxform.codecs.fib_vq import FibVqCodec
from kvxform.codecs.lloyd_max import LloydMaxCodec
from kvxform.codegen.triton.emit import KernelSource, emit
from kvxform.codegen.triton.product import ProductSpec
from kvxform.codegen.triton.sites import prefill_spec
from kvxform.codegen.triton.spec import (
    AppendSpec,
    ColumnScoresSpec,
    DecodeSpec,
    GatherSpec,
    KernelSpec,
    PrefillSpec,
    SiteSpec,
    StreamSpec,
)

INT4 = StreamSpec(128, 4, group=128)
INT8 = StreamSpec(128, 8, group=128, symmetric=True)
INT3 = StreamSpec(96, 3, group=32)
BF16 = StreamSpec(128, 16, "bfloat16", group=128)
KIVI_K = StreamSpec(
    128, 2, axis="channel", group=32, zero="float", chunk=128, exact_dtype="float16"
)
KIVI_V = StreamSpec(128, 2, group=32, zero="float", keep=128, exact_dtype="float16")


def make_site(key: StreamSpec, value: StreamSpec, layout: str, dtype: str = "float16") -> SiteSpec:
    return SiteSpec(32, 8, key, value, 64, layout, dtype)


KV4 = make_site(INT4, INT4, "fragment")
KIVI = make_site(KIVI_K, KIVI_V, "rows")
D96 = make_site(INT3, INT3, "rows")
SMALL = StreamSpec(32, 4, group=32, symmetric=True)

OUTLINES: dict[str, tuple[KernelSpec, bool]] = {
    "append_kv4": (AppendSpec(KV4, key_block=128), False),
    "append_kivi2": (AppendSpec(KIVI), False),
    "decode_kv4": (DecodeSpec(KV4, query_block=128), False),
    "decode_kv4_interpret": (DecodeSpec(KV4, query_block=128), True),
    "decode_int8": (DecodeSpec(make_site(INT8, INT8, "fragment")), False),
    "decode_bf16": (DecodeSpec(make_site(BF16, BF16, "fragment", "bfloat16"), window=4096), False),
    "decode_kivi2": (DecodeSpec(KIVI), False),
    "decode_int3_d96": (DecodeSpec(D96, softcap=30.0, has_lse=True), False),
    "gather_kivi2": (GatherSpec(KIVI), False),
    "prefill": (PrefillSpec(32, 8, 128, 128, "bfloat16"), False),
    "prefill_hopper": (prefill_spec(KV4, query_block=128), False),
    "prefill_kivi2": (prefill_spec(KIVI, has_sink_logits=True), False),
    "column_scores": (ColumnScoresSpec(32, 8, 128, "float16"), False),
    "product": (ProductSpec(4096, 6144, "bfloat16", has_bias=True), False),
}
WORDS, LEVELS = (codec_stream(64, codec) for codec in (FibVqCodec(256, 4), LloydMaxCodec(16)))
MORE_SITES = (  # formats whose texts leave out what others need
    make_site(WORDS, WORDS, "rows"),
    make_site(LEVELS, LEVELS, "fragment"),
    make_site(plain_stream(64), int_stream(64, 8), "rows"),
    make_site(int_stream(64, 4, sink=4), plain_stream(64, sink=4), "rows"),
)
WHOLE = AppendSpec(SiteSpec(4, 2, SMALL, SMALL, 16, "rows", "float16"))


def emit_case(name: str) -> KernelSource:
    spec, interpret = OUTLINES[name]
    return emit(spec, interpret=interpret)


@pytest.mark.parametrize("name", OUTLINES)
def test_outline(name: str, golden: Callable[[str, str], None]):
    golden(f"triton/{name}.txt", outline(emit_case(name).text))


def test_a_whole_file(golden: Callable[[str, str], None]):
    text = emit(WHOLE, interpret=True).text
    stable = re.sub(r'("(?:template_hash|kvxform|triton)": )"[^"]*"', r'\1"..."', text)
    assert stable != text
    golden("triton/append_int4_whole.txt", stable)


@pytest.mark.parametrize("name", OUTLINES)
def test_every_text_is_for_one_plan_and_stands_alone(name: str):
    text = emit_case(name).text
    assert static_branches(text) == []
    assert unused_parameters(text) == []
    assert "import kvxform" not in text
    assert "from kvxform" not in text
    tree = ast.parse(text)
    assert ast.unparse(tree.body[-1]).startswith("__kvx_meta__ = ")
    launchers = {
        n.name for n in tree.body if isinstance(n, ast.FunctionDef) and not n.decorator_list
    }
    assert OUTLINES[name][0].kind in launchers


@pytest.mark.parametrize("name", [name for name in OUTLINES if name[:6] in ("append", "decode")])
def test_blocks_name_the_pass_behind_them(name: str):
    spec, _ = OUTLINES[name]
    comments = " ".join(comment for _, comment in pass_comments(emit_case(name).text))
    assert "page-cache" in comments
    assert ("quantize-kv" in comments) == spec.site.key.is_coded
    is_rotated = bool(getattr(spec, "key_block", 0) or getattr(spec, "query_block", 0))
    assert ("rotate-qk" in comments) == is_rotated


def test_no_text_has_what_it_could_do_without(tmp_path):
    sources = [emit_case(name) for name in OUTLINES]
    for site in MORE_SITES:
        sources += [emit(AppendSpec(site, key_block=64)), emit(GatherSpec(site))]
        sources.append(emit(DecodeSpec(site), interpret=True))
    for i, source in enumerate(sources):
        assert unused_definitions(source.text) == [], source.meta["spec"]
        assert idle_operations(source.text) == [], source.meta["spec"]
        (tmp_path / f"kernel_{i}.py").write_text(source.text)
    command = [ruff.find_ruff_bin(), "check", "--isolated", "--select=F", tmp_path]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    formatted = [ruff.find_ruff_bin(), "format", "--isolated", "--line-length=100", "--check"]
    assert subprocess.run([*formatted, tmp_path], capture_output=True).returncode == 0


def test_the_checks_of_this_file_see_what_they_look_for():
    text = """\
@triton.jit
def kernel(x, y, IS_WIDE: tl.constexpr):
    if IS_WIDE:
        x = 1
    if x > 0:
        x = 2
"""
    assert static_branches(text) == ["kernel: if IS_WIDE"]
    assert unused_parameters(text) == ["kernel: y"]
    text = "ONE = tl.constexpr(1)\nTWO = tl.constexpr(2)\n" + text.replace("x = 2", "x = TWO")
    assert unused_definitions(text) == ["kernel", "ONE"]
    assert idle_operations("x + 0, 1 * x, x // 1, x - 1, 0 - x, x * 1.0, 2 * x") == [
        "x + 0",
        "1 * x",
        "x // 1",
    ]
