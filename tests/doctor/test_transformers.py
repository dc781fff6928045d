"""Attention, residual streams and spikes: what is measured, and when it is an alarm."""

import copy
import itertools
import math
import threading
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from doctor.faults.transformers import Encoding
from doctor.models import batches, moments_of
from normkit.doctor import Finding, Statistics, checks, diagnose, watch
from normkit.doctor.measurements import (
    LayerStatistics,
    TrainingStatistics,
    WeightStatistics,
)
from normkit.doctor.probes.probes import Probes
from normkit.doctor.transformer_statistics import (
    AttentionStatistics,
    BlockStatistics,
    GainStatistics,
)

LOSS = nn.CrossEntropyLoss()
SDPA, SOFTMAX = F.scaled_dot_product_attention, Tensor.softmax


class SelfAttention(nn.Module):
    """One head per 8 channels, by any of the ways that programs compute attention."""

    def __init__(self, way: str, *, causal: bool = False) -> None:
        super().__init__()
        self.way, self.causal = way, causal
        with torch.random.fork_rng():
            torch.manual_seed(1)
            self.qkv = nn.Linear(16, 48)
            self.torch = nn.MultiheadAttention(16, 2, batch_first=True)
        with torch.no_grad():
            self.torch.in_proj_weight.copy_(self.qkv.weight)
            self.torch.in_proj_bias.copy_(self.qkv.bias)

    def forward(self, x: Tensor) -> Tensor:
        mask = None
        if self.causal:
            mask = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1)
        if self.way.startswith("module"):
            weights = self.way == "module with weights"
            return self.torch(x, x, x, need_weights=weights, attn_mask=mask)[0]
        q, k, v = self.heads(x)
        if self.way == "product":
            return SDPA_OF(q, k, v, self.causal).transpose(1, 2).flatten(2)
        scores = q @ k.mT / 8**0.5
        if mask is not None:
            scores = scores.masked_fill(mask, torch.finfo(scores.dtype).min)
        by = {
            "method": lambda: scores.softmax(-1),
            "function": lambda: F.softmax(scores, dim=-1),
            "layer": lambda: nn.Softmax(dim=-1)(scores),
            "torch": lambda: torch.softmax(scores, -1),
        }
        return (by[self.way]() @ v).transpose(1, 2).flatten(2)

    def heads(self, x: Tensor) -> list[Tensor]:
        parts = self.qkv(x).unflatten(-1, (3, 2, 8))
        return [part.transpose(1, 2) for part in parts.unbind(2)]

    def truth(self, x: Tensor) -> tuple[float, float]:
        """Largest |logit| and mean entropy share, with queries of two keys or more."""
        q, k, _ = (part.detach() for part in self.heads(x))
        scores = (q @ k.mT / 8**0.5).double()
        keys = torch.full((x.shape[1],), x.shape[1])
        if self.causal:
            later = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1)
            scores = scores.masked_fill(later, -math.inf)
            keys = torch.arange(1, x.shape[1] + 1)
        weights = scores.softmax(-1)
        entropy = torch.special.entr(weights).sum(-1)[..., keys > 1]
        share = entropy / keys[keys > 1].log()
        largest = scores[scores > -math.inf].abs().max()
        return float(largest), float(share.mean())


