"""The paper's claims, each with what this project measured and a verdict that follows from the numbers."""

from experiments.claims import bilinear, denoising, multilabel, portfolio, unfolding
from experiments.claims.base import CONDITIONAL, CONFIRMED, REFUTED, UNTESTED, VERDICTS, Claim, Finding, Results

CLAIMS = (*unfolding.CLAIMS, *bilinear.CLAIMS, *denoising.CLAIMS, *multilabel.CLAIMS, *portfolio.CLAIMS)

__all__ = ["CLAIMS", "CONDITIONAL", "CONFIRMED", "REFUTED", "UNTESTED", "VERDICTS", "Claim", "Finding", "Results"]
