"""Sixty-six claims about batch normalization, and their verdicts.

The sources are five introductory articles, cited as A0 to A4, and the papers they
build on. A claim is worded as its source words it, right or wrong; the studies say
which. A0 explains batch norm step by step, A1 reads the paper with code, A2 is about
initialization, A3 about batch and layer norm, A4 about practice with images.
"""

# ruff: noqa: E501  a table of sentences, one a line

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["CLAIMS", "CORRECTIONS", "Claim", "Correction"]


@dataclass(frozen=True)
class Claim:
    """One statement about normalization.

    Attributes:
        id: `C1` to `C66`.
        sources: The articles that make it.
        text: What it says.
        note: Why no study here can evaluate it; empty when one does.
    """

    id: str
    sources: str
    text: str
    note: str = ""


@dataclass(frozen=True)
class Correction:
    """One thing that a source states wrongly.

    Attributes:
        claims: The claims whose verdicts carry the evidence.
        source: The article.
        stated: What it says.
        found: What is so instead.
        is_measured: It rests on the verdicts: a claim that a run supports is no
            mistake, and its correction is left out. False for a slip of wording.
    """

    claims: tuple[str, ...]
    source: str
    stated: str
    found: str
    is_measured: bool = True


def _table(
    rows: tuple[tuple[str, str] | tuple[str, str, str], ...],
) -> dict[str, Claim]:
    return {
        f"C{i}": Claim(f"C{i}", *row)  # the order of the table is the number
        for i, row in enumerate(rows, 1)
    }


# fmt: off
CLAIMS: dict[str, Claim] = _table(
    (
        ("A0 A1 A3 A4", "The inputs of hidden layers keep shifting while a network trains (internal covariate shift)."),
        ("A0 A1 A4", "Batch norm holds the distribution of each layer's inputs (nearly) fixed."),
        ("A0", "The deeper the network, the harder and slower it trains."),
        ("A0 A4", "Inputs of zero mean and unit variance make training converge faster."),
        ("A0 A1", "Without batch norm pre-activations drift into saturation and the gradients of the low layers vanish."),
        ("A0", "Batch norm turns the inputs of a layer into a standard normal distribution."),
        ("A0", "64 % of a standard normal lies within one standard deviation, 95 % within two."),
        ("A0", "The slope of the sigmoid is at most 1/4; at N(−6, 1) the unit is saturated, at N(0, 1) it is not."),
        ("A0", "Normalizing N(−2, 0.5) shifts it right by 2 and flattens it to N(0, 1)."),
        ("A0 A1", "Normalizing without weight and bias keeps a sigmoid in its linear part and costs capacity."),
        ("A0 A3 A4", "With weight = standard deviation and bias = mean the input is restored exactly."),
        ("A0 A2", "Batch norm belongs between the linear map and the non-linearity."),
        ("A0 A1", "Training uses the mean and the biased variance of the mini-batch."),
        ("A0", "Inference uses the expectation of the batch statistics over all batches."),
        ("A0 A1", "At inference batch norm is a precomputed affine map: same result, fewer operations."),
        ("A0", "A mini-batch gives a better gradient direction than one example, and runs in parallel."),
        ("A0", "Batch norm keeps gradients large, so steps are large, so training is fast."),
        ("A0 A1 A4", "Training converges much faster with batch norm."),
        ("A0 A1", "Batch norm raises accuracy and regularizes as dropout does; dropout becomes unnecessary."),
        ("A0 A1 A4", "With batch norm initialization matters less and large learning rates work."),
        ("A1", "Covariate shift forces small learning rates and careful initialization, most of all for saturating units."),
        ("A1 A3", "Small changes of the parameters grow as they pass through a deep network."),
        ("A1", "With depth the inputs get larger and the sigmoid saturates."),
        ("A1", "ReLU, better initialization and small learning rates are the usual cures for saturation."),
        ("A1", "Whitening decorrelates the inputs, loses what lower layers learned, and is costly."),
        ("A1", "Normalizing alone lowers the covariate shift but loses capacity."),
        ("A1", "Statistics and affine parameters have the shape [1, n]; batch norm is in essence a linear map."),
        ("A1", "The population statistics may be the average over all training batches, or a moving average with decay 0.9."),
        ("A1", "The moving average is only recorded in training and used at inference; it is an unbiased estimate."),
        ("A1", "Weight and bias are updated by backpropagation like other parameters."),
        ("A1", "Batch-normalized networks were the best on ImageNet (4.9 % top-5 error).", "Cited: an ensemble on ImageNet is beyond this scale."),
        ("A1", "Batch norm keeps changes from being amplified, so a high learning rate neither explodes nor vanishes."),
        ("A1", "Batch norm makes networks of saturating units trainable."),
        ("A1", "The noise from the other samples of the batch regularizes."),
        ("A1", "Batch norm makes training depend less on the initial weights."),
        ("A1", "The activation function does not change the distribution of its input."),
        ("A1", "The facts about the normal density: it integrates to 1 and is drawn by the given code."),
        ("A2", "With constant weights all units of a layer stay equal, forward and backward; with zeros the output is 0."),
        ("A2", "Weights of 0.01 · N(0, 1) in a deep tanh net: activations go to 0, gradients vanish, no training."),
        ("A2", "Weights of 0.05 · N(0, 1): activations pile up at ±1, local gradients are 0, gradients vanish."),
        ("A2", "Xavier initialization keeps the variance the same over the layers, forward and backward."),
        ("A2", "Var[y] = n · Var[w] · Var[x] per layer; the product over the layers decides."),
        ("A2", "With ReLU, Xavier still lets activations vanish; Kaiming (½ n Var[w] = 1) keeps them flat."),
        ("A2", "A good activation distribution has zero mean and moderate variance."),
        ("A2", "Batch norm takes statistics over N in linear layers, over N, H, W in convolutions."),
        ("A2", "Layer norm takes them over the features, instance norm over H, W of each sample and channel."),
        ("A2", "It differs from data preprocessing by eps and by the learned affine map."),
        ("A3", "Normalization removes the need for a learning rate of its own in each layer."),
        ("A3", "The result has mean b and variance g²; the affine map keeps capacity and decouples from lower layers."),
        ("A3", "Batch norm needs batches that resemble the training set: large ones, fully shuffled."),
        ("A3", "Batch norm prevents vanishing gradients; it usually stands before the activation."),
        ("A3", "Batch norm suits recurrent and variable-length data badly; bucketing helps."),
        ("A3", "Layer norm does not depend on the batch and is what transformers use."),
        ("A3", "In a transformer layer norm normalizes all words of a sentence together."),
        ("A3", "Layer norm applies one transform to the whole layer; features of mixed type lose expressiveness."),
        ("A4", "Speed is the main effect; without batch norm a large rate diverges; the two reinforce each other."),
        ("A4", "Batch norm generalizes better and over-fits less."),
        ("A4", "Statistics and affine parameters of batch norm have shape C × H × W, one per point of the map."),
        ("A4", "The learned affine map can restore the original features."),
        ("A4", "Removing the mean and deviation of the input is a must, and can be merged into the first convolution."),
        ("A4", "The affine map controls how much is normalized."),
        ("A4", "Batch norm postpones over-fitting and cannot prevent it (ascribed to Zhang et al.)."),
        ("A4", "The noise of the batch statistics acts like data augmentation: less over-fitting."),
        ("A4", "A convolution and its batch norm fuse exactly at inference."),
        ("A4", "With one image per device batch norm cannot work; statistics must be synchronized."),
        ("A4", "The moving mean and variance enter training as noise."),
    )
)

