"""Rows of the coverage tables: a sample of torch's operator database, torch.nn and transformers; all of it is slow."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).resolve().parents[1] / "tools" / "coverage"))

import model_zoo
import modules
import opdb
from families import FAMILIES

# Entries that fall short, and why; tools/opdb tells the same of all.
REFUSED = {
    **dict.fromkeys(("allclose", "equal", "item"), "a number of the data, and no tensor, is the result"),
    **dict.fromkeys(("unique", "unique_consecutive"), "the shape hangs on the data"),
    **dict.fromkeys(("sparse.sampled_addmm", "sparse.mm.reduce", "to_sparse"), "sparse tensors"),
    **dict.fromkeys(("chalf", "hash_tensor"), "a dtype that the IR does not have"),
    "as_strided.partial_views": "memory outside of the tensor",
}
REFUSED_FAMILIES = {
    "NystromformerForMaskedLM": "torch.export fails on its broadcast",
    "SwitchTransformersForConditionalGeneration": "forward converts a module's parameters",
    "RwkvForCausalLM": "writes under no_grad to what has a gradient, in eval mode",
    "LevitForImageClassification": "keeps a cache in a dict, in eval mode",
    "ViltForImagesAndTextClassification": "sizes of an image are numbers of the data",
    "LlavaForConditionalGeneration": "its hidden states are not there while it is exported",
}
CUDA_ONLY = tuple(name for name in opdb.ENTRIES if name.startswith("jiterator"))
FAST_FAMILIES = ("GPT2LMHeadModel", "T5ForConditionalGeneration", "Wav2Vec2ForCTC", "MixtralForCausalLM")


def every(names: list[str], step: int) -> list[object]:
    """All names; those that are not a multiple of ``step`` are slow."""
    return [pytest.param(n, marks=() if i % step == 0 else pytest.mark.slow) for i, n in enumerate(names)]


@pytest.mark.parametrize("name", every([n for n in opdb.ENTRIES if n not in CUDA_ONLY], 20))
def test_operators_equal_eager(name: str):
    row = opdb.measure(name)
    cells = {column: row.get(column) for column in opdb.COLUMNS if column != "portable"}
    if name in REFUSED:
        assert cells["forward"] == "refused", row
    elif name in opdb.WRONG_IN_EAGER:
        assert set(cells.values()) == {"equal", "differs"}, row
    else:
        assert set(cells.values()) <= {"equal", "none", None}, row


@pytest.mark.parametrize("name", every(list(modules.ENTRIES), 8))
def test_modules_equal_eager(name: str):
    row = modules.measure(name)
    assert not modules.falls_short(row), row


def verdicts_of(row: dict[str, object]) -> set[object]:
    return {row.get(mode) for mode in model_zoo.BY_NAME[str(row["name"])].modes}


@pytest.mark.parametrize("name", FAST_FAMILIES)
def test_some_families_equal_eager(name: str):
    row = model_zoo.measure(name)
    assert verdicts_of(row) == {"equal"}, row


@pytest.mark.slow
@pytest.mark.parametrize("name", [family.name for family in FAMILIES])
def test_families_equal_eager_or_are_known_to_be_refused(name: str):
    row = model_zoo.measure(name)
    verdicts = verdicts_of(row)
    if name in REFUSED_FAMILIES:
        assert "refused" in verdicts and verdicts <= {"equal", "refused"}, row
    else:
        assert verdicts == {"equal"}, row
