"""Claims about batch normalization, as their sources word them, right or wrong.

The sources are five introductory articles, cited as A0 to A4, and five papers that
came after the first of them, P1 to P5 (`literature`). The studies say what is so.
"""

# ruff: noqa: E501  a table of sentences, one a line

from __future__ import annotations

from dataclasses import dataclass

__all__ = [
    "ALGEBRA",
    "ARTICLES",
    "CITED",
    "CLAIMS",
    "CORRECTIONS",
    "RUN",
    "Claim",
    "Correction",
]

# How a claim is decided: by training networks, by algebra or a definition whose
# numbers are only checked, or by nothing that runs here.
RUN, ALGEBRA, CITED = "experiment", "identity", "cited"

# What each source is about, and its page in Learn.
ARTICLES = {
    "A0": "batch norm, step by step",
    "A1": "the paper, read with code",
    "A2": "initial weights",
    "A3": "batch norm and layer norm",
    "A4": "practice with images",
    "P1": "Santurkar et al. 2018",
    "P2": "Luo et al. 2019",
    "P3": "Bjorck et al. 2018",
    "P4": "Wu and He 2018",
    "P5": "van Laarhoven 2017",
}


@dataclass(frozen=True)
class Claim:
    """One statement about normalization.

    Attributes:
        id: `C1`, `C2`, …
        kind: `RUN`, `ALGEBRA` or `CITED`.
        sources: Keys of `ARTICLES`: where it is made.
        text: What it says.
    """

    id: str
    kind: str
    sources: str
    text: str


@dataclass(frozen=True)
class Correction:
    """One thing that a source states wrongly.

    Attributes:
        claims: The claims whose verdicts carry the evidence.
        source: The article.
        stated: What it says.
        found: What is so instead.
        is_measured: It rests on a refuted part of a verdict, and is left out where
            there is none. False for a slip of wording.
    """

    claims: tuple[str, ...]
    source: str
    stated: str
    found: str
    is_measured: bool = True


def _table(rows: tuple[tuple[str, str, str], ...]) -> dict[str, Claim]:
    return {
        f"C{i}": Claim(f"C{i}", *row)  # the order of the table is the number
        for i, row in enumerate(rows, 1)
    }


