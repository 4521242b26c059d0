"""Benchmarks off the GPU: result files, tables, plots, problems, and that all of them import."""

from __future__ import annotations

import argparse
import importlib
import json
import math
from pathlib import Path

import pytest
import torch

from kvxform.codecs.base import make_codec

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
SCRIPTS = ("decode_attention", "append", "prefill", "end_to_end", "performance_page", "peers")
RUN = {
    "command": "python benchmarks/decode_attention.py",
    "device": "a device",
    "driver": "1.2",
    "versions": {"torch": "2.0"},
    "commit": "abc",
    "date": "2026-01-01T00:00:00+00:00",
    "read_stream_gb_s": 3000.0,
}


@pytest.fixture(autouse=True)
def _benchmarks_on_path(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))


def load(name: str):
    return importlib.import_module(name)


def decode_row(name: str, us: float, *, shape: str = "8x32k", stored: str = "bf16"):
    return {
        "key": f"{shape}/{name}",
        "shape": shape,
        "name": name,
        "run": 0,
        "stored": stored,
        "us": us,
        "us_low": us - 1,
        "us_high": us + 1,
        "gb_s": 1000.0,
        "stream_share": 0.5,
        "bits_per_value": 16.0,
        "format_error": 2e-3,
        "captured": True,
    }


@pytest.fixture
def results(tmp_path) -> Path:
    failed = {"key": "8x32k/fa3", "shape": "8x32k", "name": "fa3", "run": 0, "error": "a | b"}
    rows = [
        decode_row("sdpa-flash", 400.0),
        decode_row("flex", 350.0),
        decode_row("fa3-fp8", 200.0, stored="fp8"),
        decode_row("ours-int4", 100.0, stored="int4") | {"kernel_error": 1e-3},
        failed,
    ]
    file = {"benchmark": "decode_attention", "runs": [RUN], "rows": rows}
    (tmp_path / "decode_attention.json").write_text(json.dumps(file))
    step = {
        "key": "step/kv4",
        "name": "step/kv4",
        "run": 0,
        "step_ms": 9.0,
        "step_ms_low": 8.9,
        "step_ms_high": 9.1,
        "tokens_per_s": 888.0,
        "weight_bytes": 15e9,
        "cache_bytes": 9e9,
        "floor_ms": 8.0,
        "times_floor": 1.125,
        "peak_bytes": 30e9,
    }
    file = {"benchmark": "end_to_end", "runs": [RUN], "rows": [step]}
    (tmp_path / "end_to_end.json").write_text(json.dumps(file))
    return tmp_path


@pytest.mark.parametrize("name", SCRIPTS)
def test_imports_without_optional_packages(name):
    assert load(name).__doc__


def test_keys_of_rows_and_only():
    keys = load("decode_attention").row_keys
    options = argparse.Namespace(
        peers="fa3,flex", formats="int4", shapes="1x32k,8x32k", only="8x32k/"
    )
    assert keys(options) == ["8x32k/fa3", "8x32k/flex", "8x32k/ours-int4"]
    options.only = "int4,1x32k/fa3"
    assert keys(options) == ["1x32k/fa3", "1x32k/ours-int4", "8x32k/ours-int4"]


def test_result_file_keeps_rows_of_other_parts_and_replaces_its_own(tmp_path):
    make, path = load("results").ResultFile, tmp_path / "new" / "a.json"
    first = make(path, "append")
    first.start_run({"n": 1})
    first.add("x", {"us": 1.0})
    first.add("y", {"us": 2.0})
    second = make(path, "append")
    second.start_run({"n": 2})
    second.add("y", {"us": 3.0})
    assert [row["key"] for row in second.this_run()] == ["y"]
    data = json.loads(path.read_text())
    found = {row["key"]: (row["run"], row["us"]) for row in data["rows"]}
    assert found == {"x": (0, 1.0), "y": (1, 3.0)}
    assert [run["n"] for run in data["runs"]] == [1, 2]
    with pytest.raises(SystemExit, match="holds results of append"):
        make(path, "prefill")


def test_commands_are_those_of_a_reader():
    typed = ["/root/x/append.py", "--json", "a.json", "--only", "32/ours int4", "--commit", "1"]
    found = load("results").describe_command([*typed, "--quick"])
    assert found == "python benchmarks/append.py --only '32/ours int4' --quick"


