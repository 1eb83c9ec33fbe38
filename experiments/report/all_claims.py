"""The paper's claims, each with what this project measured and a verdict that follows from the numbers."""

from experiments.across_studies import claims as unfolding
from experiments.bilinear import claims as bilinear
from experiments.denoising import claims as denoising
from experiments.multilabel import claims as multilabel
from experiments.portfolio import claims as portfolio
from experiments.report.claims import CONDITIONAL, CONFIRMED, REFUTED, UNTESTED, VERDICTS, Claim, Finding, Results

CLAIMS = (*unfolding.CLAIMS, *bilinear.CLAIMS, *denoising.CLAIMS, *multilabel.CLAIMS, *portfolio.CLAIMS)

__all__ = ["CLAIMS", "CONDITIONAL", "CONFIRMED", "REFUTED", "UNTESTED", "VERDICTS", "Claim", "Finding", "Results"]
