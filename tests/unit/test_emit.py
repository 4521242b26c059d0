"""Specs to text: what is the same, what differs, what is refused. The template is a small fake."""

from __future__ import annotations

import ast
import dataclasses
import json
import re
import subprocess
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

import jinja2
import jinja2.meta
import pytest
import ruff

from kvxform.codegen.triton import emit as core
from kvxform.codegen.triton import formatting, loading, registry
from kvxform.codegen.triton.emit import KernelSource, emit
from kvxform.codegen.triton.registry import Emission
from kvxform.codegen.triton.spec import GatherSpec, KernelSpec, SiteSpec, StreamSpec
from kvxform.errors import CodegenError

TEMPLATES = {
    "outer.jinja": """\
{% include "_header.jinja" %}
{% import "_launch.jinja" as launch %}
{% import "inner.jinja" as inner %}
from typing import NamedTuple

import torch

{{ launch.cache({"pool": "What is stored."}) }}
{{ launch.config({"num_warps": "Warps."}, [[4], [8]]) }}
def {{ name }}(x):
    return {{ inner.value() }} + {{ spec.site.page_size }} // x
""",
    "inner.jinja": "{% macro value() %}1{% endmacro %}",
    "broken.jinja": "def f(:\n    pass\n",
    "greedy.jinja": "from kvxform.ir import plan\n",
    "unknown.jinja": "{{ nothing }}\n",
}


new_environment = core._environment.__wrapped__  # as it is, not the one that is kept


@dataclasses.dataclass(frozen=True)
class FakeSpec(GatherSpec):
    kind: ClassVar[str] = "fake"
    template: str = "outer.jinja"


def fake_spec(page_size: int = 16, template: str = "outer.jinja") -> FakeSpec:
    stream = StreamSpec(64, 4, group=64, symmetric=True)
    return FakeSpec(SiteSpec(4, 2, stream, stream, page_size, "rows", "float16"), template)


def make_environment(templates: dict[str, str]) -> jinja2.Environment:
    environment = new_environment()
    environment.loader = jinja2.ChoiceLoader([jinja2.DictLoader(templates), environment.loader])
    return environment