def test_decode_table_compares_with_the_best_other_bf16_of_the_rows(results):
    rows = json.loads((results / "decode_attention.json").read_text())["rows"]
    lines = load("tables").decode_table(rows, "8x32k").splitlines()
    cells = {line.split("|")[1].strip(): line for line in lines[2:]}
    assert list(cells) == ["ours-int4", "fa3-fp8", "flex", "sdpa-flash", "fa3"]
    assert "3.50x" in cells["ours-int4"]
    assert "a / b" in cells["fa3"], "a bar would begin another column"
    assert len({line.count("|") for line in lines}) == 1


def test_ours_is_never_the_baseline():
    rows = [decode_row("ours-bf16", 10.0), decode_row("fa3", 20.0)]
    assert load("tables").best_bf16(rows, "8x32k") == 20.0
    assert load("tables").best_bf16(rows[:1], "8x32k") is None


def test_page_names_command_device_versions_and_date(results):
    page = load("performance_page")
    text = "a\n<!-- table: decode/8x32k -->\nold\n<!-- end -->\nb\n"
    filled = page.fill_page(text, page.read_results(results))
    assert filled.startswith("a\n<!-- table: decode/8x32k -->\n| what ")
    assert filled.endswith("<!-- end -->\nb\n")
    assert "old" not in filled
    for fact in ("`python benchmarks/decode_attention.py`", "a device", "torch 2.0", "2026-01-01"):
        assert fact in filled
    assert page.fill_page(filled, page.read_results(results)) == filled


def test_page_says_what_is_missing_and_refuses_unknown_tables(results):
    page = load("performance_page")
    found = page.read_results(results)
    assert page.fill_block("append", found) == page.MISSING
    assert page.fill_block("decode/1x32k", found) == page.MISSING
    with pytest.raises(ValueError, match="no table is called 'nothing'"):
        page.fill_block("nothing", found)


def test_files_of_one_benchmark_are_joined(results):
    name = "decode_attention"
    rows = [decode_row("flex", 300.0), decode_row("ours-int2", 60.0, stored="int2")]
    file = {"benchmark": name, "runs": [RUN | {"date": "later"}], "rows": rows}
    (results / "decode_attention_more.json").write_text(json.dumps(file))
    found = load("performance_page").read_results(results)[name]
    assert [run["date"] for run in found["runs"]] == [RUN["date"], "later"]
    runs = {row["name"]: row["run"] for row in found["rows"]}
    assert (runs["flex"], runs["ours-int2"], runs["sdpa-flash"], runs["fa3"]) == (1, 1, 0, 0)


def test_the_pages_in_docs_are_up_to_date():
    page = load("performance_page")
    for path in page.PAGES:
        text = path.read_text(encoding="utf-8")
        assert page.fill_page(text, page.read_results(page.RESULTS)) == text, path.name


def test_plots_are_drawn_and_the_same_each_time(results, tmp_path):
    pytest.importorskip("matplotlib")
    plots = load("plots")
    found = load("performance_page").read_results(results)
    first, second = (plots.draw_all(found, tmp_path / name) for name in ("a", "b"))
    assert [path.name for path in first] == ["decode_attention.svg", "end_to_end.svg"]
    assert "ours-int4" in first[0].read_text()
    for one, other in zip(first, second, strict=True):
        assert one.read_bytes() == other.read_bytes()


def test_enough_copies_that_none_stays_in_l2():
    copies = load("gpu_timing").copies_for
    assert (copies(1e9), copies(100e6), copies(401e6)) == (2, 4, 2)
    assert copies(36e6) * 36e6 >= 400e6


def test_timing_summary():
    timing = load("gpu_timing").Timing.of([float(n) for n in range(11)], captured=True)
    assert (timing.median_us, timing.low_us, timing.high_us, timing.turns) == (5.0, 1.0, 9.0, 11)


def test_pages_hold_what_dense_tensors_hold():
    problems = load("problems")
    lengths = (5, 0, 33)
    x = torch.randn(3, 2, 40, 4)
    table = problems.make_block_table(lengths, 16, first_page=1)
    assert sorted(table[table > 0].tolist()) == [1, 2, 3, 4]
    pages = problems.to_pages(x, table, lengths, 16)
    for row, length in enumerate(lengths):
        dense = pages[table[row].long()].flatten(0, 1)[:length].transpose(0, 1)
        torch.testing.assert_close(dense, x[row, :, :length], rtol=0, atol=0)


