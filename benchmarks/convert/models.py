"""The architectures that `python -m benchmarks.convert` converts."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from benchmarks.fold import zoo
from benchmarks.fold.zoo import Case
from torch import Tensor, nn

__all__ = ["cases"]

# With batch norm: a model of each family of benchmarks/fold/timm_models.txt that is
# small; then those that have other norms.
_TIMM = """
gernet_s repvgg_a0 regnetz_b16 resnext26ts halonet_h1 lambda_resnet26t
coatnet_pico_rw_224 cpubone_nano cs3darknet_focus_s densenet121 dla46x_c dpn68
ese_vovnet19b_slim resnet18 resnetblur18 seresnet18 efficientformer_l1
efficientformerv2_s0 mobilenetv2_035 mnasnet_small tinynet_e mixnet_s
efficientvim_m1 efficientvit_b0 efficientvit_m0 fasternet_t0 fastvit_t8
mobilenetv3_small_050 lcnet_035 mobilenetv4_conv_small_035 ghostnet_050
ghostnetv3_050 hardcorenas_b hgnetv2_b0 inception_next_atto lcnetv2_small
legacy_seresnet18 levit_128s levit_conv_128s lowformer_b0 mobilevit_xxs
mobilevitv2_050 regnetx_002 regnety_002 regnetz_005 repghostnet_050 repvit_m1
resnest14d resnetv2_18 rexnet_100 shvit_s1 skresnet18 starnet_s050 swiftformer_xs
tiny_vit_5m_224 visformer_tiny xcit_nano_12_p8_224

