from __future__ import annotations

import operator
import os

import pytest
import torch

import kvxform.ir.ops as kvx
from kvxform.ir.targets import (
    PYTHON_FUNCTIONS,
    call_problem,
    keyword_order,
    resolve_target,
    target_name,
)

aten = torch.ops.aten


def all_aten_names() -> list[str]:
    names = (n for n in torch._C._dispatch_get_all_op_names() if n.startswith("aten::"))
    return [name.replace("::", ".") for name in names]


@pytest.mark.parametrize(
    ("target", "name"),
    [
        (aten.relu.default, "aten.relu"),
        (aten.add.Tensor, "aten.add.Tensor"),
        (aten.__and__.Tensor, "aten.__and__.Tensor"),
        (kvx.ROPE, "kvx.rope"),
        (operator.mul, "py.mul"),
    ],
)
def test_name_and_function_go_both_ways(target, name):
    assert target_name(target) == name
    assert resolve_target(name) is target


@pytest.mark.parametrize(
    "target", [torch.relu, os.system, aten.relu, [], None, operator.methodcaller]
)
def test_other_things_have_no_name(target):
    assert target_name(target) is None


def test_no_op_of_torch_that_touches_files_or_writes_in_place_resolves():
    resolved = [op for op in map(resolve_target, all_aten_names()) if op is not None]
    assert len(resolved) > 1000
    for op in resolved:
        schema = op._schema
        assert not schema.is_mutable, schema
        assert not [a for a in schema.arguments if "file" in a.name], schema


def test_python_functions_are_arithmetic_on_sizes():
    allowed = {"getitem", "add", "sub", "mul", "floordiv", "mod", "neg"}
    allowed |= {"eq", "ne", "lt", "le", "gt", "ge"}
    assert {name.removeprefix("py.") for name in PYTHON_FUNCTIONS} == allowed


def test_calls_are_compared_with_the_schema():
    assert call_problem(aten.add.Tensor, 2, ["alpha"]) is None
    assert call_problem(aten.add.Tensor, 3, []) == "takes fewer than 3 positional arguments"
    assert call_problem(aten.add.Tensor, 1, []) == "needs the argument 'other'"
    assert call_problem(aten.add.Tensor, 2, ["other"]) == "takes no argument 'other' here"
    assert call_problem(operator.mul, 2, ["a"]) == "takes no keyword arguments"


def test_keywords_are_ordered_as_in_the_schema():
    given = ["causal", "scale", "layer"]
    assert keyword_order(kvx.ATTENTION, given) == ["layer", "scale", "causal"]
    assert keyword_order(kvx.HADAMARD, ["z", "a", "block"]) == ["block", "a", "z"]
