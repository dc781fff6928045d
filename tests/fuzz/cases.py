"""A case of a layer as a value: its repr is the line that runs it again."""

from dataclasses import dataclass, fields
from math import prod

from hypothesis import strategies as st

from fuzz.tensors import DTYPES, FILLS, MASKS, SIZES, layouts, seeds

# What normalizes over the batch, and knows an activation, a residual and memory=.
BATCH = ("BatchNorm", "SyncBatchNorm", "FrozenBatchNorm")
TRACKING = (*BATCH, "InstanceNorm", "PerActivationBatchNorm")
KINDS = (*TRACKING, "LayerNorm", "RMSNorm", "GroupNorm", "FilterResponseNorm")
ACTIVATIONS = ("none", "relu", "leaky_relu", "silu", "gelu", "sigmoid", "tanh")
# Bound of a running statistic, in eps of float32: a sum whose lanes take up to 128
# additions in float32, each off by 0.3 eps (a standard deviation), √128·0.3 = 3.3
# together; three of those, 1.5 for a square of x − mean, and half where it is stored.
# The largest of 1,500 cases was 6.5.
OF_STATISTICS = 12
WAYS = (
    *("plain", "deterministic", "reference", "checkpoint", "reentrant"),
    *("less memory", "no grad", "inference", "vjp", "jvp", "vmap", "graph of backward"),
)


class Short:
    """A dataclass that shows the fields that are not at their defaults."""

    def __repr__(self) -> str:
        shown = [
            f"{f.name}={getattr(self, f.name)!r}"
            for f in fields(self)  # type: ignore[arg-type]
            if getattr(self, f.name) != f.default
        ]
        return f"{type(self).__name__}({', '.join(shown)})".replace("'", '"')


@dataclass(frozen=True, repr=False)
class LayerCase(Short):
    """A layer, its input and the ways in which it is called, one after the other."""

    kind: str
    shape: tuple[int, ...]
    dtype: str = "float32"
    parameters: str = "float32"
    channel: int = 1
    groups: int = 1
    trailing: int = 1
    layout: str = "contiguous"
    grad_layout: str = "contiguous"
    residual: str = ""
    fill: str = "normal"
    seed: int = 0
    training: bool = True
    tracks: bool = True
    weight: bool = True
    bias: bool = True
    trained: str = "all"
    mask: str = "none"
    activation: str = "none"
    memory: str = ""
    ways: tuple[str, ...] = ("plain",)
    eps: float = 1e-5
    momentum: float | None = 0.1
    ghost_size: int | None = None
    estimator: str = "unbiased"
    debias: bool = False
    on_small_batch: str = "raise"
    poison: str = ""

    @property
    def channels(self) -> int:
        """The size along which weight and bias lie."""
        return self.shape[self.channel]

    @property
    def vector_shape(self) -> tuple[int, ...]:
        """The shape of weight and bias."""
        if self.kind == "PerActivationBatchNorm":
            return self.shape[1:]
        if self.trailing > 1:
            return self.shape[-self.trailing :]
        return (self.channels,)

    @property
    def keeps_bytes(self) -> bool:
        """True when a recorded forward rounds its input to bytes."""
        is_exact = self.activation == "leaky_relu" or (
            self.activation != "none" and not self.residual
        )
        # A policy looks at the values between the norm and its activation.
        is_exact = is_exact and self.on_small_batch == "raise"
        # Channels of one value go by the running statistics, after the mask.
        is_masked = self.mask != "none" and self.on_small_batch != "running"
        return self.memory == "int8" and not (is_masked or is_exact)

    @property
    def uses_batch(self) -> bool:
        """True when the statistics are those of the input."""
        if self.kind == "FrozenBatchNorm":
            return False
        return self.kind not in TRACKING or self.training or not self.tracks

    @property
    def updates(self) -> bool:
        """True when running statistics change."""
        is_tracking = self.kind in TRACKING and self.tracks
        return is_tracking and self.training and self.uses_batch


