"""Weightings: (Gram matrix, losses) → weights on the raw gradients, the direction being d = Σ_k w_k g_k.

Knows no optimizer and no torch.nn. A weighting is any callable `(gram, losses) -> weights`; the classes here add what
lets an optimizer save work (`needs_gram`, `constant`), check its input (`needs_positive_losses`) and resume
(`state_dict`). To add one: a file with its class, and a line in `registry`.
"""

from mogeo.weightings.base import Around as Around
from mogeo.weightings.base import Solution as Solution
from mogeo.weightings.base import Weighting as Weighting
from mogeo.weightings.base import as_weighting as as_weighting
from mogeo.weightings.base import as_weights as as_weights
from mogeo.weightings.base import bad_weights as bad_weights
from mogeo.weightings.cagrad import RACO as RACO
from mogeo.weightings.cagrad import CAGrad as CAGrad
from mogeo.weightings.group_dro import GroupDRO as GroupDRO
from mogeo.weightings.linear import LinearScalarization as LinearScalarization
from mogeo.weightings.mgda import MGDA as MGDA
from mogeo.weightings.mgda import gapo as gapo
from mogeo.weightings.mgda import require_positive_losses as require_positive_losses
from mogeo.weightings.registry import NAMES as NAMES
from mogeo.weightings.registry import WeightingLike as WeightingLike
from mogeo.weightings.registry import resolve as resolve
from mogeo.weightings.upgrad import UPGrad as UPGrad
