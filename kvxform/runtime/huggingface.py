"""A compiled model as a `PreTrainedModel`: what takes a transformers model takes it unchanged.

`generate` with every search, streamers, `pipeline`, chat templates and evaluation harnesses work
on it, and its cache is a real session: beams share pages, assisted decoding crops. Importing this
module registers the classes with `AutoConfig` and `AutoModelForCausalLM`.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn, Self

import torch
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GenerationConfig,
    GenerationMixin,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.modeling_outputs import CausalLMOutputWithPast

from kvxform.errors import KvxformError
from kvxform.ir.artifact import save_artifact
from kvxform.ir.program import Program
from kvxform.runtime.loading import load_model, move_program
from kvxform.runtime.model import OptimizedModel
from kvxform.runtime.session_cache import PackedColumns, SessionCache


class KvxformConfig(PreTrainedConfig):  # type: ignore[misc]  # transformers is not typed
    """What transformers asks of a configuration; the model itself is described by its program.

    Attributes:
        family: `model_type` of the source model.
        vocab_size: Rows of the logits.
        num_hidden_layers: Attention layers.
        use_cache: Whether the program has a cache.
    """

    model_type = "kvxform"
    family: str = ""
    vocab_size: int = 0
    num_hidden_layers: int = 0
    use_cache: bool = True

    @classmethod
    def of(cls, program: Program) -> Self:
        """Return the configuration of `program`."""
        info = program.info
        known = (
            {} if info.context_length is None else {"max_position_embeddings": info.context_length}
        )
        eos = list(info.eos_token_ids)
        return cls(
            family=info.family,
            vocab_size=info.vocab_size,
            num_hidden_layers=len(program.sites),
            bos_token_id=info.bos_token_id,
            eos_token_id=eos[0] if len(eos) == 1 else eos or None,
            pad_token_id=info.pad_token_id,
            architectures=["KvxformForCausalLM"],
            dtype=info.dtype,
            tie_word_embeddings=False,
            use_cache=program.plan is not None,
            **known,
        )


class KvxformForCausalLM(PreTrainedModel, GenerationMixin):  # type: ignore[misc]
    """An `OptimizedModel` with the interface of a transformers model, for inference.

    Weights belong to the program: `parameters()` and `state_dict()` are empty.

    Args:
        config: As `KvxformConfig.of` makes it.
        optimized: The model. Use `OptimizedModel.as_huggingface` or `from_pretrained`.
    """

    config_class = KvxformConfig
    main_input_name = "input_ids"

    def __init__(self, config: KvxformConfig, optimized: OptimizedModel | None = None) -> None:
        super().__init__(config)
        if optimized is None:
            _refuse("a compiled model is opened from its folder, not made from a configuration")
        self.optimized: OptimizedModel = optimized
        self.post_init()
        self.eval()

    @property
    def device(self) -> torch.device:
        """Where the weights live."""
        return self.optimized.device

    @property
    def dtype(self) -> torch.dtype:
        """Compute dtype."""
        return self.optimized.program.dtype

    def num_parameters(self, only_trainable: bool = False, exclude_embeddings: bool = False) -> int:
        """Return elements of all weights; none of them can be trained."""
        weights = {id(w): w for w in self.optimized.program.weights.values()}
        return 0 if only_trainable else sum(w.numel() for w in weights.values())

    def new_cache(self, max_batch_size: int = 1, max_seq_len: int = 1) -> SessionCache:
        """Return an empty cache for `past_key_values`; it grows when it must."""
        return SessionCache(self.optimized, max_batch_size=max_batch_size, max_seq_len=max_seq_len)

    @torch.no_grad()
    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: SessionCache | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast | tuple[Tensor, ...]:
        """Return logits of new tokens, and the cache that holds them.

        Args:
            input_ids: Integer `[B, S]`, padded on either side.
            attention_mask: 0 and 1 for cached and new columns, `[B, cached + S]`.
            position_ids: `[B, S]`; must count the tokens of each row, as by default.
            past_key_values: What `new_cache` or the last call returned.
            labels: Tokens `[B, S]`, -100 where none is wanted; gives the mean loss of the next
                tokens.
            use_cache: Return a cache; whether the program has one by default.
            logits_to_keep: Return logits of the last so many columns (0: all), or of these columns.
            return_dict: Return a tuple if False.
            kwargs: Ignored, but for requests of what a compiled model does not have.

        Raises:
            KvxformError: KVX704 for bad input.
        """
        _check_options(kwargs)
        cache = self._cache_for(past_key_values, use_cache)
        if cache is None:
            logits = self._run_stateless(input_ids, attention_mask)
        else:
            last_only = isinstance(logits_to_keep, int) and logits_to_keep == 1
            logits = cache.feed(input_ids, attention_mask, position_ids, last_only=last_only)
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = logits[:, kept].clone()  # outside inference mode, so that callers may change it
        loss = None
        if labels is not None:
            loss = self.loss_function(logits, labels, vocab_size=self.config.vocab_size)
        output = CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=cache)
        return output if return_dict is not False else output.to_tuple()

    def save_pretrained(self, save_directory: str | Path, **kwargs: Any) -> None:
        """Write a folder that `from_pretrained`, the Auto classes and `kvxform.load` open.

        Args:
            save_directory: A new folder, an empty one, or one that kvxform wrote.
            kwargs: Ignored: a compiled model has one format.

        Raises:
            ArtifactError: KVX601 if the folder holds something else.
        """
        files = self.optimized.artifact_files(tokenizer_folder="")
        self.config.architectures = [type(self).__name__]
        files["config.json"] = self.config.to_json_string()
        files["generation_config.json"] = self.generation_config.to_json_string()
        save_artifact(Path(save_directory), self.optimized.program, files)

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | Path, *args: Any, **kwargs: Any
    ) -> KvxformForCausalLM:
        """Open a folder that `save_pretrained` or `OptimizedModel.save` wrote.

        Args:
            pretrained_model_name_or_path: The folder.
            args: Ignored.
            kwargs: `device_map` (one device), `dtype` (must be that of the model) and
                `generation_config` count; others are for other formats and ignored.

        Raises:
            ArtifactError: KVX601 missing, KVX602 damaged, KVX603 unsafe path, KVX604 other version.
            KvxformError: KVX704 for another dtype, or more than one device.
        """
        folder = Path(pretrained_model_name_or_path)
        model = load_model(folder, _one_device(kwargs.get("device_map"))).as_huggingface()
        assert isinstance(model, KvxformForCausalLM), "as_huggingface makes one"
        _check_dtype(kwargs.get("dtype", kwargs.get("torch_dtype")), model.dtype)
        generation = kwargs.get("generation_config")
        if generation is None and (folder / "generation_config.json").is_file():
            generation = GenerationConfig.from_pretrained(folder)
        if generation is not None:
            model.generation_config = generation
        model.name_or_path = model.config.name_or_path = str(folder)
        return model

    def tie_weights(self, *args: Any, **kwargs: Any) -> None:
        """Do nothing: the program has its weights as they are."""

    def _prepare_cache_for_generation(
        self,
        generation_config: GenerationConfig,
        model_kwargs: dict[str, Any],
        generation_mode: Any,
        batch_size: int,
        max_cache_length: int,
    ) -> None:
        """Put a session with room for the whole generation into `model_kwargs`."""
        given = model_kwargs.get("past_key_values")
        if generation_config.cache_implementation not in (None, "dynamic"):
            rule = (
                "cache_implementation must be left out: the plan of the model says what is cached"
            )
            _refuse(rule, generation_config.cache_implementation)
        if given is None and not (generation_config.use_cache and self.optimized.plan is not None):
            model_kwargs.pop("past_key_values", None)
            generation_config.use_cache = False
            return
        cache = self._cache_for(given, True)
        assert cache is not None, "a cache was asked for"
        if given is None:
            beams = max(generation_config.num_beams, generation_config.num_return_sequences)
            cache = self.new_cache(batch_size * beams, max_cache_length)
        else:
            cache._is_user_defined = True
        model_kwargs["past_key_values"] = cache
        mask = model_kwargs.get("attention_mask")
        if generation_config.is_assistant:
            cache.activate_past_recording()
            if mask is not None:  # a pad token that was generated is a token, as for the target
                model_kwargs["attention_mask"] = mask.cummax(1).values

    def _run_stateless(self, input_ids: Tensor, attention_mask: Tensor | None) -> Tensor:
        """Return logits `[B, S, vocab]`, zero where the mask is."""
        if attention_mask is None:
            return self.optimized(input_ids)
        packed = PackedColumns.of(attention_mask.cpu() != 0)
        return packed.unpack(self.optimized(packed.pack(input_ids), packed.mask))

    def _cache_for(self, given: Any, use_cache: bool | None) -> SessionCache | None:
        if given is None:
            wanted = self.config.use_cache if use_cache is None else use_cache
            return self.new_cache() if wanted and self.optimized.plan is not None else None
        if not isinstance(given, SessionCache):
            _refuse("past_key_values must be what new_cache() makes", type(given).__name__)
        return given

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Move the program where `fn` moves tensors: `to`, `cuda` and `cpu` end here."""
        probe = fn(torch.empty(0, dtype=self.dtype, device=self.device))
        _check_dtype(probe.dtype, self.dtype)
        if probe.device != self.device:
            old = self.optimized
            self.optimized = OptimizedModel(
                move_program(old.program, probe.device),
                report=old.report,
                recipe=old.recipe,
                tokenizer=old.tokenizer,
            )
        return self


