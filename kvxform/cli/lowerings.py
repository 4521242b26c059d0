"""What each lowering can run, from the tables by which it refuses the rest."""

from __future__ import annotations

from kvxform.cli.output import print_json, print_table


def print_lowerings(json: bool) -> None:
    """Print one row a feature of plans, one column a lowering."""
    table = lowering_table()
    if json:
        print_json(table)
        return
    names = list(next(iter(table.values())))
    rows = [(feature, *(lowerings[n] for n in names)) for feature, lowerings in table.items()]
    print_table(("feature", *names), rows)


def lowering_table() -> dict[str, dict[str, str]]:
    """Return what each lowering supports in words, by feature and lowering."""
    from kvxform.codecs.base import CODECS
    from kvxform.codegen.eager import cache as eager
    from kvxform.codegen.onnx import capability as onnx
    from kvxform.codegen.onnx.codecs import CODEC_EMITTERS
    from kvxform.codegen.triton import capability as triton

    def names(words: object) -> str:
        assert isinstance(words, list | tuple | set), "a table of words"
        return ", ".join(sorted(words))

    return {
        "payload": {
            "eager": names(eager.PAYLOADS),
            "onnx": names(onnx.PAYLOADS),
            "triton": names(triton.PAYLOADS),
        },
        "codecs": {
            "eager": names(list(CODECS)),
            "onnx": names([codec.name for codec in CODEC_EMITTERS]),
            "triton": names([codec.name for codec in triton.CODEC_CLASSES]),
        },
        "compute dtypes": {
            "eager": "any float",
            "onnx": "float16, float32; bfloat16 on CUDA",
            "triton": names(triton.DTYPES),
        },
        "keys cached before RoPE": {"eager": "yes", "onnx": "yes", "triton": "no"},
        "different sinks of K and V": {"eager": "yes", "onnx": "yes", "triton": "no"},
        "programs without a cache": {"eager": "yes", "onnx": "no", "triton": "no"},
        "runs on": {
            "eager": "any device of torch",
            "onnx": "onnxruntime",
            "triton": "CUDA; CPU with TRITON_INTERPRET=1",
        },
    }