# fmt: off
CLAIMS: dict[str, Claim] = _table(
    (
        (RUN, "A0 A1 A3 A4", "The inputs of hidden layers keep shifting while a network trains (internal covariate shift)."),
        (RUN, "A0 A1 A4", "Batch norm holds the distribution of each layer's inputs (nearly) fixed."),
        (RUN, "A0", "The deeper the network, the harder and slower it trains."),
        (RUN, "A0 A4", "Inputs of zero mean and unit variance make training converge faster."),
        (RUN, "A0 A1", "Without batch norm pre-activations drift into saturation and the gradients of the low layers vanish."),
        (ALGEBRA, "A0", "Batch norm turns the inputs of a layer into a standard normal distribution."),
        (ALGEBRA, "A0", "64 % of a standard normal lies within one standard deviation, 95 % within two."),
        (ALGEBRA, "A0", "The slope of the sigmoid is at most 1/4; at N(−6, 1) the unit is saturated, at N(0, 1) it is not."),
        (ALGEBRA, "A0", "Normalizing N(−2, 0.5), of variance 0.5, shifts it right by 2 and flattens it to N(0, 1)."),
        (RUN, "A0 A1", "Normalizing without weight and bias keeps a sigmoid in its linear part and costs capacity."),
        (ALGEBRA, "A0 A3 A4", "With weight = standard deviation and bias = mean the input is restored exactly."),
        (RUN, "A0 A2", "Batch norm belongs between the linear map and the non-linearity."),
        (ALGEBRA, "A0 A1", "Training uses the mean and the biased variance of the mini-batch."),
        (RUN, "A0", "Inference uses the expectation of the batch statistics over all batches."),
        (RUN, "A0 A1", "At inference batch norm is a precomputed affine map: same result, fewer operations."),
        (RUN, "A0", "A mini-batch gives a better gradient direction than one example, and runs in parallel."),
        (RUN, "A0", "Batch norm keeps gradients large, so steps are large, so training is fast."),
        (RUN, "A0 A1 A4", "Training converges much faster with batch norm."),
        (RUN, "A0 A1", "Batch norm raises accuracy and regularizes as dropout does; dropout becomes unnecessary."),
        (RUN, "A0 A1 A4", "With batch norm initialization matters less and large learning rates work."),
        (RUN, "A1", "Covariate shift forces small learning rates and careful initialization, most of all for saturating units."),
        (RUN, "A1 A3", "Small changes of the parameters grow as they pass through a deep network."),
        (RUN, "A1", "With depth the inputs get larger and the sigmoid saturates."),
        (RUN, "A1", "ReLU, better initialization and small learning rates are the usual cures for saturation."),
        (RUN, "A1", "Whitening decorrelates the inputs, loses what lower layers learned, and is costly."),
        (RUN, "A1", "Normalizing alone lowers the covariate shift but loses capacity."),
        (ALGEBRA, "A1", "Statistics and affine parameters have the shape [1, n]; batch norm is in essence a linear map."),
        (RUN, "A1", "The population statistics may be the average over all training batches, or a moving average with decay 0.9."),
        (ALGEBRA, "A1", "The moving average is only recorded in training and used at inference; it is an unbiased estimate."),
        (ALGEBRA, "A1", "Weight and bias are updated by backpropagation like other parameters."),
        (CITED, "A1", "Batch-normalized networks were the best on ImageNet (4.9 % top-5 error)."),
        (RUN, "A1", "Batch norm keeps changes from being amplified, so a high learning rate neither explodes nor vanishes."),
        (RUN, "A1", "Batch norm makes networks of saturating units trainable."),
        (RUN, "A1", "The noise from the other samples of the batch regularizes."),
        (RUN, "A1", "Batch norm makes training depend less on the initial weights."),
        (ALGEBRA, "A1", "The activation function does not change the distribution of its input."),
        (ALGEBRA, "A1", "The facts about the normal density: it integrates to 1 and is drawn by the given code."),
        (ALGEBRA, "A2", "With constant weights all units of a layer stay equal, forward and backward; with zeros the output is 0."),
        (RUN, "A2", "Weights of 0.01 · N(0, 1) in a deep tanh net: activations go to 0, gradients vanish, no training."),
        (RUN, "A2", "Weights of 0.05 · N(0, 1): activations pile up at ±1, local gradients are 0, gradients vanish."),
        (RUN, "A2", "Xavier initialization keeps the variance the same over the layers, forward and backward."),
        (ALGEBRA, "A2", "Var[y] = n · Var[w] · Var[x] per layer; the product over the layers decides."),
        (RUN, "A2", "With ReLU, Xavier still lets activations vanish; Kaiming (½ n Var[w] = 1) keeps them flat."),
        (RUN, "A2", "A good activation distribution has zero mean and moderate variance."),
        (ALGEBRA, "A2", "Batch norm takes statistics over N in linear layers, over N, H, W in convolutions."),
        (ALGEBRA, "A2", "Layer norm takes them over the features, instance norm over H, W of each sample and channel."),
        (ALGEBRA, "A2", "It differs from data preprocessing by eps and by the learned affine map."),
        (RUN, "A3", "Normalization removes the need for a learning rate of its own in each layer."),
        (ALGEBRA, "A3", "The result has mean b and variance g²; the affine map keeps capacity and decouples from lower layers."),
        (RUN, "A3", "Batch norm needs batches that resemble the training set: large ones, fully shuffled."),
        (RUN, "A3", "Batch norm prevents vanishing gradients; it usually stands before the activation."),
        (RUN, "A3", "Batch norm suits recurrent and variable-length data badly; bucketing helps."),
        (RUN, "A3", "Layer norm does not depend on the batch and is what transformers use."),
        (ALGEBRA, "A3", "In a transformer layer norm normalizes all words of a sentence together."),
        (RUN, "A3", "Layer norm applies one transform to the whole layer; features of mixed type lose expressiveness."),
        (RUN, "A4", "Speed is the main effect; without batch norm a large rate diverges; the two reinforce each other."),
        (RUN, "A4", "Batch norm generalizes better and over-fits less."),
        (ALGEBRA, "A4", "Statistics and affine parameters of batch norm have shape C × H × W, one per point of the map."),
        (ALGEBRA, "A4", "The learned affine map can restore the original features."),
        (ALGEBRA, "A4", "Removing the mean and deviation of the input is a must, and can be merged into the first convolution."),
        (RUN, "A4", "The affine map controls how much is normalized."),
        (RUN, "A4", "Batch norm postpones over-fitting and cannot prevent it (ascribed to Zhang et al.)."),
        (RUN, "A4", "The noise of the batch statistics acts like data augmentation: less over-fitting."),
        (ALGEBRA, "A4", "A convolution and its batch norm fuse exactly at inference."),
        (RUN, "A4", "With one image per device batch norm cannot work; statistics must be synchronized."),
        (ALGEBRA, "A4", "The moving mean and variance enter training as noise."),
        (RUN, "A0", "Small changes of the input cause large changes of the loss of a deep network."),
        (RUN, "A0", "Weight and bias, which restore what normalizing took away, bring the shift back."),
        (ALGEBRA, "A0", "Between −2 and 2 the sigmoid is nearly linear."),
        (ALGEBRA, "A0", "The deviation from the mean is divided by the variance."),
        (ALGEBRA, "A1", "m/(m − 1) · E[σ²] over the batches is the unbiased variance of the population."),
        (RUN, "A1", "Batch norm makes local response normalization needless."),
        (RUN, "A1", "Large learning rates lead to bad local minima."),
        (ALGEBRA, "A1", "Of all laws of one variance the normal law has the largest entropy."),
        (ALGEBRA, "A1", "Z, the input of the activation, has the shape [1, n]."),
        (RUN, "A2", "With n · Var[w] above 1 the activations explode."),
        (ALGEBRA, "A2", "eps is added to the standard deviation."),
        (ALGEBRA, "A3", "Of a batch of sentences, batch norm treats the words at one position as one dimension."),
        (RUN, "A3", "The shift grows with depth."),
        (RUN, "A4", "For classification the batch of one device is large enough; statistics need not be synchronized."),
        (RUN, "A4", "Plain whitening does not suit deep layers."),
        (RUN, "A4", "Where whitening is useless, weight and bias learn to undo it."),
        (RUN, "P1", "Batch norm with noise that moves its outputs still trains faster than a plain net."),
        (RUN, "P2", "Batch norm regularizes as statistics of the whole data with decay of γ do."),
        (RUN, "P3", "Without batch norm large rates make activations explode with depth, and that limits the rate."),
        (RUN, "P4", "At batches of one and two group norm is ahead of batch norm; at 32 it is not."),
        (RUN, "P5", "Weight decay before batch norm acts through the norm of the weights: it sets the effective rate."),
    )
)