CORRECTIONS: tuple[Correction, ...] = (
    Correction(("C5",), "A0", "Without batch norm the inputs of the sigmoids drift into saturation.", "The gradients of the low layers do vanish. But few inputs saturate: at the end fewer than with batch norm, except at the largest of three rates."),
    Correction(("C6",), "A0", "Batch norm makes the inputs standard normal.", "It makes mean and variance those of a standard normal. The shape stays as it was: skewness and kurtosis do not move."),
    Correction(("C7",), "A0", "64 % of a normal lies within one standard deviation.", "68.27 %; 95.45 % within two."),
    Correction(("C11",), "A0", "Each instance is moved in its own way.", "All instances of a unit go through the same affine map in a batch; the units differ.", is_measured=False),
    Correction(("C12",), "A0", "Batch norm belongs between the linear map and the activation.", "It works there, and behind the activation no worse: sigmoid nets were 3 points better with it behind, tanh nets 1 point, ReLU nets the same."),
    Correction(("C27",), "A1", "Batch norm is in essence a linear map.", "It is affine at inference. In training the statistics depend on the input and superposition fails."),
    Correction(("C28",), "A1", "Average the statistics of all batches seen in training.", "Most of those batches were seen by other weights. Average with the weights frozen, or use a moving average."),
    Correction(("C29",), "A1", "The moving average is an unbiased estimate.", "It starts from 0 and 1, which keep the share (1 − m)ⁿ after n batches, and lags behind moving weights."),
    Correction(("C36",), "A1", "The activation does not change the distribution of its input.", "It does: a ReLU of N(0, 1) has mean 0.40, a sigmoid standard deviation 0.21."),
    Correction(("C37",), "A1", "The plotting code of the normal density.", "It defines one name and calls another, and labels a standard deviation of 1.5 as 2.5.", is_measured=False),
    Correction(("C39", "C40"), "A2", "Small weights (0.01) and not so small ones (0.05) both make gradients vanish and training fail.", "Both train at six layers. At 0.05 units do saturate, but n·Var[w] = 10 makes the weight gradients grow backwards."),
    Correction(("C41",), "A2", "Xavier keeps the variance.", "Exactly so for linear layers only; through tanh it decays slowly."),
    Correction(("C48",), "A3", "Normalization makes learning rates of each layer's own needless.", "With batch norm they lowered the loss, by a third in its logarithm. The plain net hardly trains at any rate, so that it had nothing to gain."),
    Correction(("C49",), "A3", "σ is called the variance.", "σ is the standard deviation; the result has variance g²·var/(var + eps).", is_measured=False),
    Correction(("C54",), "A3", "Layer norm normalizes all words of a sentence together.", "`LayerNorm(d)` in a transformer treats every word on its own."),
    Correction(("C55",), "A3", "Layer norm has one transform for the layer.", "Its statistics are shared by the layer; its weight and bias are one per feature.", is_measured=False),
    Correction(("C58",), "A4", "Batch norm of a convolution keeps C × H × W statistics.", "It keeps C. One per point is another layer, with H·W times the parameters."),
    Correction(("C62",), "A4", "Batch norm postpones over-fitting.", "The paper named for it says that batch norm steadies learning. Here the test accuracy peaks no later with it."),
    Correction(("C66",), "A4", "The moving statistics enter training as noise.", "Training never reads them; the noise comes from the statistics of the batch."),
)
# fmt: on