@dataclass(frozen=True, repr=False)
class OtherCase(Short):
    """A layer or function of another kind, and its input."""

    kind: str
    samples: int = 4
    channels: int = 4
    positions: tuple[int, ...] = ()
    dtype: str = "float32"
    layout: str = "contiguous"
    grad_layout: str = "contiguous"
    fill: str = "normal"
    seed: int = 0
    training: bool = True
    eps: float = 1e-5
    option: int = 0
    masked: bool = False

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the input."""
        return (self.samples, self.channels, *self.positions)


shapes = st.one_of(
    st.lists(st.sampled_from(SIZES), min_size=2, max_size=5).map(tuple),
    # Sizes of 1, where torch is wrong, and rows that fill registers unevenly.
    st.lists(st.sampled_from((1, 1, 2, 6)), min_size=2, max_size=5).map(tuple),
    st.sampled_from(
        [(0, 3, 4), (4, 6, 1, 1), (2, 64), (3, 257), (2, 16, 33), (40, 7, 9)]
    ),
)
# Above the sizes at which work is shared by threads, and torch's operator is left.
large = st.sampled_from([(64, 33, 9, 9), (8, 16, 40, 41), (300, 513), (3, 5, 9000)])


@st.composite
def layer_cases(draw: st.DrawFn, kinds: tuple[str, ...] = KINDS) -> LayerCase:
    """Draw any case that a layer takes, or must refuse."""
    kind = draw(st.sampled_from(kinds))
    is_large = draw(st.integers(0, 29)) == 29
    shape = draw(large if is_large else shapes)
    if kind in ("InstanceNorm", "FilterResponseNorm") and len(shape) == 2:
        shape = (*shape, draw(st.sampled_from(SIZES)))
    dtype = draw(st.sampled_from(sorted(DTYPES, key=lambda d: d != "float32")))
    same_or_wide = [dtype] if dtype == "float64" else ["float32", dtype]
    channel = 1
    if kind in ("BatchNorm", "InstanceNorm"):
        channel = draw(st.sampled_from([1, 1, -1])) % len(shape)
    elif kind in ("LayerNorm", "RMSNorm"):
        channel = len(shape) - 1
        if kind == "LayerNorm" and len(shape) > 2:
            channel = draw(st.sampled_from([channel, channel, 1]))
    trailing = 1
    if kind in ("LayerNorm", "RMSNorm") and channel == len(shape) - 1:
        trailing = draw(st.integers(1, len(shape) - 1))
    sizes = [g for g in (1, 2, 3, 4, 8) if shape[1] % g == 0]
    is_batch, is_plain = kind in BATCH, kind not in TRACKING
    takes_residual = is_batch or kind in ("LayerNorm", "RMSNorm")
    has_residual = takes_residual and draw(st.integers(0, 2)) == 2
    options = {}
    training = draw(st.booleans())
    if kind == "BatchNorm":
        options = {
            "memory": draw(st.sampled_from(["", "", "recompute", "int8"])),
            "estimator": draw(st.sampled_from(["unbiased", "unbiased", "biased"])),
            "debias": draw(st.sampled_from([False, False, True])),
        }
        extra = draw(st.sampled_from(["", "", "ghosts", "small"]))
        if extra == "ghosts" and channel == 1:
            options["ghost_size"] = draw(st.sampled_from([1, 2, 3]))
        if extra == "small":
            policies = st.sampled_from(["running", "renorm", "skip"])
            options["on_small_batch"] = draw(policies)
    mask = draw(st.sampled_from(("none", "none", "none", *MASKS)))
    ways = draw(st.lists(st.sampled_from(WAYS), min_size=1, max_size=3))
    if options.get("on_small_batch") == "renorm":
        # Its output reads statistics that the first forward updated: it refuses.
        ways = ["plain" if w in ("checkpoint", "reentrant") else w for w in ways]
    return LayerCase(
        kind=kind,
        shape=shape,
        dtype=dtype,
        parameters=draw(st.sampled_from(same_or_wide)),
        channel=channel,
        groups=draw(st.sampled_from(sizes or [1])) if kind == "GroupNorm" else 1,
        layout=draw(layouts),
        grad_layout=draw(layouts),
        residual=draw(layouts) if has_residual else "",
        fill=draw(st.sampled_from(FILLS)),
        seed=draw(seeds),
        training=training,
        tracks=kind == "FrozenBatchNorm"
        or (not is_plain and draw(st.integers(0, 4)) < 4),
        trailing=trailing,
        weight=draw(st.integers(0, 4)) < 4,
        bias=kind != "RMSNorm" and draw(st.integers(0, 4)) < 4,
        trained=draw(st.sampled_from(["all", "all", "input", "parameters", "bias"])),
        mask=mask,
        activation=draw(st.sampled_from(ACTIVATIONS)) if is_batch else "none",
        ways=tuple(ways),
        eps=draw(st.sampled_from([1e-5, 1e-3, 1.0])),
        momentum=draw(st.sampled_from([0.1, None, 0.0, 1.0])),
        poison=draw(st.sampled_from([""] * 8 + ["nan", "inf", "hidden nan"])),
        **options,
    )


def is_refused(case: LayerCase) -> bool:
    """True when the layer must raise ValueError: a statistic of one value."""
    n, values = case.shape[0], prod(case.shape)
    if not case.uses_batch:
        return False
    if case.kind in ("BatchNorm", "SyncBatchNorm"):
        is_small = bool(values) and values == case.channels
        return is_small and case.on_small_batch == "raise"
    if case.kind == "PerActivationBatchNorm":
        return case.training and n == 1
    if case.kind in ("InstanceNorm", "FilterResponseNorm"):
        positions = (size for d, size in enumerate(case.shape) if d != case.channel)
        return prod(tuple(positions)[1:]) == 1
    # As torch counts: one value of all groups of all samples together.
    return case.kind == "GroupNorm" and values == case.groups
