"""Whether attention, decoder layers, training and the encoder's side stream give the right numbers on this device."""

from __future__ import annotations

from tools.gpu_check.runner import Check

CHECKS: tuple[Check, ...] = ()
