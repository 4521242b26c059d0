"""Export of a finished model: the package gets its place when it is as the eager lowering."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from kvxform.codegen.onnx.forms import Form, OnnxOptions, Provider
from kvxform.codegen.onnx.levels import version_of
from kvxform.runtime.onnx_files import DESCRIPTION

if TYPE_CHECKING:
    from kvxform.runtime.model import OptimizedModel

VERDICT = "verification"  # entry of kvxform.json
ExportCheck = Literal["probe", "none"]


@dataclass(frozen=True)
class Verdict:
    """What an export knows about its package; the same for equal packages.

    Attributes:
        schedules: Keys of the schedules in which it was as the eager lowering.
        reason: Why nothing was run; empty if something was.
        left_out: Why other schedules were not run, by key.
    """

    schedules: tuple[str, ...] = ()
    reason: str = ""
    left_out: Mapping[str, str] = dataclasses.field(default_factory=dict)

    @property
    def is_verified(self) -> bool:
        """Whether the package was run."""
        return not self.reason

    def __str__(self) -> str:
        """Return one line for people."""
        if not self.is_verified:
            return f"not verified: {self.reason}"
        return f"verified against the eager lowering: {', '.join(self.schedules)}"

    def to_data(self) -> dict[str, Any]:
        """Return plain data."""
        return {
            "verified": self.is_verified,
            "reason": self.reason,
            "schedules": list(self.schedules),
            "left_out": dict(self.left_out),
        }

    @classmethod
    def of(cls, folder: Path) -> Verdict:
        """Return the verdict that `record` left in a package."""
        data = _description(folder).get(VERDICT)
        if data is None:
            return cls(reason="the package does not say")
        return cls(tuple(data["schedules"]), data["reason"], data["left_out"])

    def record(self, folder: Path) -> None:
        """Write the verdict into the description of a package."""
        from kvxform.codegen.onnx.writing import amend_description

        amend_description(folder, **{VERDICT: self.to_data()})


def written_form(folder: Path) -> dict[str, Any]:
    """Return what a package is, a `Form` and its versions as plain data."""
    form: dict[str, Any] = _description(folder)["onnx"]
    return form


def _description(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / DESCRIPTION).read_text(encoding="utf-8"))
    return found


def export_package(
    model: OptimizedModel,
    folder: str | Path,
    options: OnnxOptions | None = None,
    *,
    verify: ExportCheck = "probe",
    progress: Callable[[str], None] | None = None,
) -> Path:
    """Write a model as an ONNX package, and run that against the eager lowering before it counts.

    Args:
        model: A model with a cache.
        folder: Where to write; an older package there is replaced at once or not at all.
        options: What is asked of the package; what the recipe says if None.
        verify: `probe` runs the package, `none` does not. What cannot run here is written
            unverified; `Verdict.of` tells.
        progress: Called with a line of text as the work goes on.

    Raises:
        CodegenError: KVX401 if the program has something that cannot be expressed, KVX403 if the
            options are not legal for it.
        VerifyError: KVX503 if the package is not as the eager lowering; nothing is written then.
    """
    from kvxform.codegen.onnx import export_onnx

    say = progress or (lambda _: None)

    def check(package: Path, form: Form) -> None:
        _judge(model, package, form, verify, say).record(package)

    return export_onnx(
        model.program,
        folder,
        options or recipe_options(model),
        tokenizer_path=model.program.info.tokenizer_path,
        recipe=model.recipe,
        report=model.report,
        progress=progress,
        check=check,
    )


def recipe_options(model: OptimizedModel) -> OnnxOptions:
    """Return what the recipe of a model asks of packages."""
    return OnnxOptions() if model.recipe is None else model.recipe.target.onnx_options


def _judge(
    model: OptimizedModel, package: Path, form: Form, verify: str, say: Callable[[str], None]
) -> Verdict:
    if verify == "none":
        return Verdict(reason="it was not asked for")
    reason = why_not_here(form, model.program.info.dtype)
    if reason:
        return Verdict(reason=reason)
    from kvxform.runtime.package_check import check_export
    from kvxform.runtime.packed_weights import comparable

    with comparable(model, package, form) as (leader, folder):
        run, left_out = check_export(
            leader,
            folder,
            provider_here(form, model.program.info.dtype),
            lambda name: say(f"verify package: {name}"),
        )
    return Verdict(run, left_out=left_out)


def why_not_here(form: Form, dtype: str) -> str:
    """Return why a package cannot run on this machine, or nothing.

    Args:
        form: What it is.
        dtype: Of the model.
    """
    if importlib.util.find_spec("onnxruntime") is None:
        return "onnxruntime is not installed"
    import onnxruntime

    version = ".".join(onnxruntime.__version__.split(".")[:2])
    if version_of(version) < version_of(form.runtime):
        return f"it needs onnxruntime {form.runtime}, {version} is installed"
    if form.provider == "cpu" or has_cuda():
        return ""
    if form.level == "L4":
        return "PagedAttention runs on CUDA, which onnxruntime does not have here"
    if dtype == "bfloat16":
        return "bfloat16 runs on CUDA, which onnxruntime does not have here"
    return ""


def provider_here(form: Form, dtype: str) -> Provider:
    """Return where a package is verified on this machine.

    `GroupQueryAttention` on CUDA lets the tokens of a first prompt see each other as they were
    before they were stored. So its codes are compared on the CPU, where it has a kernel, but for
    bfloat16.
    """
    reads_back = form.level != "L3" or dtype == "bfloat16"
    return form.provider if has_cuda() and reads_back else "cpu"


def form_of(description: Mapping[str, Any]) -> Form:
    """Return the form of a package from its `kvxform.json`."""
    return Form(**{field.name: description["onnx"][field.name] for field in fields(Form)})


def has_cuda() -> bool:
    """Whether the installed ONNX Runtime and torch have a GPU."""
    import onnxruntime

    available = "CUDAExecutionProvider" in onnxruntime.get_available_providers()
    return available and torch.cuda.is_available()
