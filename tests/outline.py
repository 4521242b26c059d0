"""The structure of emitted text: what a golden file of it holds, and checks by reading the tree."""

from __future__ import annotations

import ast
import io
import re
import tokenize
from collections import Counter
from collections.abc import Iterator

PASSES = ("insert-cache", "page-cache", "quantize-kv", "rotate-qk")
MATRIX = ("dot", "mma_v2", "warpgroup_mma")
COUNTED = {
    "load": "loads",
    "store": "stores",
    "inline_asm_elementwise": "assembly",
    **dict.fromkeys(MATRIX, "matrix products"),
}


IDLE = {(ast.Add, 0), (ast.Sub, 0), (ast.LShift, 0), (ast.RShift, 0)}
IDLE |= {(ast.Mult, 1), (ast.FloorDiv, 1), (ast.Mod, 1)}


def outline(text: str) -> str:
    """Return the structure of an emitted module: types, functions, what they do, pass comments."""
    tree = ast.parse(text)
    comments = pass_comments(text)
    lines = []
    for node in tree.body:
        if isinstance(node, ast.ClassDef):
            fields = [f"    {n.target.id}" for n in node.body if isinstance(n, ast.AnnAssign)]
            lines += ["", f"class {node.name}", *fields]
        elif isinstance(node, ast.FunctionDef):
            lines += ["", *_function(node, comments)]
    (configs,) = (n for n in tree.body if _assigns(n, "CONFIGS"))
    return "\n".join([f"configs: {len(configs.value.elts)}", *lines]) + "\n"


def _function(node: ast.FunctionDef, comments: list[tuple[int, str]]) -> Iterator[str]:
    kind = f"{_jit(node)} " if _jit(node) else ""
    keyword_only = ["*", *(a.arg for a in node.args.kwonlyargs)] if node.args.kwonlyargs else []
    names = [a.arg for a in (*node.args.posonlyargs, *node.args.args)] + keyword_only
    yield f"{kind}def {node.name}({', '.join(names)})"
    counts = counted(node)
    if counts:
        yield "    " + ", ".join(f"{name} {counts[name]}" for name in sorted(counts))
    for line, comment in comments:
        if node.lineno <= line <= (node.end_lineno or 0):
            yield f"    {comment}"


def counted(node: ast.AST) -> Counter[str]:
    """Return how many calls and loops of each interesting kind are below `node`."""
    found: Counter[str] = Counter()
    for child in ast.walk(node):
        if isinstance(child, ast.For | ast.While):
            found["loops"] += 1
        elif isinstance(child, ast.If | ast.IfExp):
            found["branches"] += 1
        elif isinstance(child, ast.Call) and isinstance(child.func, ast.Attribute):
            name = COUNTED.get(child.func.attr)
            found.update([name] if name else [])
    return found


def pass_comments(text: str) -> list[tuple[int, str]]:
    """Return line and text of every comment that names a pass."""
    tokens = tokenize.generate_tokens(io.StringIO(text).readline)
    named = re.compile("|".join(PASSES))
    return [
        (token.start[0], token.string)
        for token in tokens
        if token.type == tokenize.COMMENT and named.search(token.string)
    ]


def kernels(tree: ast.Module) -> list[ast.FunctionDef]:
    """Return the functions that Triton or Gluon compiles."""
    return [n for n in tree.body if isinstance(n, ast.FunctionDef) and _jit(n)]


def static_branches(text: str) -> list[str]:
    """Return the branches of kernels whose outcome is known when they are emitted."""
    tree = ast.parse(text)
    constants = {t.id for n in tree.body if isinstance(n, ast.Assign) for t in n.targets}
    found = []
    for function in kernels(tree):
        known = constants | {
            a.arg
            for a in (*function.args.args, *function.args.kwonlyargs)
            if a.annotation is not None and "constexpr" in ast.unparse(a.annotation)
        }
        for node in ast.walk(function):
            if isinstance(node, ast.If | ast.IfExp):
                names = {n.id for n in ast.walk(node.test) if isinstance(n, ast.Name)}
                if names <= known:
                    found.append(f"{function.name}: if {ast.unparse(node.test)}")
    return found


def unused_parameters(text: str) -> list[str]:
    """Return parameters of kernels that their bodies never read; launchers have a contract."""
    found = []
    for function in kernels(ast.parse(text)):
        used = {n.id for n in ast.walk(function) if isinstance(n, ast.Name)}
        found += [f"{function.name}: {a.arg}" for a in function.args.args if a.arg not in used]
    return found


def unused_definitions(text: str) -> list[str]:
    """Return functions and constants of kernels that nothing in the module reads."""
    tree = ast.parse(text)
    used = {n.id for n in ast.walk(tree) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Load)}
    names = [n.name for n in kernels(tree)]
    names += [
        ast.unparse(n.targets[0])
        for n in tree.body
        if isinstance(n, ast.Assign) and "constexpr" in ast.unparse(n.value)
    ]
    return [name for name in names if name not in used]


def idle_operations(text: str) -> list[str]:
    """Return operations with a whole number that change nothing, such as `x + 0` and `1 * x`."""
    found = []
    for node in ast.walk(ast.parse(text)):
        if not isinstance(node, ast.BinOp):
            continue
        sides = [node.right, *([node.left] if isinstance(node.op, ast.Add | ast.Mult) else [])]
        numbers = [n.value for n in sides if isinstance(n, ast.Constant) and type(n.value) is int]
        if any((type(node.op), number) in IDLE for number in numbers):
            found.append(ast.unparse(node))
    return found


def _jit(node: ast.FunctionDef) -> str:
    """Return `triton.jit`, `gluon.jit`, or nothing for a plain function."""
    names = [ast.unparse(decorator).split("(")[0] for decorator in node.decorator_list]
    return next((name for name in names if name.endswith(".jit")), "")


def _assigns(node: ast.stmt, name: str) -> bool:
    return isinstance(node, ast.AnnAssign) and ast.unparse(node.target) == name