@pytest.fixture(autouse=True)
def _fake_kernel(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    def make_context(spec: FakeSpec, *, interpret: bool) -> Emission:
        return Emission(spec.template, {"name": "run"})

    environment = make_environment(TEMPLATES)
    monkeypatch.setattr(core, "_environment", lambda: environment)
    monkeypatch.setitem(registry.EMITTERS, FakeSpec, make_context)
    monkeypatch.setenv("KVXFORM_CACHE_DIR", str(tmp_path))
    emit.cache_clear()
    yield
    emit.cache_clear()


def test_equal_specs_give_equal_bytes_and_other_specs_another_name():
    first = emit(fake_spec())
    emit.cache_clear()
    again = emit(fake_spec())
    assert again is not first
    assert (again.text, again.name, again.meta) == (first.text, first.name, first.meta)
    others = [emit(fake_spec(32)), emit(fake_spec(), interpret=True)]
    assert len({first.name, *(other.name for other in others)}) == 3
    assert others[1].name.endswith("_interpret")


def test_the_name_follows_every_template_that_is_used(monkeypatch: pytest.MonkeyPatch):
    before = emit(fake_spec())
    emit.cache_clear()
    changed = make_environment({**TEMPLATES, "inner.jinja": "{% macro value() %}2{% endmacro %}"})
    monkeypatch.setattr(core, "_environment", lambda: changed)
    after = emit(fake_spec())
    assert after.name != before.name
    assert after.meta["template_hash"] != before.meta["template_hash"]
    assert after.meta["spec_hash"] == before.meta["spec_hash"]


def test_references_between_templates_are_found_as_jinja_finds_them():
    environment = new_environment()
    names = environment.list_templates()
    assert "_header.jinja" in names
    for name in names:
        source = environment.loader.get_source(environment, name)[0]
        used = set(jinja2.meta.find_referenced_templates(environment.parse(source)))
        found = set(core._REFERENCE.findall(re.sub(r"{#.*?#}", "", source, flags=re.DOTALL)))
        assert found == used, name


def test_text_is_formatted_and_says_what_it_was_made_from():
    source = emit(fake_spec())
    check = [ruff.find_ruff_bin(), "format", "--isolated", "--line-length=100", "--check", "-"]
    done = subprocess.run(check, input=source.text.encode(), capture_output=True)
    assert done.returncode == 0
    docstring = ast.get_docstring(ast.parse(source.text)) or ""
    assert "4 query heads, 2 KV heads, float16" in docstring
    assert "K: head_dim 64, int4, one scale for 64 channels, no zero point, 4.25 bits" in docstring


def test_meta_is_in_the_text_and_is_plain_data():
    source = emit(fake_spec())
    module = loading.load(source)
    assert module.__kvx_meta__ == source.meta == json.loads(json.dumps(source.meta))
    assert source.meta["kernel"] == "fake"
    assert source.meta["spec"]["site"]["page_size"] == 16
    assert source.meta["bytes_per_token"] == 2 * 2 * (64 / 2 + 2)
    assert source.meta["byte_limit_us_per_million_tokens"] == {
        "1000 GB/s": 136.0,
        "3000 GB/s": 45.333,
    }


def test_a_second_process_does_not_format_again(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    first = emit(fake_spec())
    (entry,) = (tmp_path / "formatted").iterdir()
    emit.cache_clear()
    with monkeypatch.context() as patch:
        patch.setattr(formatting.subprocess, "run", lambda *_, **__: pytest.fail("ruff ran"))
        assert emit(fake_spec()).text == first.text
    entry.write_bytes(entry.read_bytes()[:-20])  # a damaged entry counts as none
    emit.cache_clear()
    assert emit(fake_spec()).text == first.text


def test_a_read_only_disk_is_no_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    blocked = tmp_path / "file"
    blocked.write_text("not a folder")
    monkeypatch.setenv("KVXFORM_CACHE_DIR", str(blocked))
    module = loading.load(emit(fake_spec(128)))
    assert module.run(1) == 129


def test_loading_runs_the_emitted_text_not_the_file(tmp_path: Path):
    source = emit(fake_spec(64))
    path = tmp_path / "kernels" / f"{source.name}.py"
    path.parent.mkdir()
    path.write_text("raise SystemExit('tampered')")
    module = loading.load(source)
    assert module.run(1) == 65
    assert path.read_text() == source.text
    assert loading.load(source) is module


def test_tracebacks_show_the_line():
    module = loading.load(emit(fake_spec(256)))
    with pytest.raises(ZeroDivisionError) as caught:
        module.run(0)
    assert "return 1 + 256 // x" in "".join(traceback.format_exception(caught.value))


def test_a_module_that_fails_to_import_is_not_kept():
    source = KernelSource("fails", "1 / 0\n", {}, fake_spec())
    for _ in range(2):
        with pytest.raises(ZeroDivisionError):
            loading.load(source)


def test_what_every_module_offers():
    module = loading.load(emit(fake_spec()))
    assert module.Cache._fields == ("pool",)
    assert [tuple(config) for config in module.CONFIGS] == [(4,), (8,)]


def test_an_unknown_kind_is_refused():
    class Nothing(KernelSpec):
        kind: ClassVar[str] = "nothing"

    with pytest.raises(CodegenError, match=r"KVX401 .* known kind; got 'nothing'"):
        emit(Nothing())


def test_broken_text_is_refused_with_its_line():
    with pytest.raises(CodegenError, match=r"KVX402 .* valid Python") as caught:
        emit(fake_spec(template="broken.jinja"))
    assert "   1 | def f(:" in caught.value.__notes__[0]


def test_text_that_needs_kvxform_is_refused():
    with pytest.raises(CodegenError, match=r"KVX402 .* must not need kvxform; got kvxform\.ir"):
        emit(fake_spec(template="greedy.jinja"))


def test_a_variable_that_nobody_set_is_refused():
    with pytest.raises(jinja2.UndefinedError, match="nothing"):
        emit(fake_spec(template="unknown.jinja"))


def test_long_tables_are_not_repeated():
    stream = StreamSpec(64, 8, group=64, block=2, gain="norm", table=tuple(range(512)))
    source = emit(GatherSpec(SiteSpec(2, 1, stream, stream, 16, "rows", "float16")))
    assert source.meta["spec"]["site"]["key"]["table"].startswith("512 numbers, ")
    other = dataclasses.replace(stream, table=tuple(range(1, 513)))
    again = emit(GatherSpec(SiteSpec(2, 1, other, other, 16, "rows", "float16")))
    assert again.name != source.name
