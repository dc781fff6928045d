"""Verdict of the literature on each claim, beside the one here."""

# ruff: noqa: E501  tables of sentences, one a line

from __future__ import annotations

__all__ = ["LITERATURE", "REFERENCES", "of"]

# fmt: off
REFERENCES: dict[str, str] = {
    "Glorot 2010": "X. Glorot, Y. Bengio, “Understanding the difficulty of training deep feedforward neural networks”, AISTATS 2010",
    "LeCun 1998": "Y. LeCun, L. Bottou, G. Orr, K.-R. Müller, “Efficient BackProp”, 1998",
    "He 2015": "K. He, X. Zhang, S. Ren, J. Sun, “Delving deep into rectifiers”, ICCV 2015, arXiv 1502.01852",
    "Ioffe 2015": "S. Ioffe, C. Szegedy, “Batch normalization”, ICML 2015, arXiv 1502.03167",
    "Ba 2016": "J. Ba, J. Kiros, G. Hinton, “Layer normalization”, arXiv 1607.06450",
    "Cooijmans 2016": "T. Cooijmans et al., “Recurrent batch normalization”, ICLR 2017, arXiv 1603.09025",
    "Ulyanov 2016": "D. Ulyanov, A. Vedaldi, V. Lempitsky, “Instance normalization”, arXiv 1607.08022",
    "Poole 2016": "B. Poole et al., “Exponential expressivity in deep neural networks through transient chaos”, NeurIPS 2016, arXiv 1606.05340",
    "Schoenholz 2017": "S. Schoenholz et al., “Deep information propagation”, ICLR 2017, arXiv 1611.01232",
    "Zhang 2017": "C. Zhang et al., “Understanding deep learning requires rethinking generalization”, ICLR 2017, arXiv 1611.03530",
    "Ioffe 2017": "S. Ioffe, “Batch renormalization”, NeurIPS 2017, arXiv 1702.03275",
    "Hoffer 2017": "E. Hoffer, I. Hubara, D. Soudry, “Train longer, generalize better”, NeurIPS 2017, arXiv 1705.08741",
    "van Laarhoven 2017": "T. van Laarhoven, “L2 regularization versus batch and weight normalization”, arXiv 1706.05350",
    "Santurkar 2018": "S. Santurkar, D. Tsipras, A. Ilyas, A. Madry, “How does batch normalization help optimization?”, NeurIPS 2018, arXiv 1805.11604",
    "Bjorck 2018": "J. Bjorck, C. Gomes, B. Selman, K. Weinberger, “Understanding batch normalization”, NeurIPS 2018, arXiv 1806.02375",
    "Wu 2018": "Y. Wu, K. He, “Group normalization”, ECCV 2018, arXiv 1803.08494",
    "Huang 2018": "L. Huang, D. Yang, B. Lang, J. Deng, “Decorrelated batch normalization”, CVPR 2018, arXiv 1804.08450",
    "Li 2018": "X. Li, S. Chen, X. Hu, J. Yang, “Understanding the disharmony between dropout and batch normalization by variance shift”, CVPR 2019, arXiv 1801.05134",
    "Luo 2019": "P. Luo, X. Wang, W. Shao, Z. Peng, “Towards understanding regularization in batch normalization”, ICLR 2019, arXiv 1809.00846",
    "Yang 2019": "G. Yang et al., “A mean field theory of batch normalization”, ICLR 2019, arXiv 1902.08129",
    "Shen 2020": "S. Shen et al., “PowerNorm: rethinking batch normalization in transformers”, ICML 2020, arXiv 2003.07845",
    "De 2020": "S. De, S. Smith, “Batch normalization biases residual blocks towards the identity function in deep networks”, NeurIPS 2020, arXiv 2002.10444",
    "Wu 2021": "Y. Wu, J. Johnson, “Rethinking “batch” in BatchNorm”, arXiv 2105.07576",
}

_DEFINED = "A definition or arithmetic: nothing to dispute."

