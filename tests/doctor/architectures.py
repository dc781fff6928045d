"""Architectures of timm, torchvision and transformers, small, with random weights.

Fresh ones have no fault: whatever the doctor says of them is a false alarm. Nothing is
downloaded. Images are digits, enlarged; texts are random tokens.
"""

import functools
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from importlib.util import find_spec
from typing import Any

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, interpolate

import normkit
from normkit.doctor import Finding, diagnose, watch

STARTS = ("fresh", "initialize")
BATCH, BATCHES, STEPS = 16, 8, 20
# Pixels; those that make less than one position of 32 of them get 64, and one whose
# attention then has a single key, so that queries get no gradient.
SMALL, LARGE = 32, 64
NEED_LARGE = {"alexnet", "squeezenet1_1", "swin_t", "ghostnetv2_100", "pvt_v2_b0"}

# A third are timm's own models for tests; of other files mostly the smallest.
TIMM = """
test_byobnet test_convnext test_convnext2 test_efficientnet test_efficientnet_gn
test_efficientnet_ln test_efficientnet_evos test_mambaout test_nfnet test_resnet
test_vit test_vit2 test_vit3 resnet18 resnet26d skresnet18 resnetv2_50
ecaresnet26t regnetx_002 regnety_002 repvgg_a0 mobilenetv2_035 mobilenetv3_small_050
mobilenetv4_conv_small_035 mnasnet_small tinynet_e lcnet_035 ghostnet_050
ghostnetv2_100 rexnet_100 efficientnet_lite0 fbnetc_100 spnasnet_100 hardcorenas_a
ese_vovnet19b_slim dla46_c selecsls42 darknet17 cspresnet50 hrnet_w18_small dpn48b
densenet121 convnext_atto convnextv2_atto edgenext_xx_small mobilevit_xxs
mobilevitv2_050 poolformer_s12 pvt_v2_b0 vit_tiny_patch16_224 deit_tiny_patch16_224
resmlp_12_224 gmlp_ti16_224 cait_xxs24_224 xcit_nano_12_p16_224
fastvit_t8 repghostnet_050 starnet_s1 hgnetv2_b0 efficientvit_b0 inception_next_atto
swin_tiny_patch4_window7_224
"""
TORCHVISION = """
alexnet vgg11 vgg11_bn resnet18 resnext50_32x4d densenet121 squeezenet1_1 googlenet
mobilenet_v2 mobilenet_v3_small shufflenet_v2_x0_5 mnasnet0_5 regnet_y_400mf
efficientnet_b0 convnext_tiny swin_t
"""


@dataclass(frozen=True)
class Architecture:
    """One model, the batches it takes, and its loss."""

    build: Callable[[], nn.Module]
    batches: Callable[[], list[Any]]
    loss_fn: Callable[[Any, Any], Tensor] = cross_entropy


@functools.cache
def images(size: int = SMALL) -> list[tuple[Tensor, Tensor]]:
    x, y = load_digits(return_X_y=True)
    x = torch.tensor(x, dtype=torch.float32)
    x = ((x - x.mean()) / x.std()).view(-1, 1, 8, 8)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    parts = order.split(BATCH)[:BATCHES]
    large = [interpolate(x[i], (size, size), mode="bilinear") for i in parts]
    return [
        (part.expand(-1, 3, -1, -1).contiguous(), torch.tensor(y)[i])
        for part, i in zip(large, parts, strict=True)
    ]


def texts(**more: Callable[[Tensor], Tensor]) -> list[dict[str, Tensor]]:
    """Batches of 24 tokens; `more` makes other entries from them."""
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 200, (BATCHES, BATCH, 24), generator=draw)
    return [
        {"input_ids": part, **{name: make(part) for name, make in more.items()}}
        for part in ids
    ]


def cases() -> dict[str, Architecture]:
    """All architectures whose library is installed, by `library/name`."""
    found = {}
    if find_spec("timm"):
        found |= {f"timm/{name}": a for name, a in _timm()}
    if find_spec("torchvision"):
        found |= {f"torchvision/{name}": a for name, a in _torchvision()}
    if find_spec("transformers"):
        found |= {f"transformers/{name}": a for name, a in _transformers()}
    return found


def alarms(name: str, start: str) -> list[Finding]:
    """Diagnose a fresh model, watch 20 steps of its training; return the alarms."""
    case = cases()[name]
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model, batches = case.build(), case.batches()
        if start == "initialize":
            first = batches[0]
            example = first[0] if isinstance(first, tuple) else first
            normkit.initialize(model, example_inputs=example)
        found = diagnose(model, batches, case.loss_fn).readings
        model.train()
        optimizer = torch.optim.AdamW(model.parameters(), 3e-4)
        with watch(model, optimizer) as seen:
            for step in range(STEPS):
                optimizer.zero_grad()
                loss = _loss(case, model, batches[step % len(batches)])
                loss.backward()
                optimizer.step()
                seen.log(loss=loss.item())
    return [f for f in [*found, *seen.readings()] if f.is_alarm]


def _loss(case: Architecture, model: nn.Module, batch: Any) -> Tensor:
    if isinstance(batch, dict):
        return case.loss_fn(model(**batch), batch)
    return case.loss_fn(model(batch[0]), batch[1])


def prepare_torchvision() -> None:
    """Let torchvision be imported beside a CPU build of torch.

    Its wheel then lacks its compiled part, which only detectors' last steps call.
    """
    if not hasattr(torch.ops.torchvision, "nms"):
        library = torch.library.Library("torchvision", "FRAGMENT")
        _LIBRARIES.append(library)
        for name in ("nms", "qnms"):
            library.define(
                f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
            )


