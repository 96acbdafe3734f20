"""MM-Vet: open questions whose answers a GPT-4 judge scores from 0 to 1. That judge is a remote service: here is its input.

Source: Yu et al., "MM-Vet", 2023; github.com/yuweihao/MM-Vet (mm-vet_evaluator.ipynb, and the evaluator on Hugging Face).
"""

from __future__ import annotations

import json
from collections.abc import Sequence

from .base import Answered


def files(answered: Sequence[Answered]) -> dict[str, str]:
    """What the judge reads: {"v1_0": answer, ...}."""
    rows = {str(question.id): answer for question, answer in answered}
    return {"mmvet_results.json": json.dumps(rows, indent=2) + "\n"}
