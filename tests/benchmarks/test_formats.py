"""The suite of formats reads every format, and gives no speed for a wrong result."""

import pytest
import torch

from benchmarks.cold_start import formats
from benchmarks.timing import WrongResult
from engine.models.formats.weights import StoredWeights
from engine.models.tensorfile import TensorFile


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(formats, "ROWS", 512)
    monkeypatch.setattr(formats, "COLUMNS", 512)


def test_every_format_has_a_figure(small):
    checked, rows = formats.measure_formats(runs=1)
    assert "finite" in checked
    figures = formats.formats_figures(rows)
    assert len(figures) == len(formats.SAFETENSORS) + len(formats.GGUF)
    assert all(figure.value > 0 and figure.unit == "MB/s" for figure in figures)
    table = formats.formats_table(rows)
    assert all(figure.name in table for figure in figures)


def test_a_wrong_result_has_no_speed(small, tmp_path):
    files = formats.write_files(tmp_path)

    class Wrong(StoredWeights):
        def read(self, name, out, first=0):
            super().read(name, out, first)
            if first:
                out += 1

    wrong = Wrong(TensorFile(files["MXFP8"]))
    with pytest.raises(WrongResult, match="rows of MXFP8 differ when read alone"):
        formats.check("MXFP8", wrong, torch.empty(512, 512))