def _check_options(options: dict[str, Any]) -> None:
    """Refuse what a compiled program cannot give."""
    for name in ("output_attentions", "output_hidden_states", "inputs_embeds"):
        if options.get(name) is not None and options[name] is not False:
            _refuse(f"{name} must be left out: a compiled model has token ids in and logits out")


def _check_dtype(wanted: Any, dtype: torch.dtype) -> None:
    name = str(dtype).removeprefix("torch.")
    if wanted not in (None, "auto", dtype, name):
        _refuse(f"the dtype of a compiled model is fixed: {name}", wanted)


def _one_device(device_map: Any) -> Any:
    """Return the device that `device_map` means; None for the CPU."""
    if isinstance(device_map, dict) and len(device_map) == 1:
        device_map = next(iter(device_map.values()))
    if isinstance(device_map, dict) or device_map in ("balanced", "balanced_low_0", "sequential"):
        _refuse("device_map must name one device", device_map)
    if device_map == "auto":
        return "cuda" if torch.cuda.is_available() else None
    return device_map


def _refuse(rule: str, got: object = None) -> NoReturn:
    raise KvxformError("KVX704", rule, where="huggingface", got=got)


AutoConfig.register("kvxform", KvxformConfig, exist_ok=True)
AutoModelForCausalLM.register(KvxformConfig, KvxformForCausalLM, exist_ok=True)