CORRECTIONS: tuple[Correction, ...] = (
    Correction(("C6",), "A0", "Batch norm makes the inputs standard normal.", "It makes mean and variance those of a standard normal. The shape stays as it was: skewness and kurtosis do not move."),
    Correction(("C7",), "A0", "64 % of a normal lies within one standard deviation.", "68.27 %; 95.45 % within two."),
    Correction(("C11",), "A0", "Each instance is moved in its own way.", "All instances of a unit go through the same affine map in a batch; the units differ.", is_measured=False),
    Correction(("C69",), "A0", "Between −2 and 2 the sigmoid is nearly linear.", "Its values are, to 5 % of their range. Its slope, which the gradient meets, falls to 0.42 of that in the middle."),
    Correction(("C70",), "A0", "Divide by the variance.", "By its root, the standard deviation."),
    Correction(("C27",), "A1", "Batch norm is in essence a linear map.", "It is affine at inference. In training the statistics depend on the input and superposition fails."),
    Correction(("C29",), "A1", "The moving average is an unbiased estimate.", "It starts from 0 and 1, which keep the share (1 − m)ⁿ after n batches: a third after ten of decay 0.9. After a hundred the bias is gone."),
    Correction(("C36",), "A1", "The activation does not change the distribution of its input.", "It does: a ReLU of N(0, 1) has mean 0.40, a sigmoid standard deviation 0.21."),
    Correction(("C37",), "A1", "The plotting code of the normal density.", "It defines one name and calls another, and labels a standard deviation of 1.5 as 2.5.", is_measured=False),
    Correction(("C75",), "A1", "Z has the shape [1, n].", "[m, n] for a batch of m; the statistics have [1, n]."),
    Correction(("C40",), "A2", "At weights of 0.05 units saturate, so that gradients vanish.", "Units saturate, and n·Var[w] = 10 makes the gradients of inputs and of weights grow on their way back all the same."),
    Correction(("C41",), "A2", "Xavier keeps the variance.", "Exactly so for linear layers only; through tanh it decays slowly."),
    Correction(("C76",), "A2", "With n · Var[w] above 1 activations explode.", "Where the activation is unbounded. A tanh keeps them below 1: they saturate."),
    Correction(("C77",), "A2", "eps is added to the standard deviation.", "To the variance, inside the root."),
    Correction(("C49",), "A3", "σ is called the variance.", "σ is the standard deviation; the result has variance g²·var/(var + eps).", is_measured=False),
    Correction(("C54",), "A3", "Layer norm normalizes all words of a sentence together.", "`LayerNorm(d)` in a transformer treats every word on its own."),
    Correction(("C55",), "A3", "Layer norm has one transform for the layer.", "Its statistics are shared by the layer; its weight and bias are one per feature.", is_measured=False),
    Correction(("C78",), "A3", "Batch norm treats the words at one position as one dimension.", "`BatchNorm1d` on (N, C, T) takes one statistic per feature over all sentences and positions."),
    Correction(("C58",), "A4", "Batch norm of a convolution keeps C × H × W statistics.", "It keeps C. One per point is another layer, with H·W times the parameters."),
    Correction(("C60",), "A4", "The standardization of the input can be merged into the first convolution.", "Exactly where the convolution is not padded, or padded with the mean; at a border of zeros not."),
    Correction(("C66",), "A4", "The moving statistics enter training as noise.", "Training never reads them; the noise comes from the statistics of the batch."),
)
# fmt: on
