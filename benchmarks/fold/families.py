"""Fold the norm weights of transformer families, check it independently, count.

    python benchmarks/fold/families.py run families.jsonl [NAME ...]
    python benchmarks/fold/families.py one NAME

Real configurations of transformers, narrow, with random weights. Of a model measured
twice the last line counts. `coverage.py table` shows the record.
"""

from __future__ import annotations

import json
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from zoo import prepare_torchvision

__all__ = ["FAMILIES", "Family", "measure", "section"]

_TEXT = {
    "vocab_size": 97,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 4,
}
_GROUPED = _TEXT | {"num_key_value_heads": 2, "use_cache": False}


@dataclass(frozen=True)
class Family:
    """One model of transformers.

    Attributes:
        name: For the record.
        model: Class of the model.
        config: Class of its configuration.
        settings: What differs from its defaults, which give the depth.
        inputs: What it is called with.
        is_pre_norm: Whether a norm stands before each branch of the residual stream,
            and none after it or on queries and keys.
    """

    name: str
    model: str
    config: str
    settings: dict[str, Any]
    inputs: str = "tokens"
    is_pre_norm: bool = True

    def build(self) -> nn.Module:
        """Return the model, with random weights, that returns one tensor."""
        prepare_torchvision()
        import transformers

        config = getattr(transformers, self.config)(**self.settings)
        return Answer(getattr(transformers, self.model)(config))

    def example(self) -> dict[str, Tensor]:
        """Return its arguments."""
        return _INPUTS[self.inputs]()