def SDPA_OF(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:  # noqa: N802
    return F.scaled_dot_product_attention(q, k, v, is_causal=causal)


WAYS = ("product", "method", "function", "layer", "torch", "module")


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("way", [*WAYS, "module with weights"])
def test_the_logits_of_attention_are_those_it_computes(way: str, causal: bool) -> None:
    model = SelfAttention(way, causal=causal)
    x = 3 * torch.randn(4, 6, 16, generator=torch.Generator().manual_seed(0))
    (found,) = diagnose(model, [x]).statistics.attention
    largest, entropy = model.truth(x)
    assert found.largest == pytest.approx([largest], rel=1e-5)
    assert found.entropy == pytest.approx([entropy], rel=1e-5)
    assert found.name == ("torch" if way.startswith("module") else "")


def test_long_attention_is_thinned_and_still_about_right() -> None:
    model = SelfAttention("product")
    x = torch.randn(6, 600, 16, generator=torch.Generator().manual_seed(0))
    (found,) = diagnose(model, [x]).statistics.attention
    largest, entropy = model.truth(x)
    assert 0.5 * largest < found.largest[0] <= largest * 1.00001
    assert found.entropy == pytest.approx([entropy], rel=0.02)


def test_groups_of_queries_share_their_keys() -> None:
    class Grouped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = Attention()

        def forward(self, x: Tensor) -> Tensor:
            return self.attention(x)

    class Attention(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            kv = x[:, :2]
            return F.scaled_dot_product_attention(x, kv, kv, enable_gqa=True)

    x = torch.randn(2, 4, 5, 8)
    with Probes(Grouped()).attached() as probes:
        probes.enter()
        probes.model(x)
        probes.leave(x)
        assert probes.blocks is not None
        (found,) = probes.blocks.attention.values()
        largest = found.numbers()["largest"]
    kv = x[:, :2].repeat_interleave(2, 1)
    torch.testing.assert_close(largest, (x @ kv.mT / 8**0.5).abs().max())


def test_the_functions_are_put_back_also_after_an_error() -> None:
    class Failing(SelfAttention):
        def forward(self, x: Tensor) -> Tensor:
            super().forward(x)
            raise RuntimeError("in the middle")

    x = torch.randn(4, 6, 16)
    diagnose(SelfAttention("product"), [x])
    with pytest.raises(RuntimeError, match="middle"):
        diagnose(Failing("product"), [x])
    with pytest.raises(RuntimeError, match="middle"), watch(Failing("method")) as seen:
        seen.model(x)
    assert F.scaled_dot_product_attention is SDPA
    assert "softmax" not in vars(Tensor)
    assert Tensor.softmax is SOFTMAX


def test_another_thread_is_not_heard() -> None:
    model = SelfAttention("product")
    x = torch.randn(4, 6, 16)

    class Beside(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = model

        def forward(self, x: Tensor) -> Tensor:
            far = threading.Thread(target=lambda: model.forward(1000 * x))
            far.start()
            far.join()
            return self.attention(x)

    (found,) = diagnose(Beside(), [x]).statistics.attention
    assert found.largest == pytest.approx([model.truth(x)[0]], rel=1e-5)


def trained(model: nn.Module, steps: int = 6, *, watched: bool) -> list[Tensor]:
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    seen = watch(model, optimizer, every=1)
    if watched:
        seen.__enter__()
    for x, y in batches()[:steps]:
        optimizer.zero_grad()
        LOSS(model(x), y).backward()
        optimizer.step()
    if watched:
        seen.__exit__(None, None, None)
        assert len(seen.statistics().attention) == 4
    return [parameter.detach() for parameter in model.parameters()]


def test_a_watched_transformer_is_bitwise_the_one_without() -> None:
    alone = trained(Encoding(4, pre=True), watched=False)
    seen = trained(Encoding(4, pre=True), watched=True)
    assert all(map(torch.equal, alone, seen))


@pytest.mark.parametrize("pre", [True, False])
def test_the_stream_is_what_the_blocks_give(pre: bool) -> None:
    model = Encoding(4, pre=pre).eval()
    kept: list[float] = []
    for layer in model.layers:
        layer.register_forward_hook(
            lambda m, a, y: kept.append(float(y.detach().std()))
        )
    x, y = batches()[0]
    blocks = diagnose(model, [(x, y)], LOSS).statistics.blocks
    assert [b.end for b in blocks] == ["sum" if pre else "norm"] * 4
    assert [b.follows for b in blocks] == ["", "layers.0", "layers.1", "layers.2"]
    assert [b.after[0] for b in blocks] == pytest.approx(kept[:4], rel=0.05)
    assert all(math.isfinite(b.gradient[0]) for b in blocks)


def _through(layers: Any, x: Tensor) -> Tensor:
    for layer in layers:
        x = layer(x)
    return x


def test_small_branches_do_not_make_gradients_vanish() -> None:
    model: Any = Encoding(4, pre=False)
    with torch.no_grad():
        for layer in model.layers:
            layer.attention.out_proj.weight *= 0.05
            layer.hidden.weight *= 0.05
            layer.out.weight *= 0.05
    draw = torch.Generator().manual_seed(0)
    tokens = [(torch.randn(64, 8, 32, generator=draw), y) for _, y in batches()[:4]]

    def forward(net: Any, batch: Any) -> Tensor:
        # As behind an embedding of words, which is no layer with a response.
        return net.head(_through(net.layers, batch[0]).mean(1))

    found = diagnose(model, tokens, LOSS, forward=forward)
    assert "D24" not in found.named
    (reading,) = [f for f in found.readings if f.id == "D24"]
    assert reading.value > 0.1


def alarm(statistics: Statistics, check: str) -> Finding:
    (found,) = checks.run(statistics, [check])
    return found


def stream(*rms: float, end: Any = "sum") -> Statistics:
    """Blocks with these rms, the first of them before the first block."""
    blocks = tuple(
        BlockStatistics(f"b{i}", "Block", f"b{i - 1}" if i else "", (a,), (b,), (), end)
        for i, (a, b) in enumerate(itertools.pairwise(rms))
    )
    return Statistics(blocks=blocks)


def test_d35_holds_the_second_half_to_its_thresholds() -> None:
    sums = [math.sqrt(1 + i) for i in range(13)]
    assert alarm(stream(*sums), "D35").severity == "clear"
    assert alarm(stream(0.01, 1, 2, 3, 4), "D35").severity == "clear"
    assert alarm(stream(1, 1, 1, 2.1, 4.3), "D35").severity == "warning"
    assert alarm(stream(1, 1, 1, 5, 25), "D35").severity == "error"
    assert checks.run(stream(1, 1, 1, 5, 25, end=""), ["D35"]) == []


def test_d35_names_a_stream_that_grows_with_the_training() -> None:
    def after(*values: float) -> Statistics:
        found = stream(1, 1, 1, 1, 1)
        last = replace(found.blocks[-1], after=values)
        return replace(found, while_training=True, blocks=(*found.blocks[:-1], last))

    steady = [1.1**i for i in range(20)]
    wild = [1.2**i for i in range(20)]
    assert len(checks.run(after(*steady), ["D35"])) == 1
    _, over_time = checks.run(after(*wild), ["D35"])
    assert over_time.is_alarm
    assert over_time.value == pytest.approx(1.2**5)


def attention(largest: float, sharp: float, entropy: float = 0.5) -> Statistics:
    seen = AttentionStatistics("attention", (largest,), (entropy,), (sharp,))
    return Statistics(attention=(seen,))


def test_d36_takes_large_logits_that_pick_one_key() -> None:
    assert alarm(attention(99.0, 1.0), "D36").severity == "clear"
    assert alarm(attention(101.0, 0.4), "D36").severity == "clear"
    assert alarm(attention(101.0, 0.6), "D36").severity == "warning"
    assert alarm(attention(1.1e4, 0.0), "D36").severity == "error"
    assert alarm(attention(math.inf, 0.0), "D36").severity == "error"


def gained(gain: Tensor, rms: float = 1.0) -> Statistics:
    layer = LayerStatistics(
        "norm",
        "LayerNorm",
        "norm",
        output=moments_of(100, 0, rms**2),
        gains=GainStatistics.of(gain),
    )
    return Statistics((layer,))


def test_d37_takes_one_channel_with_more_than_the_rest_together() -> None:
    gain = torch.ones(17)
    gain[3] = 3.9
    assert alarm(gained(gain, 1.4), "D37").severity == "clear"
    gain[3] = 4.1
    found = alarm(gained(gain, 1.4), "D37")
    assert (found.severity, found.details["channel"]) == ("warning", 3)


def test_d37_a_weight_that_is_added_to_one_is_not_judged() -> None:
    gain = 1e-3 * torch.ones(17)
    gain[3] = 0.1
    assert alarm(gained(gain), "D37").severity == "not_judged"


def post_norm(update: float, blocks: int = 8) -> Statistics:
    found = stream(*[1.0] * (blocks + 1), end="norm")
    layers = tuple(
        LayerStatistics(
            f"b{i}.fc",
            "Linear",
            "weight",
            weight=WeightStatistics(1.0, update_ratio=(update, 1e-3)),
        )
        for i in range(blocks)
    )
    return replace(found, layers=layers, training=TrainingStatistics(updates=2))


def test_d38_holds_the_first_steps_of_all_blocks_to_its_threshold() -> None:
    assert alarm(post_norm(0.019), "D38").severity == "clear"
    assert alarm(post_norm(0.021), "D38").severity == "warning"
    assert alarm(post_norm(0.021, blocks=4), "D38").severity == "clear"
    trial = TrainingStatistics(is_trial=True)
    judged = alarm(replace(post_norm(0.1), training=trial), "D38")
    assert judged.severity == "not_judged"


def losses(*values: float, moved: dict[int, int] | None = None) -> Statistics:
    """A training whose layers leap at the steps of `moved`."""
    steps = tuple(range(len(values)))
    layers = tuple(
        LayerStatistics(
            f"fc{i}",
            "Linear",
            "weight",
            weight=WeightStatistics(
                1.0,
                gradient_norm=(1.0,) * len(values),
                update_ratio=tuple(
                    1.0 if step == (moved or {}).get(i) else 1e-3 for step in steps
                ),
            ),
        )
        for i in range(3)
    )
    pairs = tuple(zip(steps, values, strict=True))
    training = TrainingStatistics(losses=pairs, steps=steps)
    return Statistics(layers, training=training)


CALM = [2.0 + 0.1 * (-1) ** i for i in range(30)]


def test_d39_names_the_layer_that_moved_first() -> None:
    found = alarm(losses(*CALM, *[6.0] * 6, moved={1: 28, 2: 29}), "D39")
    assert (found.severity, found.layer) == ("warning", "fc1")
    assert "at step 30 the loss leaps from 2" in found.evidence


def test_d39_one_step_informs_and_the_noise_of_a_run_is_none() -> None:
    assert alarm(losses(*CALM, 6.0, *CALM), "D39").severity == "info"
    assert alarm(losses(*CALM, 3.9, *CALM), "D39").severity == "clear"
    noisy = [2.0 + 1.5 * (-1) ** i for i in range(30)]
    assert alarm(losses(*noisy, 8.0, *[8.0] * 5), "D39").severity == "clear"
    assert alarm(losses(*CALM, math.nan), "D39").is_reported
    # Of a loss that has fallen to a thousandth, twice is nothing.
    small = [2.0] * 25 + [1e-3] * 25
    assert alarm(losses(*small, *[5e-3] * 6), "D39").severity == "clear"


def test_d39_a_large_loss_of_one_batch_does_not_stay_up() -> None:
    # Near zero the losses of small batches differ by a factor of a hundred. Those of
    # `after` are a healthy program's, prototypes of benchmarks/doctor.
    fallen = [0.3 * 0.9**i for i in range(40)] + [0.006, 0.004, 0.009, 0.005, 0.007] * 6
    after = [0.0996, 0.0256, 0.0042, 0.0067, 0.125, 0.0021, 0.0023, 0.0114, 0.0077]
    found = alarm(losses(*fallen, *after), "D39")
    assert found.severity == "info"
    assert "the median of 9 losses from there on is 0.0077" in found.evidence
    assert alarm(losses(*fallen, *[0.0996] * 5), "D39").severity == "warning"
    noise = torch.randn(40, 300, generator=torch.Generator().manual_seed(0))
    loud = [
        alarm(losses(*row), "D39").severity
        for row in (1.5 * noise).exp().double().tolist()
    ]
    assert loud.count("info") > 30
    assert "warning" not in loud


def test_d39_leaps_at_one_distance_are_the_loops_own() -> None:
    # The loss of a Q-network rises with each copy of its target network.
    tooth = [0.05 + 0.3 * 0.7**i for i in range(50)]
    found = alarm(losses(*[0.02] * 25, *tooth * 4), "D39")
    assert found.severity == "info"
    assert "it leaps every 50 steps" in found.evidence
    uneven = [*tooth, *tooth[:31], *tooth[:44]]
    assert alarm(losses(*[0.02] * 25, *uneven), "D39").severity == "warning"


def test_d39_a_leap_stays_where_most_later_losses_are_above_all_before() -> None:
    fallen = [2.0 * 0.9**i + 0.02 for i in range(80)]

    def after(*values: float) -> str:
        return alarm(losses(*fallen, *values), "D39").severity

    # As after a copy of a target network.
    assert after(*[0.5 * 0.3**i + 0.02 for i in range(20)]) == "info"
    assert after(*[0.5 * 0.97**i + 0.02 for i in range(20)]) == "warning"
    assert after(*[1.5] * 6, *[0.02] * 5) == "warning"
    assert after(*[1.5] * 6, *[0.02] * 7) == "info"
    # Of few, all: and what comes right before the record ends is not known to stay.
    assert after(*[1.5] * 5) == "warning"
    assert after(*[1.5] * 4, 0.02, *[1.5] * 4) == "info"
    found = alarm(losses(*fallen, *[1.5] * 4), "D39")
    assert (found.severity, "too few losses follow" in found.evidence) == ("info", True)


def test_d39_names_the_leap_that_stays_among_those_that_do_not() -> None:
    found = alarm(losses(*CALM, 6.0, *CALM, *[7.0] * 6), "D39")
    assert found.severity == "warning"
    assert "at step 61 " in found.evidence
    # Training came down from as much before.
    assert alarm(losses(*CALM, 6.0, *CALM, *[5.0] * 6), "D39").severity == "info"


def test_the_record_and_the_page_hold_blocks_and_attention() -> None:
    model = copy.deepcopy(Encoding(4, pre=True))
    with watch(model) as seen:
        for x, y in batches()[:3]:
            LOSS(model(x), y).backward()
    assert [len(b["after"]) for b in seen.history["blocks"].values()] == [3] * 4
    assert list(seen.history["attention"]) == [
        f"layers.{i}.attention" for i in range(4)
    ]
    pages = (seen.to_html(), diagnose(model, batches()[:4], LOSS).to_html())
    assert all("Blocks and attention" in page for page in pages)


def test_a_projection_that_query_and_key_share_is_no_redundant_layer() -> None:
    class Projected(nn.Module):
        def __init__(self, shares: bool) -> None:
            super().__init__()
            self.project, self.shares = nn.Linear(64, 16), shares
            self.query, self.key = nn.Linear(16, 16), nn.Linear(16, 16)
            self.head = nn.Linear(16, 10)

        def forward(self, x: Tensor) -> Tensor:
            x = self.project(x)
            key = self.key(x) if self.shares else 1.0
            return self.head((self.query(x) * key).relu())

    named = [
        diagnose(Projected(shares), batches()[:4], LOSS).named
        for shares in (True, False)
    ]
    assert named == [[], ["D34"]]
