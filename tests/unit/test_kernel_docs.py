"""docs/kernels.md names the arguments of launchers as emitted modules have them."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from kvxform.codegen.triton.emit import emit
from kvxform.codegen.triton.sites import prefill_spec
from kvxform.codegen.triton.spec import (
    AppendSpec,
    ColumnScoresSpec,
    DecodeSpec,
    GatherSpec,
    KernelSpec,
    RopeSpec,
    SiteSpec,
    StreamSpec,
)

PAGE = Path(__file__).resolve().parents[2] / "docs" / "kernels.md"
PLAIN = StreamSpec(64, 16, "float16", group=64)
REGIONS = StreamSpec(64, 4, group=64, sink=4, keep=16, exact_dtype="float16")


def make_site(stream: StreamSpec) -> SiteSpec:
    return SiteSpec(4, 2, stream, stream, 16, "rows", "float16")


LEAST, MOST = make_site(PLAIN), make_site(REGIONS)
SCORES = {"has_alibi": True, "has_sink_logits": True, "has_lse": True}
SPECS: dict[str, tuple[KernelSpec, KernelSpec]] = {  # with as few arguments as can be, and all
    "append": (AppendSpec(LEAST), AppendSpec(MOST, RopeSpec(64), 64, True)),
    "decode": (DecodeSpec(LEAST), DecodeSpec(MOST, 64, True, has_slot_bias=True, **SCORES)),
    "gather": (GatherSpec(LEAST), GatherSpec(MOST)),
    "prefill": (
        prefill_spec(LEAST),
        prefill_spec(MOST, query_block=64, has_signs=True, **SCORES),
    ),
    "column_scores": (
        ColumnScoresSpec(4, 2, 64, "float16"),
        ColumnScoresSpec(4, 2, 64, "float16", has_alibi=True),
    ),
}


def documented(kind: str) -> str:
    """Return the arguments in the page, with brackets around those that a plan may not need."""
    (found,) = re.findall(rf"^{kind}\((.*?)\)$", PAGE.read_text(encoding="utf-8"), re.M | re.S)
    return re.sub(r"\s+", " ", found)


def emitted(spec: KernelSpec) -> str:
    """Return the arguments of the launcher of an emitted module."""
    tree = ast.parse(emit(spec, interpret=True).text)
    (launcher,) = (n for n in tree.body if isinstance(n, ast.FunctionDef) and n.name == spec.kind)
    before, after = launcher.args.args, launcher.args.kwonlyargs
    return ", ".join([a.arg for a in before] + ["*"] + [a.arg for a in after])


@pytest.mark.parametrize("kind", SPECS)
def test_the_page_has_the_arguments_of_every_launcher(kind: str):
    least, most = SPECS[kind]
    text = documented(kind)
    assert emitted(most) == re.sub(r"[][]", "", text)
    assert emitted(least) == re.sub(r"\[[^]]*\], ", "", text)
