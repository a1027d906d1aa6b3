"""LoRI (Zhang et al., 2025): random frozen A; B trained, in LoRI-S on its largest entries only."""

from __future__ import annotations

from e2lora.adapters.lora import FrozenALora


class Lori(FrozenALora):
    """LoRI-D, and LoRI-S with ``lori.mask_after``."""

    key = "lori"