def test_exact_answers_are_those_of_sdpa():
    problems = load("problems")
    problem = problems.make_problem("test", dtype=torch.float64)
    assert problem.is_ragged
    assert problem.checked_rows == (0, 1)
    for row, length in enumerate(problem.lengths):
        k, v = (x[row, :, :length].repeat_interleave(4, 0) for x in (problem.k, problem.v))
        q = problem.q[row][:, None]
        out = torch.nn.functional.scaled_dot_product_attention(q, k, v)[:, 0]
        wanted = torch.stack([out[0:4], out[20:24]])
        torch.testing.assert_close(problem.exact[row], wanted)
        whole = problems.checked_part(out[None], (0,))
        torch.testing.assert_close(whole[0], wanted)


def test_rows_for_xformers_decode_to_the_input():
    x = torch.randn(1, 2, 3, 128)
    rows = load("peers").encode_for_xformers(x)
    assert rows.shape == (1, 3, 2, 1, 17)
    assert rows.dtype == torch.int32
    scale, shift = rows[..., :1].contiguous().view(torch.float16).float().split(1, -1)
    codes = (rows[..., 1:, None] >> (4 * torch.arange(8))) & 15
    back = (codes.flatten(-2) * scale + shift)[:, :, :, 0].transpose(1, 2)
    codec = make_codec({"codec": "int", "bits": 4, "zero": "float"})
    torch.testing.assert_close(back, codec.decode(codec.encode(x), torch.float32))


@pytest.mark.slow
@pytest.mark.triton
def test_our_caches_on_a_small_problem():
    """The errors that the benchmark reports, on the twins in Triton's interpreter."""
    caches, problems = load("caches"), load("problems")
    problem = problems.make_problem("test", dtype=torch.float16)
    filled = caches.fill("int4", problem, 64)
    assert filled.cache_bytes == sum(problem.lengths) * 2 * 8 * 128 * (4 + 32 / 128) / 8
    decoder = caches.Decoder(filled, problem)
    decoder.out.fill_(math.nan)
    (call,) = decoder.calls([filled.copy()], decoder.module.CONFIGS[0])
    out = problems.checked_part(call(), problem.checked_rows)
    assert problems.relative_error(out, caches.attend_stored(filled, problem)) < 2e-3
    assert 0.03 < problems.relative_error(out, problem.exact) < 0.3


@pytest.mark.slow
def test_end_to_end_of_a_tiny_model(tmp_path, monkeypatch, capsys):
    path = tmp_path / "end_to_end.json"
    arguments = [
        "--tiny",
        "--lowering",
        "eager",
        "--quick",
        "--batch-size",
        "2",
        "--length",
        "600",
        "--device",
        "cpu",
    ]
    only = "huggingface,step/kv4$,step/kv4-fused,largest/kv4"
    arguments += ["--budget-gb", "0.001", "--only", only]
    monkeypatch.setattr("sys.argv", ["end_to_end.py", *arguments, "--json", str(path)])
    load("end_to_end").main()
    rows = {row["key"]: row for row in json.loads(path.read_text())["rows"]}
    assert not [row for row in rows.values() if "error" in row]
    assert set(rows) == {
        "step/huggingface-static", "step/kv4", "step/kv4-fused", "largest/kv4",
    }  # fmt: skip
    plain, ours = rows["step/huggingface-static"], rows["step/kv4"]
    assert ours["weight_bytes"] == pytest.approx(plain["weight_bytes"], rel=0.01)  # no norms
    # 2 layers, 2 heads of 16 channels, K and V; the middle of 22 steps up to 600 tokens
    assert plain["cache_bytes"] == 2 * 600 * 2 * 2 * 2 * 16 * 2
    assert ours["cache_bytes"] == 2 * 589 * 2 * 2 * 2 * 16 * (4 + 32 / 16) / 8
    largest = rows["largest/kv4"]
    fits, row_bytes = largest["largest_batch"], largest["row_bytes"]
    assert fits * row_bytes <= 1e6 - largest["weight_bytes"] < (fits + 1) * row_bytes
    assert "kv4" in capsys.readouterr().out


def test_onnxruntime_attends_over_int8_buffers_and_appends_the_newest_token():
    problems = load("problems")
    problem = problems.make_problem("test", dtype=torch.float16)
    calls, cache_bytes = load("peer_onnxruntime").prepare_calls(problem)
    out = calls[0]().reshape(problem.q.shape)
    error = problems.relative_error(problems.checked_part(out, problem.checked_rows), problem.exact)
    assert 1e-4 < error < 0.03  # rounding to 8 bits, and no more
    assert cache_bytes == 2 * (20 + 3) * 8 * 128
