"""Whether whole runs, as a user starts them, work on this device: convert, train, be killed, resume, evaluate."""

from __future__ import annotations

from tools.gpu_check.runner import Check

CHECKS: tuple[Check, ...] = ()
