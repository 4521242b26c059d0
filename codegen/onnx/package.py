"""The files of an ONNX package beside its graph, all of them the same for equal input.

- `model.onnx`, `model.onnx.data`: graph, and weights as external data
- `genai_config.json`: what ONNX Runtime GenAI wants to know
- `kvxform.json`: model, recipe, plan, passes and format versions
- tokenizer files, copied from the source; `report.json` if there is a report
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import onnx_ir as ir

from kvxform.codecs.base import dtype_name
from kvxform.codegen.onnx.builder import TRANSPOSED, onnx_dtype
from kvxform.codegen.onnx.capability import IR_VERSION, takes_padding
from kvxform.codegen.onnx.forms import Form
from kvxform.codegen.onnx.ports import PAST, PRESENT, is_plain
from kvxform.codegen.onnx.weights import WeightStore
from kvxform.ir.artifact import encode_program
from kvxform.ir.plan import CachePlan
from kvxform.ir.program import Program
from kvxform.tokenizer import tokenizer_files

PACKAGE_VERSION = 1
MODEL, DATA = "model.onnx", "model.onnx.data"
EMBEDDED_BYTES = 1024  # smaller constants stay in the graph file, where shape inference reads them


def write_package(
    model: ir.Model,
    program: Program,
    folder: Path,
    tokenizer_path: str | Path | None,
    recipe: Any,
    report: Any,
    form: Form,
) -> None:
    """Write all files of a package into an empty folder.

    Args:
        model: The graph.
        program: What it was made from.
        folder: An empty folder.
        tokenizer_path: Folder with tokenizer files, GGUF file, or None.
        recipe: A `kvxform.recipe.Recipe`, or None.
        report: A `kvxform.report.Report`, or None.
        form: What the package is.
    """
    assert program.plan is not None, "checked"
    model.metadata_props.update(_metadata(program.plan, recipe, form))
    ir.save(model, folder / MODEL, external_data=DATA, size_threshold_bytes=EMBEDDED_BYTES)
    _write_json(folder / "genai_config.json", genai_config(program))
    _write_json(folder / "kvxform.json", _describe(model, program, recipe, form))
    if report is not None:
        (folder / "report.json").write_text(report.to_json(), encoding="utf-8")
    for name, content in tokenizer_files(tokenizer_path).items():
        (folder / name).write_bytes(content)


def model_name(program: Program) -> str:
    """Return the name of the model; of a path only its last part, for files must not differ."""
    return Path(program.info.name).name


def genai_config(program: Program) -> dict[str, Any]:
    """Return `genai_config.json`; cache names are given where GenAI can manage the cache itself."""
    info, sites = program.info, program.sites
    assert program.plan is not None, "checked"
    first = sites[0]
    names = {"inputs": ("past", PAST), "outputs": ("present", PRESENT)}
    ports = {
        side: {f"{word}_{part}_names": f"{prefix}.%d.{part}" for part in ("key", "value")}
        for side, (word, prefix) in names.items()
        if _is_plain_cache(program)
    }
    decoder = {
        "session_options": {"log_id": "kvxform", "provider_options": []},
        "filename": MODEL,
        "head_size": first.head_dim,
        "hidden_size": first.num_q_heads * first.head_dim,
        "num_attention_heads": first.num_q_heads,
        "num_hidden_layers": len(sites),
        "num_key_value_heads": first.num_kv_heads,
        "inputs": {
            "input_ids": "input_ids",
            "attention_mask": "attention_mask",
            "position_ids": "position_ids",
            **ports.get("inputs", {}),
        },
        "outputs": {"logits": "logits", **ports.get("outputs", {})},
    }
    eos = list(info.eos_token_ids)
    pad = info.pad_token_id if info.pad_token_id is not None else (eos[0] if eos else None)
    context = info.context_length
    model = {
        "type": info.family,
        "bos_token_id": info.bos_token_id,
        "eos_token_id": eos[0] if len(eos) == 1 else eos,
        "pad_token_id": pad,
        "vocab_size": info.vocab_size,
        "context_length": context,
        "decoder": decoder,
    }
    search = {"do_sample": False, "max_length": context, "past_present_share_buffer": False}
    return {
        "model": {k: v for k, v in model.items() if v not in (None, [])},
        "search": {k: v for k, v in search.items() if v is not None},
    }


def _is_plain_cache(program: Program) -> bool:
    assert program.plan is not None, "checked"
    dtype = onnx_dtype(program.dtype)
    return all(is_plain(st, dtype) for s in program.plan.owners for st in s.streams.values())


def _metadata(plan: CachePlan, recipe: Any, form: Form) -> dict[str, str]:
    """Return the metadata of the graph file."""
    return {
        "kvxform.ir_version": str(IR_VERSION),
        "kvxform.level": form.level,
        "kvxform.minimum_onnxruntime": form.runtime,
        "kvxform.opset": str(form.opset),
        "kvxform.padding": "left" if takes_padding(plan) else "none",
        "kvxform.recipe": "none" if recipe is None else str(recipe.name),
    }


def _describe(model: ir.Model, program: Program, recipe: Any, form: Form) -> dict[str, Any]:
    """Return `kvxform.json`: everything that a package was made from, but for values of weights.

    `program` is as in the `program.json` of an artifact. There, `stored` of a weight names the
    initialiser that holds it; `.T` at its end means that it is stored transposed. `folded` has the
    values of weights that are in no initialiser, since other constants were made from them.
    """
    assert program.plan is not None, "checked"
    info = dataclasses.asdict(program.info)
    info |= {"name": model_name(program), "tokenizer_path": None}  # no places on this machine
    table = _weight_table(program)
    return {
        "version": PACKAGE_VERSION,
        "model": info,
        "passes": list(program.passes),
        "facts": program.facts.changed(),
        "recipe": None if recipe is None else recipe.to_data(),
        "plan": program.plan.to_json(),
        "sites": [{"layer": s.layer, "module": s.module} for s in program.sites],
        "program": {**encode_program(program), "info": info, "weights": table},
        "folded": _folded(model, program, table),
        "rejected": [dataclasses.asdict(r) for r in program.rejected],
        "onnx": {
            **dataclasses.asdict(form),
            "ir_version": IR_VERSION,
            "padding": takes_padding(program.plan),
        },
    }


def _weight_table(program: Program) -> dict[str, dict[str, Any]]:
    store = WeightStore.of(program)
    return {
        name: {
            "dtype": dtype_name(weight.dtype),
            "shape": list(weight.shape),
            "stored": store.name(name) + (TRANSPOSED if store.is_transposed(name) else ""),
        }
        for name, weight in program.weights.items()
    }


def _folded(
    model: ir.Model, program: Program, table: Mapping[str, Mapping[str, Any]]
) -> dict[str, list[float]]:
    stored = model.graph.initializers
    read = {str(node.target) for node in program.graph.nodes if node.op == "get_attr"}
    missing = sorted(name for name in read if table[name]["stored"] not in stored)
    return {name: program.weights[name].double().flatten().tolist() for name in missing}


def _write_json(path: Path, data: dict[str, Any]) -> None:
    path.write_text(json.dumps(data, indent=2, sort_keys=True) + "\n", encoding="utf-8")