class Answer(nn.Module):
    """A model of transformers whose only result is its logits.

    Args:
        model: The model.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, **given: Tensor) -> Tensor:
        """Return the logits."""
        return self.model(**given).logits


def _tokens() -> Tensor:
    return torch.randint(1, 97, (3, 12), generator=_draw())


def _draw() -> torch.Generator:
    return torch.Generator().manual_seed(0)


_INPUTS: dict[str, Callable[[], dict[str, Tensor]]] = {
    "tokens": lambda: {"input_ids": _tokens()},
    "both": lambda: {"input_ids": _tokens(), "decoder_input_ids": _tokens()},
    "image": lambda: {"pixel_values": torch.randn(2, 3, 64, 64, generator=_draw())},
    "large image": lambda: {
        "pixel_values": torch.randn(2, 3, 224, 224, generator=_draw())
    },
    "speech": lambda: {
        "input_features": torch.randn(2, 80, 100, generator=_draw()),
        "decoder_input_ids": _tokens()[:2],
    },
}

_MIXTURE = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
_QWEN_MOE = _GROUPED | _MIXTURE | {"shared_expert_intermediate_size": 48}

FAMILIES = (
    Family("BERT", "BertForMaskedLM", "BertConfig", _TEXT, is_pre_norm=False),
    Family(
        "GPT-2",
        "GPT2LMHeadModel",
        "GPT2Config",
        {"vocab_size": 97, "n_embd": 64, "n_head": 4, "use_cache": False},
    ),
    Family("Llama", "LlamaForCausalLM", "LlamaConfig", _GROUPED),
    Family(
        "Gemma",
        "GemmaForCausalLM",
        "GemmaConfig",
        _GROUPED | {"head_dim": 16, "num_hidden_layers": 18},
    ),
    Family("Qwen2", "Qwen2ForCausalLM", "Qwen2Config", _GROUPED),
    Family("Qwen2-MoE", "Qwen2MoeForCausalLM", "Qwen2MoeConfig", _QWEN_MOE),
    Family(
        "T5",
        "T5ForConditionalGeneration",
        "T5Config",
        {
            "vocab_size": 97,
            "d_model": 64,
            "d_ff": 96,
            "d_kv": 16,
            "num_heads": 4,
            "use_cache": False,
        },
        "both",
    ),
    Family(
        "ViT",
        "ViTForImageClassification",
        "ViTConfig",
        _TEXT | {"image_size": 64},
        "image",
    ),
    Family(
        "Swin",
        "SwinForImageClassification",
        "SwinConfig",
        {"embed_dim": 24, "num_heads": [2, 3, 4, 6]},
        "large image",
    ),
    Family(
        "ConvNeXt",
        "ConvNextForImageClassification",
        "ConvNextConfig",
        {"hidden_sizes": [16, 24, 32, 48]},
        "image",
    ),
    Family(
        "Mamba",
        "MambaForCausalLM",
        "MambaConfig",
        {"vocab_size": 97, "hidden_size": 64, "state_size": 8, "use_cache": False},
    ),
    Family(
        "Whisper",
        "WhisperForConditionalGeneration",
        "WhisperConfig",
        {
            "vocab_size": 97,
            "d_model": 64,
            "encoder_ffn_dim": 96,
            "decoder_ffn_dim": 96,
            "encoder_attention_heads": 4,
            "decoder_attention_heads": 4,
            "max_source_positions": 50,
            "pad_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "decoder_start_token_id": 1,
            "suppress_tokens": None,
            "begin_suppress_tokens": None,
            "use_cache": False,
        },
        "speech",
    ),
    Family(
        "Qwen3 (norms on queries and keys)",
        "Qwen3ForCausalLM",
        "Qwen3Config",
        _GROUPED | {"head_dim": 16},
        is_pre_norm=False,
    ),
    Family(
        "Gemma 2 (norms after each branch, too)",
        "Gemma2ForCausalLM",
        "Gemma2Config",
        _GROUPED | {"head_dim": 16, "query_pre_attn_scalar": 16},
        is_pre_norm=False,
    ),
)


@torch.no_grad()
def randomise(model: nn.Module) -> None:
    """Draw weight and bias of each norm, and every bias, so that a wrong fold shows."""
    for module in model.modules():
        weight, bias = getattr(module, "weight", None), getattr(module, "bias", None)
        if isinstance(bias, Tensor):
            bias.normal_(0, 0.2)
        if isinstance(weight, Tensor) and weight.dim() == 1:
            if bool((weight == 0).all()):
                weight.normal_(0, 0.3)  # It is used as 1 + weight.
            else:
                weight.uniform_(0.5, 1.5)


def measure(name: str) -> dict[str, Any]:
    """Fold the family `name` and compare it in float64 on other inputs."""
    from normkit.fold import fold
    from normkit.fold.equivalence import difference
    from normkit.fold.torch.float64 import InFloat64, to_float64, widen
    from normkit.modeling.pytree import map_tensors

    family = next(each for each in FAMILIES if each.name == name)
    torch.manual_seed(0)
    model = family.build().eval()
    randomise(model)
    model = to_float64(model)
    given = map_tensors(family.example(), widen)
    record: dict[str, Any] = {"name": name, "is_pre_norm": family.is_pre_norm}
    started = time.process_time()
    folded, ledger = fold(model, given, norms="all")
    record["cpu_seconds"] = round(time.process_time() - started, 2)
    draw = torch.Generator().manual_seed(7)

    def fresh(tensor: Tensor) -> Tensor:
        if tensor.is_floating_point():
            return torch.randn(tensor.shape, generator=draw, dtype=torch.float64)
        return torch.randint(1, 97, tensor.shape, generator=draw)

    other = map_tensors(given, fresh)
    with torch.no_grad(), InFloat64():
        record["difference"] = difference(model(**other), folded(**other))
        centered, rms = fold(model, given, norms="all", layer_to_rms=True)
        record["rms_difference"] = difference(model(**other), centered(**other))
    ran = [e for e in ledger.entries if not e.reason.startswith("it did not run")]
    return record | {
        "norms": len(ran),
        "folded": sum(entry.folded for entry in ran),
        "reduced": sum(entry.reduced for entry in ran),
        "not_run": len(ledger.entries) - len(ran),
        "layer_norms": sum(bool(entry.as_rms) for entry in rms.entries),
        "rms_norms": sum(e.as_rms.startswith("it is an") for e in rms.entries),
        "as_rms": Counter(e.as_rms for e in rms.entries if e.as_rms),
        "left": [(e.name, e.kind, e.reason) for e in ran if not e.folded],
    }


def run(path: Path, names: list[str]) -> None:
    """Append a record of each family, or of those named."""
    for name in names or [family.name for family in FAMILIES]:
        try:
            record = measure(name)
        except Exception as error:
            record = {"name": name, "failed": f"{type(error).__name__}: {error}"[:300]}
        with path.open("a") as file:
            file.write(json.dumps(record) + "\n")
        print(json.dumps(record)[:400], flush=True)


def section(records: list[dict[str, Any]]) -> str:
    """Return the part of the docs' page on the weights of norms."""
    ran = [record for record in records if "failed" not in record]
    pre = [record for record in ran if record["is_pre_norm"]]
    norms, folded = (sum(r[key] for r in pre) for key in ("norms", "folded"))
    largest = max(max(r["difference"], r["rms_difference"]) for r in ran)
    lines = [
        '## Weights of layer and RMS norms: `norms="all"`',
        "",
        "Configurations of transformers, at their depth and narrow, random weights and",
        "random weights and biases of the norms; the model returns its logits alone.",
        "Compared in float64 on inputs that the fold did not see.",
        "",
        f"Of pre-norm models {folded} of {norms} norms lose weight and bias, "
        f"{100 * folded / norms:.1f} %.",
        f"Largest difference {largest:.0e}.",
        "",
        "| model | norms | folded | only the bias stays | layer norms made RMS norms | "
        "CPU ms per norm |",
        "| --- | --: | --: | --: | --: | --: |",
    ]
    for record in ran:
        layer = record["layer_norms"]
        cells = (
            record["name"] + ("" if record["is_pre_norm"] else " (not pre-norm)"),
            str(record["norms"]),
            str(record["folded"]),
            str(record["reduced"]),
            f"{record['rms_norms']} of {layer}" if layer else "none there",
            f"{1000 * record['cpu_seconds'] / max(record['norms'], 1):.0f}",
        )
        lines.append("| " + " | ".join(cells) + " |")
    lines += [
        "",
        "Where some stay, the first and its reason:",
        "",
        "| model | norm | why |",
        "| --- | --- | --- |",
    ]
    for record in ran:
        seen: set[str] = set()
        for name, _, reason in record["left"]:
            kind = ".".join(part for part in name.split(".") if not part.isdigit())
            if kind not in seen:
                seen.add(kind)
                lines.append(f"| {record['name']} | `{name}` | {reason} |")
    for record in records:
        if "failed" in record:
            lines.append(f"| {record['name']} | not measured | {record['failed']} |")
    return "\n".join([*lines, ""])


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    what, *rest = sys.argv[1:]
    if what == "one":
        print(json.dumps(measure(rest[0])))
    elif what == "run":
        run(Path(rest[0]), rest[1:])
