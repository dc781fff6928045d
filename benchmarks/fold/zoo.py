"""Real architectures with random weights: what to build and what to call it with.

timm: of every architecture file the smallest models, as many as differ in the classes
they are built of. torchvision and transformers: one of each kind that holds a batch
norm. Nothing is downloaded.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

__all__ = [
    "TIMM_MODELS",
    "Case",
    "case",
    "cases",
    "choose_timm_models",
    "prepare_torchvision",
    "randomise",
]


@dataclass(frozen=True)
class Case:
    """One model.

    Attributes:
        name: `library/model`.
        build: Makes it, with random weights.
        inputs: What to try calling it with, the cheapest first.
    """

    name: str
    build: Callable[[], nn.Module]
    inputs: tuple[Any, ...]


def cases() -> Iterator[Case]:
    """Every case."""
    yield from _torchvision()
    yield from _transformers()
    yield from map(_timm, TIMM_MODELS.read_text().split())


def case(name: str) -> Case:
    """Return the case of that name."""
    library, _, model = name.partition("/")
    if library == "timm":
        return _timm(model)
    family = _torchvision() if library == "torchvision" else _transformers()
    return next(each for each in family if each.name == name)


@torch.no_grad()
def randomise(model: nn.Module, *, negative: float = 0.03) -> None:
    """Draw the statistics, weight and bias of each batch norm of `model`.

    Weights of 0.5 to 1.5, a share `negative` of them with a minus; variances of 0.5
    to 1.5; means and biases of spread 0.2, so that no model's values run away.
    """
    for module in model.modules():
        var = getattr(module, "running_var", None)
        if not isinstance(var, Tensor):
            continue
        var.uniform_(0.5, 1.5)
        module.running_mean.normal_(0, 0.2)
        if isinstance(getattr(module, "weight", None), Tensor):
            module.weight.uniform_(0.5, 1.5)
            module.weight[torch.rand_like(module.weight) < negative] *= -1
        if isinstance(getattr(module, "bias", None), Tensor):
            module.bias.normal_(0, 0.2)


def _images(*sizes: int) -> tuple[Tensor, ...]:
    draw = torch.Generator().manual_seed(0)
    return tuple(torch.randn(2, 3, size, size, generator=draw) for size in sizes)


# timm ----------------------------------------------------------------------------

TIMM_MODELS = Path(__file__).with_name("timm_models.txt")

# Models of one file built of the same classes fold alike; six kinds of a file are many.
_MOST_PER_FILE = 6
_LARGEST = 45_000_000


def _timm(name: str) -> Case:
    prepare_torchvision()
    import timm

    size = timm.get_pretrained_cfg(name).input_size[-1]
    return Case(
        f"timm/{name}",
        lambda: timm.create_model(name, pretrained=False),
        _images(*sorted({*(s for s in (64, 96, 128) if s < size), size})),
    )


def choose_timm_models() -> list[str]:
    """Return the smallest models with batch norm of each timm file; takes minutes."""
    import timm
    from timm.models import model_entrypoint

    families: dict[str, list[tuple[int, str, frozenset[str]]]] = {}
    for name in timm.list_models():
        if name.startswith("test_"):
            continue
        with torch.device("meta"), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                model = timm.create_model(name, pretrained=False)
            except Exception:
                continue
        if not any(_is_norm(module) for module in model.modules()):
            continue
        count = sum(parameter.numel() for parameter in model.parameters())
        kinds = frozenset(type(module).__name__ for module in model.modules())
        family = model_entrypoint(name).__module__
        families.setdefault(family, []).append((count, name, kinds))
    chosen = []
    for models in families.values():
        seen: set[frozenset[str]] = set()
        for count, name, kinds in sorted(models, key=lambda model: model[:2]):
            if kinds in seen or len(seen) == _MOST_PER_FILE:
                continue
            if seen and count > _LARGEST:
                continue
            seen.add(kinds)
            chosen.append(name)
    return chosen


def _is_norm(module: nn.Module) -> bool:
    return "running_var" in module._buffers


# torchvision ---------------------------------------------------------------------

_LIBRARIES: list[torch.library.Library] = []


def prepare_torchvision() -> None:
    """Let torchvision be imported beside a CPU build of torch.

    Its wheel then lacks its compiled part, which only detectors' last steps call.
    """
    if not hasattr(torch.ops.torchvision, "nms"):
        library = torch.library.Library("torchvision", "DEF")
        for name in ("nms", "qnms"):
            library.define(
                f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
            )
        _LIBRARIES.append(library)


def _torchvision() -> Iterator[Case]:
    prepare_torchvision()
    from torchvision import models

    small = (
        "alexnet densenet121 efficientnet_b0 efficientnet_v2_s googlenet inception_v3 "
        "mnasnet0_5 mobilenet_v2 mobilenet_v3_large mobilenet_v3_small regnet_x_400mf "
        "regnet_y_400mf resnet18 resnet50 resnext50_32x4d shufflenet_v2_x0_5 vgg11_bn "
        "wide_resnet50_2"
    )
    segmentation = "deeplabv3_resnet50 fcn_resnet50 lraspp_mobilenet_v3_large"
    video = "r3d_18 mc3_18 r2plus1d_18 s3d"
    for name in (small + " " + segmentation).split():
        yield Case(
            f"torchvision/{name}",
            lambda name=name: (
                models.get_model(name, weights=None, weights_backbone=None)
                if name in segmentation.split()
                else models.get_model(name, weights=None)
            ),
            _images(64, 96, 128, 299),
        )
    clip = torch.randn(1, 3, 8, 64, 64, generator=torch.Generator().manual_seed(0))
    clip_of_16 = torch.randn(
        1, 3, 16, 224, 224, generator=torch.Generator().manual_seed(0)
    )
    for name in video.split():
        yield Case(
            f"torchvision/{name}",
            lambda name=name: models.get_model(name, weights=None),
            (clip, clip_of_16),
        )
    for name in ("fasterrcnn_resnet50_fpn", "fasterrcnn_mobilenet_v3_large_fpn"):
        yield Case(
            f"torchvision/{name}.backbone",
            lambda name=name: (
                models.get_model(name, weights=None, weights_backbone=None).backbone
            ),
            _images(64, 128),
        )
    pair = _images(128, 128)
    yield Case(
        "torchvision/raft_small",
        lambda: models.get_model("raft_small", weights=None),
        (pair,),
    )
    yield Case(
        "torchvision/raft_large",
        lambda: models.get_model("raft_large", weights=None),
        (pair,),
    )


# transformers --------------------------------------------------------------------


def _transformers() -> Iterator[Case]:
    prepare_torchvision()
    import transformers as hf

    def made(name: str, make: Callable[[], nn.Module], *inputs: Any) -> Case:
        return Case(f"transformers/{name}", make, inputs)

    def pixels(*sizes: int) -> tuple[Any, ...]:
        return tuple({"pixel_values": image} for image in _images(*sizes))

    def plain(name: str, **settings: Any) -> Callable[[], nn.Module]:
        def make() -> nn.Module:
            config = getattr(hf, f"{name}Config")(**settings)
            return getattr(hf, f"{name}Model")(config)

        return make

    def headed(name: str, head: str, **settings: Any) -> Callable[[], nn.Module]:
        def make() -> nn.Module:
            config = getattr(hf, f"{name}Config")(**settings)
            return getattr(hf, f"{name}{head}")(config)

        return make

    resnet = {"embedding_size": 16, "hidden_sizes": [16, 32, 48, 64]}
    resnet |= {"depths": [1, 1, 1, 1]}

    def backbone() -> Any:
        return hf.ResNetConfig(
            **resnet, out_features=["stage1", "stage2", "stage3", "stage4"]
        )

    detr = {"encoder_layers": 1, "decoder_layers": 1, "d_model": 64}
    detr |= {"encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "num_queries": 5}
    speech = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    speech |= {"intermediate_size": 64, "vocab_size": 32}
    draw = torch.Generator().manual_seed(0)
    wave = torch.randn(1, 8000, generator=draw)
    series = torch.randn(2, 64, 3, generator=draw)

    yield made("resnet", plain("ResNet", **resnet), *pixels(64))
    yield made("resnet-50", plain("ResNet"), *pixels(64))
    yield made(
        "regnet",
        plain(
            "RegNet",
            embedding_size=16,
            hidden_sizes=[16, 32, 48, 64],
            depths=[1, 1, 2, 1],
            groups_width=8,
        ),
        *pixels(64),
    )
    yield made("mobilenet_v1", plain("MobileNetV1"), *pixels(64))
    yield made("mobilenet_v2", plain("MobileNetV2"), *pixels(64))
    yield made(
        "efficientnet",
        plain(
            "EfficientNet", width_coefficient=0.5, depth_coefficient=0.5, hidden_dim=640
        ),
        *pixels(64),
    )
    yield made(
        "align",
        plain("AlignVision", width_coefficient=0.5, depth_coefficient=0.5),
        *pixels(64),
    )
    yield made("mobilevit", plain("MobileViT"), *pixels(64, 256))
    yield made("mobilevitv2", plain("MobileViTV2"), *pixels(64, 256))
    yield made(
        "levit", headed("Levit", "ForImageClassificationWithTeacher"), *pixels(224)
    )
    yield made("cvt", plain("Cvt", depth=[1, 1, 2]), *pixels(64))
    yield made("swiftformer", plain("SwiftFormer"), *pixels(64, 224))
    yield made("segformer", headed("Segformer", "ForSemanticSegmentation"), *pixels(64))
    yield made("hgnet_v2", headed("HGNetV2", "ForImageClassification"), *pixels(64))
    yield made("textnet", plain("TextNet"), *pixels(64))
    yield made("bit", plain("Bit", layer_type="bottleneck"), *pixels(64))
    yield made(
        "rt_detr",
        plain(
            "RTDetr",
            encoder_layers=1,
            decoder_layers=2,
            num_queries=10,
            backbone_config=hf.RTDetrResNetConfig(
                **resnet | {"hidden_sizes": [16, 32, 48, 64]},
                out_features=["stage2", "stage3", "stage4"],
            ),
            encoder_in_channels=[32, 48, 64],
        ),
        *pixels(128),
    )
    yield made(
        "rt_detr_v2", plain("RTDetrV2", decoder_layers=2, num_queries=10), *pixels(128)
    )
    yield made("d_fine", plain("DFine", decoder_layers=2, num_queries=10), *pixels(128))
    yield made(
        "detr",
        lambda: hf.DetrModel(
            hf.DetrConfig(
                use_timm_backbone=False,
                backbone=None,
                use_pretrained_backbone=False,
                backbone_config=backbone(),
                **detr,
            )
        ),
        *pixels(64),
    )
    yield made(
        "conditional_detr",
        lambda: hf.ConditionalDetrModel(
            hf.ConditionalDetrConfig(
                use_timm_backbone=False,
                backbone=None,
                use_pretrained_backbone=False,
                backbone_config=backbone(),
                **detr,
            )
        ),
        *pixels(64),
    )
    yield made(
        "deformable_detr",
        lambda: hf.DeformableDetrModel(
            hf.DeformableDetrConfig(
                use_timm_backbone=False,
                backbone=None,
                use_pretrained_backbone=False,
                backbone_config=backbone(),
                **detr,
            )
        ),
        *pixels(128),
    )
    yield made(
        "table_transformer",
        lambda: hf.TableTransformerModel(
            hf.TableTransformerConfig(
                use_timm_backbone=False,
                backbone=None,
                use_pretrained_backbone=False,
                backbone_config=backbone(),
                **detr,
            )
        ),
        *pixels(64),
    )
    yield made(
        "dpt",
        headed(
            "DPT",
            "ForDepthEstimation",
            use_batch_norm_in_fusion_residual=True,
            hidden_size=64,
            num_hidden_layers=4,
            num_attention_heads=4,
            intermediate_size=64,
            backbone_out_indices=[0, 1, 2, 3],
            neck_hidden_sizes=[16, 32, 48, 64],
            fusion_hidden_size=32,
            image_size=64,
        ),
        *pixels(64),
    )
    yield made(
        "beit",
        headed(
            "Beit",
            "ForSemanticSegmentation",
            hidden_size=64,
            num_hidden_layers=4,
            num_attention_heads=4,
            intermediate_size=64,
            image_size=64,
            patch_size=16,
            out_indices=[0, 1, 2, 3],
        ),
        *pixels(64),
    )
    yield made(
        "data2vec-vision",
        headed(
            "Data2VecVision",
            "ForSemanticSegmentation",
            hidden_size=64,
            num_hidden_layers=4,
            num_attention_heads=4,
            intermediate_size=64,
            image_size=64,
            patch_size=16,
            out_indices=[0, 1, 2, 3],
        ),
        *pixels(64),
    )
    yield made(
        "upernet",
        lambda: hf.UperNetForSemanticSegmentation(
            hf.UperNetConfig(
                backbone_config=backbone(), hidden_size=32, auxiliary_in_channels=48
            )
        ),
        *pixels(64),
    )
    yield made(
        "vitpose",
        lambda: hf.VitPoseForPoseEstimation(
            hf.VitPoseConfig(
                use_simple_decoder=False,
                backbone_config=hf.VitPoseBackboneConfig(
                    hidden_size=64,
                    num_hidden_layers=2,
                    num_attention_heads=4,
                    image_size=[64, 64],
                    num_experts=1,
                ),
            )
        ),
        *pixels(64),
    )
    yield made(
        "vitmatte",
        lambda: hf.VitMatteForImageMatting(
            hf.VitMatteConfig(
                backbone_config=hf.VitDetConfig(
                    hidden_size=64,
                    num_hidden_layers=2,
                    num_attention_heads=4,
                    image_size=64,
                    num_channels=4,
                    out_features=["stage2"],
                ),
                hidden_size=64,
            )
        ),
        {"pixel_values": torch.randn(1, 4, 64, 64, generator=draw)},
    )
    yield made(
        "maskformer",
        lambda: hf.MaskFormerModel(
            hf.MaskFormerConfig(
                backbone_config=backbone(),
                decoder_config=hf.DetrConfig(
                    use_timm_backbone=False,
                    backbone=None,
                    use_pretrained_backbone=False,
                    backbone_config=backbone(),
                    **detr,
                ),
            )
        ),
        *pixels(64),
    )
    yield made(
        "patchtst",
        plain(
            "PatchTST",
            num_input_channels=3,
            context_length=64,
            patch_length=8,
            patch_stride=8,
        ),
        {"past_values": series},
    )
    yield made(
        "patchtsmixer",
        plain(
            "PatchTSMixer",
            num_input_channels=3,
            context_length=64,
            patch_length=8,
            patch_stride=8,
            norm_mlp="BatchNorm",
        ),
        {"past_values": series},
    )
    yield made(
        "wav2vec2_conformer",
        plain("Wav2Vec2Conformer", **speech),
        {"input_values": wave},
    )
    yield made(
        "hubert",
        plain("Hubert", conv_pos_batch_norm=True, **speech),
        {"input_values": wave},
    )
    yield made(
        "speecht5",
        lambda: hf.SpeechT5HifiGan(hf.SpeechT5HifiGanConfig()),
        torch.randn(1, 20, 80, generator=draw),
    )
    yield made(
        "fastspeech2_conformer",
        plain(
            "FastSpeech2Conformer", hidden_size=64, encoder_layers=1, decoder_layers=1
        ),
        {"input_ids": torch.arange(1, 9)[None]},
    )
    yield made(
        "parakeet",
        headed(
            "Parakeet",
            "ForCTC",
            encoder_config={
                "hidden_size": 64,
                "num_hidden_layers": 2,
                "num_attention_heads": 4,
                "intermediate_size": 64,
                "subsampling_conv_channels": 16,
            },
        ),
        {"input_features": torch.randn(1, 100, 80, generator=draw)},
    )
    yield made(
        "clap",
        plain("ClapAudio", depths=[1, 1, 2, 1], num_hidden_layers=4),
        {"input_features": torch.randn(1, 1, 1001, 64, generator=draw)},
    )
    yield made(
        "informer",
        plain(
            "Informer",
            prediction_length=8,
            context_length=16,
            lags_sequence=[1, 2],
            num_time_features=1,
        ),
        {
            "past_values": torch.randn(2, 18, generator=draw),
            "past_time_features": torch.randn(2, 18, 1, generator=draw),
            "past_observed_mask": torch.ones(2, 18),
            "future_values": torch.randn(2, 8, generator=draw),
            "future_time_features": torch.randn(2, 8, 1, generator=draw),
        },
    )
    yield made(
        "efficientloftr",
        plain("EfficientLoFTR"),
        {"pixel_values": torch.randn(1, 2, 3, 64, 64, generator=draw)},
        {"pixel_values": torch.randn(1, 2, 3, 128, 128, generator=draw)},
    )
    yield made("pp_lcnet", headed("PPLCNet", "ForImageClassification"), *pixels(64))
    yield made("uvdoc", plain("UVDoc"), *pixels(128, 256))
    yield made(
        "zoedepth",
        lambda: hf.ZoeDepthForDepthEstimation(
            hf.ZoeDepthConfig(
                backbone_config=hf.BeitConfig(
                    hidden_size=64,
                    num_hidden_layers=4,
                    num_attention_heads=4,
                    intermediate_size=64,
                    image_size=64,
                    patch_size=16,
                    out_features=["stage1", "stage2", "stage3", "stage4"],
                    reshape_hidden_states=False,
                ),
                use_batch_norm_in_fusion_residual=True,
                neck_hidden_sizes=[16, 32, 48, 64],
                fusion_hidden_size=32,
                bottleneck_features=32,
            )
        ),
        *pixels(64),
    )
    yield made(
        "perceiver",
        lambda: hf.PerceiverForImageClassificationConvProcessing(
            hf.PerceiverConfig(
                num_latents=8, d_latents=64, num_self_attends_per_block=1
            )
        ),
        {"inputs": _images(224)[0]},
    )
    yield made(
        "seamless_m4t",
        lambda: __import__(
            "transformers.models.seamless_m4t.modeling_seamless_m4t", fromlist=["x"]
        ).SeamlessM4TSpeechEncoder(
            hf.SeamlessM4TConfig(
                hidden_size=64,
                speech_encoder_layers=1,
                speech_encoder_attention_heads=4,
                speech_encoder_intermediate_size=64,
            )
        ),
        {"input_features": torch.randn(1, 40, 160, generator=draw)},
    )
    yield made(
        "pp_ocrv5_mobile_det",
        headed("PPOCRV5MobileDet", "ForObjectDetection"),
        *pixels(64),
    )
    yield made(
        "pp_ocrv5_server_det",
        headed("PPOCRV5ServerDet", "ForObjectDetection"),
        *pixels(64),
    )
    yield made("slanet", headed("SLANet", "ForTableRecognition"), *pixels(64, 488))
    yield made("lw_detr", plain("LwDetr"), *pixels(64))
