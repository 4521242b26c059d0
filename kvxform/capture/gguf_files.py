"""GGUF files through the loader of transformers, always as a plain float model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn


def load_gguf(path: Path, dtype: torch.dtype) -> nn.Module:
    """Return the model in a GGUF file with every weight dequantised to `dtype`.

    Newer versions of transformers can keep the packed blocks; that is switched off, and the mark
    that the model was quantised is removed, so that it can be saved like any other.
    """
    import transformers  # a second, so only where it is needed

    options: dict[str, Any] = {"gguf_file": path.name, "local_files_only": True}
    config_class = getattr(transformers, "GgufConfig", None)
    if config_class is not None:
        options["quantization_config"] = config_class(dequantize=True)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        str(path.parent), dtype=dtype, trust_remote_code=False, **options
    )
    assert isinstance(model, nn.Module)
    for holder, name in ((model, "hf_quantizer"), (model.config, "quantization_config")):
        if getattr(holder, name, None) is not None:
            delattr(holder, name)
    return model.eval()