# By claim: what the literature found, and why the verdict here may differ.
LITERATURE: dict[str, tuple[str, str]] = {
    "C1": ("Ioffe 2015 shows it for a sigmoid net; Santurkar 2018 questions that it matters.", ""),
    "C2": ("Ioffe 2015, figure 1: more stable with batch norm. Santurkar 2018: by gradients it is not.", "Distributions of inputs here, gradients there: see C26."),
    "C3": ("Glorot 2010; He 2015: depth needs the right start. Schoenholz 2017: how deep a start reaches.", ""),
    "C4": ("LeCun 1998 recommends it.", ""),
    "C5": ("Ioffe 2015 argues so; Glorot 2010 sees the last sigmoid layer saturate early.", "Small weights: this net starts far from saturation and moves a little towards it."),
    "C10": ("Ioffe 2015 gives it as the reason for weight and bias.", ""),
    "C12": ("Ioffe 2015: before. Without agreement since; residual networks use both.", "Small multilayer nets only, and no convolutions."),
    "C14": ("Ioffe 2015, algorithm 2. Wu 2021: with the weights frozen; a few thousand samples suffice.", "The run is short: most batches that are remembered were seen by weights far from the last."),
    "C15": ("Ioffe 2015, section 3.1.", ""),
    "C16": ("Ioffe 2015, section 2; the law of large numbers.", ""),
    "C17": ("Santurkar 2018, Bjorck 2018: a smoother loss and larger usable rates, rather than larger gradients.", "Both: with steps as large the plain net starts slower and catches up."),
    "C18": ("Ioffe 2015: 2.3 times fewer steps at the same rate, 14 at five times the rate.", "The size depends on the target; see the curve in S01."),
    "C19": ("Ioffe 2015: dropout could go. Li 2018: dropout before batch norm can hurt. Zhang 2017: 3 to 4 points.", ""),
    "C20": ("Ioffe 2015; Bjorck 2018: a rate of 0.1 against 0.0001 for 110 layers.", ""),
    "C21": ("Ioffe 2015 argues so. Santurkar 2018: no, a batch norm with shift trains as fast.", "The noisy net is slower than batch norm here; it is faster than the plain one (C83)."),
    "C22": ("Poole 2016, Schoenholz 2017: so in the chaotic phase, not in the ordered one.", ""),
    "C23": ("Glorot 2010, Poole 2016: by n·Var[w].", ""),
    "C24": ("Ioffe 2015 names the three; Glorot 2010, He 2015 for the start.", "Weights this large make a ReLU net explode in some seeds; a small rate leaves them as they are."),
    "C25": ("Ioffe 2015: costly, and not differentiable everywhere. Huang 2018: can be had.", "A whitening of full rank is invertible: only scale and correlation go."),
    "C26": ("Ioffe 2015 argues both. Santurkar 2018: by gradients the shift is no lower in VGG and linear nets.", "Smaller and shallower nets, and steps of equal length: there their rates differ."),
    "C28": ("Ioffe 2015, algorithm 2 for the first. Wu 2021: a moving average is worst early and for large batches.", ""),
    "C31": ("Ioffe 2015, table 4.", "An ensemble on ImageNet is beyond this scale."),
    "C32": ("Ioffe 2015 argues so. Yang 2019: at the start batch norm makes gradients explode with depth.", "As Yang 2019: changes grow through batch norm; large rates work all the same."),
    "C33": ("Ioffe 2015: 69.8 % with sigmoids on ImageNet.", ""),
    "C34": ("Ioffe 2015 observes it. Luo 2019 derives it; Wu 2021: batches of 32 to 128 are best.", ""),
    "C35": ("Ioffe 2015; Bjorck 2018.", ""),
    "C39": ("Glorot 2010. The demonstration of Stanford's CS231n.", "Six layers train at a large enough rate; twenty do not."),
    "C40": ("The same demonstration; Poole 2016: gradients grow where n·Var[w] is above 1.", "Saturation does not outweigh n·Var[w] = 10."),
    "C41": ("Glorot 2010 derives it for linear units.", ""),
    "C43": ("He 2015.", ""),
    "C44": ("LeCun 1998: zero mean. ReLU breaks it and is the standard.", ""),
    "C48": ("Ioffe 2015 and De 2020 on rates; no direct test known to us.", "Not judged: own rates give the plain net nothing here."),
    "C50": ("Ioffe 2017: batches that are not independent cost 11 points. Wu 2021 on leaks by order.", "Order alone harms group norm as well."),
    "C51": ("Ioffe 2015. Yang 2019: in very deep nets they explode instead.", ""),
    "C52": ("Cooijmans 2016: statistics of each step are needed. Ba 2016 for layer norm.", "A small net on short sequences, with few steps."),
    "C53": ("Ba 2016; Shen 2020: batch norm is behind in translation.", "Letters of fixed length, no padding, a short run: what harms batch norm there is absent."),
    "C55": ("Ba 2016 assumes features of one kind.", ""),
    "C56": ("Ioffe 2015; Bjorck 2018: at the same small rate little is left.", ""),
    "C57": ("Zhang 2017: 3 to 4 points; Luo 2019: by noise.", "Clean labels: yes, at few images. Noisy labels are memorized faster."),
    "C61": ("Ioffe 2015, section 3: weight and bias can undo the normalizing.", ""),
    "C62": ("Zhang 2017 does not say so: batch norm steadies learning.", "Rates are chosen for clean validation labels."),
    "C63": ("Luo 2019, Wu 2021: noise regularizes, too much of it harms.", "Four images are too few."),
    "C65": ("Wu 2018: at two images the error rises from 23.6 to 34.7 %.", "Ten classes of 8 × 8 pixels and a short run: 8 × 8 values of one image are enough to train."),
    "C67": ("Schoenholz 2017: in the chaotic phase.", "A ReLU net and tanh of gain 1 are at the edge of it."),
    "C68": ("Santurkar 2018 measures shift with weight and bias.", "The learned maps move little within this run."),
    "C72": ("Ioffe 2015 removed it.", ""),
    "C73": ("Ioffe 2015, in a sentence.", "In some seeds the largest rate that works leaves dead units behind, in others nothing."),
    "C76": ("Glorot 2010, He 2015.", ""),
    "C79": ("Ioffe 2015, section 1, argues so.", ""),
    "C80": ("Wu 2021: batches of 32 to 128 are best. Detection needs synchronizing.", ""),
    "C81": ("Ioffe 2015, section 2: the example. Huang 2018: with the full gradient it works.", ""),
    "C82": ("Ioffe 2015, section 3.", ""),
    "C83": ("Santurkar 2018, figure 2: as fast as batch norm.", "Here slower than batch norm, faster than plain."),
    "C84": ("Luo 2019, for one layer and small nets.", ""),
    "C85": ("Bjorck 2018: channel means grow with depth and make large rates diverge.", "Where a rate fails the net explodes in most seeds and falls silent in others."),
    "C86": ("Wu 2018: 34.7 against 24.1 % error at two images.", "As C65: at one image group norm leads by less, at two not at all."),
    "C87": ("van Laarhoven 2017; Hoffer 2017.", ""),
}
# fmt: on


def of(claim: str) -> tuple[str, str]:
    """Return what the literature says on `claim`, and why the verdict may differ."""
    return LITERATURE.get(claim, (_DEFINED, ""))