_LIBRARIES: list[torch.library.Library] = []


def _timm() -> Iterator[tuple[str, Architecture]]:
    prepare_torchvision()
    import timm

    def has_positions(name: str) -> bool:
        return name.endswith("_224") or name.startswith("test_vit")

    def build(name: str) -> nn.Module:
        # They are made for one size of image.
        more = {"img_size": LARGE} if has_positions(name) else {}
        try:
            return timm.create_model(name, num_classes=10, **more)
        except TypeError:
            return timm.create_model(name, num_classes=10)

    for name in TIMM.split():
        if timm.is_model(name):
            is_large = has_positions(name) or name in NEED_LARGE
            size = LARGE if is_large else SMALL
            pictures = functools.partial(images, size)
            yield name, Architecture(functools.partial(build, name), pictures)


def _torchvision() -> Iterator[tuple[str, Architecture]]:
    prepare_torchvision()
    from torchvision import models

    def build(name: str) -> nn.Module:
        more: dict[str, Any] = {"weights": None, "num_classes": 10}
        if name == "googlenet":
            more |= {"aux_logits": False, "init_weights": True}
        return models.get_model(name, **more)

    for name in TORCHVISION.split():
        pictures = functools.partial(images, LARGE if name in NEED_LARGE else SMALL)
        yield name, Architecture(functools.partial(build, name), pictures)
    vit = functools.partial(models.VisionTransformer, SMALL, 8, 4, 4, 64, 128)
    yield "vit", Architecture(functools.partial(vit, num_classes=10), images)


def _transformers() -> Iterator[tuple[str, Architecture]]:
    prepare_torchvision()
    import transformers as hf

    def model(kind: str, head: str, **settings: Any) -> Callable[[], nn.Module]:
        def make() -> nn.Module:
            config = getattr(hf, f"{kind}Config")(**settings)
            return getattr(hf, f"{kind}{head}")(config)

        return make

    size = {"hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4}
    encoder = {**size, "intermediate_size": 128, "vocab_size": 200, "num_labels": 3}
    decoder = {**encoder, "num_key_value_heads": 2}
    classified = functools.partial(texts, labels=lambda ids: ids[:, 0] % 3)
    continued = functools.partial(texts, labels=lambda ids: ids)

    def own_loss(output: Any, batch: Any) -> Tensor:
        return output.loss

    def text(build: Callable[[], nn.Module], batches: Any) -> Architecture:
        return Architecture(build, batches, own_loss)

    for kind in ("Bert", "Roberta", "Electra", "MPNet", "DebertaV2", "RoFormer"):
        head = "ForSequenceClassification"
        yield kind.lower(), text(model(kind, head, **encoder), classified)
    albert = {**encoder, "embedding_size": 32}
    yield (
        "albert",
        text(model("Albert", "ForSequenceClassification", **albert), classified),
    )
    distil = {"dim": 64, "n_layers": 4, "n_heads": 4, "hidden_dim": 128}
    distil |= {"vocab_size": 200, "num_labels": 3}
    yield (
        "distilbert",
        text(model("DistilBert", "ForSequenceClassification", **distil), classified),
    )
    gpt2 = {"n_embd": 64, "n_layer": 4, "n_head": 4, "vocab_size": 200}
    yield "gpt2", text(model("GPT2", "LMHeadModel", **gpt2), continued)
    for kind in ("Llama", "Mistral", "Qwen2", "Gemma", "StableLm"):
        yield kind.lower(), text(model(kind, "ForCausalLM", **decoder), continued)
    for kind in ("GPTNeoX", "Phi"):
        yield kind.lower(), text(model(kind, "ForCausalLM", **encoder), continued)
    opt = {**size, "ffn_dim": 128, "vocab_size": 200, "word_embed_proj_dim": 64}
    yield "opt", text(model("OPT", "ForCausalLM", **opt), continued)
    t5 = {"d_model": 64, "d_kv": 16, "d_ff": 128, "num_layers": 3, "num_heads": 4}
    t5 |= {"vocab_size": 200, "decoder_start_token_id": 0}
    yield "t5", text(model("T5", "ForConditionalGeneration", **t5), continued)
    bart = {"d_model": 64, "encoder_layers": 2, "decoder_layers": 2}
    bart |= {"encoder_attention_heads": 4, "decoder_attention_heads": 4}
    bart |= {"encoder_ffn_dim": 128, "decoder_ffn_dim": 128, "vocab_size": 200}
    yield "bart", text(model("Bart", "ForConditionalGeneration", **bart), continued)
    pictures = Architecture(
        model("ViT", "ForImageClassification", **size, image_size=SMALL, num_labels=10),
        lambda: [{"pixel_values": x, "labels": y} for x, y in images()],
        own_loss,
    )
    yield "vit", pictures
    sizes = {"embedding_size": 16, "hidden_sizes": [16, 32, 48, 64]}
    sizes |= {"depths": [1, 1, 1, 1], "num_labels": 10}
    yield (
        "resnet",
        replace(pictures, build=model("ResNet", "ForImageClassification", **sizes)),
    )
    levels = {"hidden_sizes": [16, 32, 48, 64], "depths": [1, 1, 2, 1]}
    yield (
        "convnext",
        replace(
            pictures,
            build=model("ConvNext", "ForImageClassification", **levels, num_labels=10),
        ),
    )
