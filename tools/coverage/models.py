"""The five captured models that generated programs are compared with."""

from __future__ import annotations

import logging
import sys
import warnings
from pathlib import Path
from typing import Any

import torch

import daggc
from daggc.ir.graph import Program
from daggc.passes.vjp import vjp

MODELS = {"GPT-2": "gpt2", "BERT": "bert", "ResNet": "resnet", "T5": "t5", "ViT": "vit"}
_ZOO = Path(__file__).resolve().parents[2] / "tests" / "models"


def captured() -> dict[str, Program]:
    """By name: the small models of ``tests/models/zoo.py`` in training mode, captured and differentiated."""
    sys.path.insert(0, str(_ZOO))
    try:
        import zoo  # pyright: ignore[reportMissingImports]  # beside the tests
    finally:
        sys.path.pop(0)
    logging.disable(logging.WARNING)
    found: dict[str, Program] = {}
    for title, name in MODELS.items():
        torch.manual_seed(0)
        case: Any = zoo.ZOO[name]()
        case.model.train()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found[title] = vjp(daggc.trace(case.model, case.args, dict(case.kwargs)))
    return found