convnext_atto convnextv2_atto vit_tiny_patch16_224 deit_tiny_patch16_224
swin_tiny_patch4_window7_224 mixer_s32_224 resmlp_12_224 gmlp_ti16_224
cait_xxs24_224 coat_lite_tiny convit_tiny crossvit_tiny_240 edgenext_xx_small
eva02_tiny_patch14_224 gcvit_xxtiny mambaout_femto nest_tiny_jx pit_ti_224
poolformer_s12 pvt_v2_b0 tnt_s_legacy_patch16_224 resnetv2_50x1_bit nf_regnet_b0
test_vit test_vit2
"""

_CLASSIFIERS = """
convnext_tiny densenet121 efficientnet_b0 efficientnet_v2_s googlenet inception_v3
mnasnet0_5 mobilenet_v2 mobilenet_v3_large mobilenet_v3_small regnet_x_400mf
regnet_y_400mf resnet18 resnet50 resnext50_32x4d shufflenet_v2_x0_5 swin_t
"""
_SEGMENTERS = "deeplabv3_mobilenet_v3_large deeplabv3_resnet50 fcn_resnet50 "
_SEGMENTERS += "lraspp_mobilenet_v3_large"
_DETECTORS = "fasterrcnn_mobilenet_v3_large_320_fpn retinanet_resnet50_fpn_v2"


def cases() -> Iterator[Case]:
    """Every case."""
    zoo.prepare_torchvision()
    for name in _TIMM.split():
        yield zoo.case(f"timm/{name}")
    yield from _torchvision()
    yield from _transformers()


def _torchvision() -> Iterator[Case]:
    from torchvision import models
    from torchvision.ops import boxes

    draw = torch.Generator().manual_seed(0)

    def images(*sizes: int) -> tuple[Tensor, ...]:
        return tuple(torch.randn(2, 3, s, s, generator=draw) for s in sizes)

    for name in (*_CLASSIFIERS.split(), *_SEGMENTERS.split()):
        without = {"weights": None}
        if name in _SEGMENTERS.split():
            without["weights_backbone"] = None
        yield Case(
            f"torchvision/{name}",
            lambda name=name, without=without: models.get_model(name, **without),
            images(64, 96, 128, 224, 299),
        )
    boxes.nms = _suppressed  # its compiled form needs another build of torch
    for name in _DETECTORS.split():
        pictures = [torch.rand(3, 96, 96, generator=draw) for _ in range(2)]
        yield Case(
            f"torchvision/{name}",
            lambda name=name: models.get_model(
                name, weights=None, weights_backbone=None, min_size=96, max_size=96
            ),
            ((pictures, _targets()),),
        )


def _targets() -> list[dict[str, Tensor]]:
    box = torch.tensor([[8.0, 8.0, 64.0, 72.0]])
    return [{"boxes": box, "labels": torch.tensor([1])} for _ in range(2)]


def _suppressed(boxes: Tensor, scores: Tensor, iou_threshold: float) -> Tensor:
    """Non-maximum suppression, box by box."""
    from torchvision.ops import box_iou

    order = scores.argsort(descending=True, stable=True)
    kept: list[Tensor] = []
    while len(order):
        kept.append(order[0])
        overlap = box_iou(boxes[order[:1]], boxes[order[1:]])[0]
        order = order[1:][overlap <= iou_threshold]
    return torch.stack(kept) if kept else order


def _transformers() -> Iterator[Case]:
    import transformers as hf

    small = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    small |= {"intermediate_size": 64}
    words = {"vocab_size": 50, **small}
    draw = torch.Generator().manual_seed(0)
    ids = {"input_ids": torch.randint(3, 50, (3, 9), generator=draw)}
    both = {**ids, "decoder_input_ids": ids["input_ids"].flip(1)}
    pixels = {"pixel_values": torch.randn(3, 3, 64, 64, generator=draw)}
    wave = {"input_values": torch.randn(2, 8000, generator=draw)}
    few = {"num_key_value_heads": 2}
    vision = {**small, "image_size": 64, "patch_size": 16}
    t5 = {"vocab_size": 50, "d_model": 32, "d_kv": 8, "d_ff": 64}
    t5 |= {"num_layers": 2, "num_heads": 4}
    bart = {"vocab_size": 50, "d_model": 32, "encoder_layers": 1, "decoder_layers": 1}
    bart |= {"encoder_attention_heads": 4, "decoder_attention_heads": 4}
    bart |= {"encoder_ffn_dim": 64, "decoder_ffn_dim": 64}
    gpt2 = {"vocab_size": 50, "n_embd": 32, "n_layer": 2, "n_head": 4}
    mamba = {"vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 2}
    stages = {"hidden_sizes": [16, 32, 48, 64], "depths": [1, 1, 1, 1]}
    known: dict[str, tuple[dict[str, Any], Any]] = {
        "Bert": (words, ids),
        "DistilBert": ({"vocab_size": 50, "dim": 32, "n_layers": 2, "n_heads": 4}, ids),
        "Electra": (words, ids),
        "ModernBert": ({**words, "pad_token_id": 0, "cls_token_id": 1}, ids),
        "GPT2": (gpt2, ids),
        "GPTNeoX": (words, ids),
        "Llama": ({**words, **few}, ids),
        "Mistral": ({**words, **few}, ids),
        "Qwen2": ({**words, **few}, ids),
        "Qwen3": ({**words, **few, "head_dim": 8}, ids),
        "Gemma": ({**words, **few, "head_dim": 8}, ids),
        "Gemma2": ({**words, **few, "head_dim": 8}, ids),
        "Olmo": ({**words, **few, "pad_token_id": 0}, ids),
        "Olmo2": ({**words, **few, "pad_token_id": 0}, ids),
        "Phi": (words, ids),
        "Mamba": (mamba, ids),
        "T5": (t5, both),
        "Bart": (bart, both),
        "ViT": (vision, pixels),
        "DeiT": (vision, pixels),
        "Dinov2": (vision, pixels),
        "Swin": (
            {"image_size": 64, "embed_dim": 16, "depths": [1, 1], "num_heads": [2, 4]},
            pixels,
        ),
        "ConvNext": (stages, pixels),
        "Segformer": ({}, pixels),
        "MobileNetV2": ({}, pixels),
        "MobileNetV1": ({}, pixels),
        "ResNet": ({"embedding_size": 16, **stages}, pixels),
        "RegNet": ({"embedding_size": 16, **stages, "groups_width": 8}, pixels),
        "Wav2Vec2": ({"vocab_size": 32, **small}, wave),
        "Hubert": ({"vocab_size": 32, **small}, wave),
    }
    for name, (settings, given) in known.items():

        def build(name: str = name, settings: dict[str, Any] = settings) -> nn.Module:
            config = getattr(hf, f"{name}Config")(**settings)
            return getattr(hf, f"{name}Model")(config)

        yield Case(f"transformers/{name}", build, (given,))
