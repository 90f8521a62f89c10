"""Which losses `align` knows by name. Must not import torch: `mogeo align --help` lists them.

To add a loss, write a subclass of `mogeo.dpo.losses.PreferenceLoss` in a file of its own, and a line in `LOSSES`.
"""

from __future__ import annotations

import importlib
import re
from typing import TYPE_CHECKING, Any

from mogeo.errors import InputError

if TYPE_CHECKING:
    from mogeo.dpo.losses import PreferenceLoss

LOSSES = {
    "sigmoid": ("mogeo.dpo.losses:DPO", "DPO; sigmoid(0.1) takes a tenth of the labels to be wrong"),
    "ipo": ("mogeo.dpo.losses:DPO", "squared distance to a margin; takes no numbers"),
    "hinge": ("mogeo.dpo.losses:DPO", "SLiC: zero once the margin is large enough; takes no numbers"),
    "modpo": ("mogeo.dpo.modpo:MODPO", "MODPO, with equal weights; modpo(2,1): one number per objective"),
}
"""Name -> where its class is, as "module:class", and a line of help."""


def resolve_loss(loss: Any) -> PreferenceLoss:
    """A loss from its name, such as "ipo" or "sigmoid(0.1)". A `PreferenceLoss` is returned as it is.

    Raises:
        InputError: the name is unknown, its numbers do not suit the loss, or `loss` is neither a name nor a loss.
    """
    from mogeo.dpo.losses import PreferenceLoss

    if isinstance(loss, PreferenceLoss):
        return loss
    if not isinstance(loss, str):
        raise InputError(f"loss={loss!r}: pass a name ({', '.join(LOSSES)}), or a mogeo.dpo.losses.PreferenceLoss")
    match = re.fullmatch(r"\s*([a-z]+)\s*(?:\((.*)\))?\s*", loss)
    if match is None or match[1] not in LOSSES:
        raise InputError(f"unknown loss '{loss}': choose one of {', '.join(LOSSES)}")
    name, text = match.groups()
    place, usage = LOSSES[name]
    module, _, attribute = place.partition(":")
    kind: type[PreferenceLoss] = getattr(importlib.import_module(module), attribute)
    try:
        return kind.named(name, [float(part) for part in (text or "").split(",") if part.strip()])
    except (TypeError, ValueError) as error:
        raise InputError(f"loss '{loss}': {error} ({name}: {usage})") from None
