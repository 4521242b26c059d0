"""The ONNX lowering: a cached Program to a folder that stock ONNX Runtime runs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import onnx_ir as ir
from torch import fx

from kvxform.atomic import atomic_folder
from kvxform.codegen.onnx.builder import Builder
from kvxform.codegen.onnx.capability import check_program
from kvxform.codegen.onnx.centers import lift_centers
from kvxform.codegen.onnx.description import model_name
from kvxform.codegen.onnx.emission import Emission, Emitted, find_emitter
from kvxform.codegen.onnx.fallback import Fallback
from kvxform.codegen.onnx.forms import Form, OnnxOptions
from kvxform.codegen.onnx.frames import make_frame
from kvxform.codegen.onnx.functions import fold_layers
from kvxform.codegen.onnx.head import head_input, last_tokens
from kvxform.codegen.onnx.node_map import note_absorbed
from kvxform.codegen.onnx.package import write_package
from kvxform.codegen.onnx.ports import CachePorts
from kvxform.codegen.onnx.provenance import provenance_notes
from kvxform.codegen.onnx.roles import scope_paths
from kvxform.codegen.onnx.row_operations import emit_on_rows
from kvxform.codegen.onnx.weights import WeightStore
from kvxform.ir.program import Program


def export_onnx(
    program: Program,
    folder: str | Path,
    options: OnnxOptions | None = None,
    *,
    tokenizer_path: str | Path | None = None,
    recipe: Any = None,
    report: Any = None,
    progress: Callable[[str], None] | None = None,
    check: Callable[[Path, Form], None] | None = None,
) -> Path:
    """Write `program` as an ONNX package.

    Args:
        program: After `insert-cache`. Its page layout matters to a paged package alone, as the
            block size; cache planes of the others are contiguous.
        folder: Where to write; an older package there is replaced at once or not at all.
        options: What is asked of the package; the best that is legal on the CPU if None.
        tokenizer_path: Folder of tokenizer files to copy; the one of the program if None.
        recipe: The `kvxform.recipe.Recipe` that was applied, or None.
        report: The `kvxform.report.Report` of it, or None.
        progress: Called with a line of text as the work goes on.
        check: Called with the package and its form before it gets its place; what it raises leaves
            nothing behind.

    Returns:
        The folder.

    Raises:
        CodegenError: KVX401 if the program has something that cannot be expressed, KVX403 if the
            options are not legal for it; nothing has been written then.
    """
    say = progress or (lambda _: None)
    form, fallback = check_program(program, options)
    say("emit graph")
    model = emit_model(program, fallback, form)
    say("write package")
    with atomic_folder(folder) as temporary:
        source = tokenizer_path or program.info.tokenizer_path
        write_package(model, program, temporary, source, recipe, report, form)
        if check is not None:
            check(temporary, form)
    return Path(folder)


def emit_model(program: Program, fallback: Fallback, form: Form) -> ir.Model:
    """Return the ONNX model of a checked program; it shares the weight tensors.

    Args:
        program: What to emit.
        fallback: What `check_program` returned: translations of operations without an emitter.
        form: What the package is to be.
    """
    if form.level in ("L3", "L4"):
        program = lift_centers(program)
    assert program.plan is not None, "checked"
    builder, ports = Builder(), CachePorts(program.plan, form.capacity)
    frame = make_frame(form, builder)
    store = WeightStore.of(program, form.weights)
    e = Emission(program, builder, frame.inputs, store, ports, form=form, paged=frame.paged)
    notes = provenance_notes(program)
    last = _emit_nodes(e, fallback, notes)
    logits = frame.logits(builder, last, program.info.vocab_size)
    outputs = [logits, *ports.present.values()]
    builder.prune(outputs)
    note_absorbed(notes, e.values, builder.nodes)
    functions: list[ir.Function] = []
    if form.level == "L5":
        outputs, functions = fold_layers(e, notes, outputs)
        builder.prune(outputs)
    graph = ir.Graph(
        [*frame.graph_inputs(builder.nodes), *ports.past.values()],
        outputs,
        nodes=builder.nodes,
        initializers=list(builder.initializers.values()),
        opset_imports=builder.opset_imports(form.opset),
        name=model_name(program),
    )
    return ir.Model(graph, ir_version=form.ir_version, producer_name="kvxform", functions=functions)


def _emit_nodes(
    e: Emission, fallback: Fallback, notes: Mapping[fx.Node, Mapping[str, str]]
) -> ir.Value:
    """Emit every node of the graph in order into `e.values`; return the logits."""
    values, cut = e.values, head_input(e.program) if e.form.logits == "last" else None
    paths = scope_paths(e.program)
    values |= {
        e.program.placeholder("input_ids"): e.inputs.input_ids,
        e.program.placeholder("position_ids"): e.inputs.position_ids,
        e.program.placeholder("cache"): None,
    }
    for node in e.program.graph.nodes:
        if node in e.ready:
            values[node] = e.ready[node]
        elif node.op == "get_attr":
            values[node] = e.weight(str(node.target))
        elif node.op == "call_function":
            with e.builder.scope(paths[node], notes[node]):
                found = emit_call(e, node, values, fallback)
                values[node] = last_tokens(e, found) if node is cut else found
        elif node.op == "output":
            (logits,) = node.all_input_nodes
            last = values[logits]
            assert isinstance(last, ir.Value), "a program has one output, the logits"
            return last
    raise AssertionError("a graph has an output")


def emit_call(
    e: Emission, node: fx.Node, values: Mapping[fx.Node, Emitted], fallback: Fallback
) -> Emitted:
    """Emit one call on the values of its arguments, by our table or by that of torch."""
    if (on_rows := emit_on_rows(e, node)) is not None:
        return on_rows
    emitter = find_emitter(node)
    if emitter is None:
        return fallback.emit(e, node, [values[source] for source in node.all_input_nodes])

    def value_of(source: fx.Node) -> Any:
        return values[source]

    args, kwargs = fx.node.map_arg((node.args, dict(node.kwargs)), value_of)
    return emitter(e, node, *args, **kwargs)
