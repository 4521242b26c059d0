"""What a TARGET may be: an artifact folder, an ONNX package folder, or a model with a recipe."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from kvxform.atomic import is_artifact
from kvxform.errors import KvxformError

if TYPE_CHECKING:
    from kvxform.recipe import Recipe
    from kvxform.runtime.model import OptimizedModel


R = TypeVar("R", bound="str | Recipe")


def is_onnx_package(target: str) -> bool:
    """Return whether `target` is a folder that `export` wrote, whole or not."""
    return any((Path(target) / name).is_file() for name in ("model.onnx", "genai_config.json"))


def open_model(
    target: str,
    recipe: str | Recipe | None,
    *,
    verify: Literal["none", "probe", "full"] = "none",
    calibration: Path | None = None,
) -> OptimizedModel:
    """Load an artifact, or optimise a model; `calibration` is a text for the latter.

    Raises:
        KvxformError: KVX801 if a recipe is missing or makes no sense, and all of the library's.
    """
    import kvxform

    if is_artifact(target):
        refuse_recipe(target, recipe)
        if calibration is not None:
            rule = "what is optimised already takes no text"
            raise KvxformError("KVX801", rule, got=repr(target), hint="drop --calibration")
        return kvxform.load(target)
    if is_onnx_package(target):
        rule = "an ONNX package is finished"
        hint = "take the artifact or MODEL that it was made from"
        raise KvxformError("KVX801", rule, got=repr(target), hint=hint)
    wanted = need_recipe(target, recipe)
    return kvxform.optimize(target, wanted, verify=verify, calibration=calibration)


def need_recipe(target: str, recipe: R | None) -> R:
    """Return `recipe`; raise KVX801 if there is none."""
    if recipe is None:
        raise KvxformError(
            "KVX801",
            "a model that is not an artifact needs a recipe",
            got=repr(target),
            hint="add --recipe, for instance -r kv4",
        )
    return recipe


def refuse_recipe(target: str, recipe: str | Recipe | None) -> None:
    """Raise KVX801 if a recipe is given for something that is finished."""
    if recipe is not None:
        raise KvxformError(
            "KVX801", "what is optimised already takes no recipe", got=repr(target), hint="drop -r"
        )


@dataclass(frozen=True)
class Opened:
    """What a TARGET turned out to be.

    Attributes:
        model: OptimizedModel, OnnxSession, or the source module; `make_runner` takes each.
        tokenizer: Its tokenizer, or None.
        eos_token_ids: Tokens that end a text.
    """

    model: Any
    tokenizer: Any
    eos_token_ids: tuple[int, ...]


def open_target(
    target: str,
    recipe: str | None,
    *,
    calibration: Path | None = None,
    provider: str | None = None,
    max_length: int | None = None,
    threads: int | None = None,
) -> Opened:
    """Open anything that can run; a model without a recipe is the source model itself.

    Args:
        target: What the user named.
        recipe: Recipe, where that is a model.
        calibration: A text for passes that calibrate.
        provider: Where an ONNX package runs; what it was made for if None.
        max_length: Tokens that a row of an ONNX package has room for.
        threads: Threads of ONNX Runtime within an operation.
    """
    if provider is not None and not is_onnx_package(target):
        rule = "--provider is for ONNX packages"
        raise KvxformError("KVX801", rule, got=repr(target), hint="export the model first")
    if is_onnx_package(target):
        from kvxform.runtime.onnx_session import OnnxSession
        from kvxform.tokenizer import load_tokenizer

        refuse_recipe(target, recipe)
        session = OnnxSession(target, provider=provider, max_length=max_length, threads=threads)
        return Opened(session, load_tokenizer(target), tuple(session.info["eos_token_ids"]))
    if recipe is None and not is_artifact(target):
        return open_source_model(target)
    model = open_model(target, recipe, calibration=calibration)
    return Opened(model, model.tokenizer, model.program.info.eos_token_ids)


def open_source_model(model: str) -> Opened:
    """Open the unrewritten model."""
    from kvxform.capture import open_source
    from kvxform.tokenizer import load_tokenizer

    source = open_source(model)
    tokenizer = load_tokenizer(source.info.tokenizer_path)
    return Opened(source.model, tokenizer, source.info.eos_token_ids)


def check_source(target: str, recipe: str | None) -> str:
    """Return `target` if it is a MODEL without a recipe.

    Raises:
        KvxformError: KVX801 if it is something that is finished, or has a recipe.
    """
    if recipe is not None or is_artifact(target) or is_onnx_package(target):
        raise KvxformError(
            "KVX801",
            "a table of recipes starts from one source model",
            got=repr(target),
            hint="give a MODEL and --recipes, without -r",
        )
    return target


def need_tokenizer(tokenizer: Any, target: str) -> Any:
    """Return `tokenizer`; raise KVX801 if there is none."""
    if tokenizer is None:
        raise KvxformError(
            "KVX801",
            "text needs a model with a tokenizer",
            got=repr(target),
            hint="take a Hugging Face folder with tokenizer files, or use the Python API",
        )
    return tokenizer
