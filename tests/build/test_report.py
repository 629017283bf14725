"""The report's errors are those of the stored bits, and a row that sticks out is named."""

import json
from dataclasses import asdict

import pytest
import torch

from engine.build.report import (
    CHUNK,
    SHOWN,
    TensorError,
    find_outliers,
    lines,
    measure,
    measure_cast,
    report,
)
from kernels.fp8 import E4M3, INT8, Rows, quantize_rows

FORMS = [E4M3, INT8]


def drawn(rows, width, seed=0):
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(seed)) * 0.02


def by_definition(weight, stored):
    """Relative errors of the whole and of each row, and each row's crest, in fp64."""
    weight, stored = weight.double(), stored.double()
    lost, size = (weight - stored).norm(dim=1), weight.norm(dim=1)
    crest = weight.abs().amax(dim=1) / weight.square().mean(dim=1).sqrt()
    return (lost.norm() / size.norm()).item(), (lost / size).nan_to_num(), crest.nan_to_num()


def assert_is(found, weight, stored):
    relative, rows, crest = by_definition(weight, stored)
    assert found.relative == pytest.approx(relative, rel=1e-4, abs=1e-7)
    assert found.worst_row == pytest.approx(rows.max().item(), rel=1e-4, abs=1e-7)
    assert rows[found.worst_row_index].item() == pytest.approx(found.worst_row, rel=1e-4, abs=1e-7)
    assert found.crest == pytest.approx(crest.max().item(), rel=1e-4)
    assert crest[found.crest_index].item() == pytest.approx(found.crest, rel=1e-4)
    live = weight.abs().amax(dim=1) > 0
    assert found.usual_row == pytest.approx(rows[live].median().item(), rel=1e-4, abs=1e-7)
    assert found.usual_crest == pytest.approx(crest[live].median().item(), rel=1e-4)


@pytest.mark.parametrize("source", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.name)
@pytest.mark.parametrize("shape", [(1, 1), (3, 77), (2 * CHUNK // 2048 + 3, 2048)])
def test_an_error_is_that_of_the_stored_codes(shape, form, source):
    weight = drawn(*shape).to(source)
    rows = quantize_rows(weight, form)
    found = measure("blocks.3.qkv", weight, rows, "because")
    assert_is(found, weight.float(), rows.dequantize())
    assert found.name == "blocks.3.qkv" and found.kind == "qkv"
    assert found.dtype == str(form.dtype).removeprefix("torch.")
    assert found.values == weight.numel() and found.reason == "because"


def test_every_e4m3_code_is_read_back_exactly():
    codes = torch.arange(256, dtype=torch.uint8)
    codes = codes[(codes & 0x7F) != 0x7F].view(torch.float8_e4m3fn)[None]  # without both NaN
    s = torch.tensor([0.37])
    same = measure("blocks.0.up", codes.float() * s, Rows(codes, s))
    assert same.relative < 1e-7
    moved = measure("blocks.0.up", codes.float() * s + 0.01, Rows(codes, s))
    want = (0.01**2 * 254) ** 0.5 / (codes.float() * s + 0.01).norm().item()
    assert moved.relative == pytest.approx(want, rel=1e-4)


def test_wrong_codes_show():
    weight = drawn(64, 256)
    rows = quantize_rows(weight, INT8)
    rows.q[17] = 0
    found = measure("blocks.0.o", weight, rows)
    assert found.worst_row_index == 17 and found.worst_row == pytest.approx(1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_an_error_of_wider_formats_is_that_of_the_cast(dtype):
    weight = drawn(50, 300)
    found = measure_cast("text_embedding.0.weight", weight, weight.to(dtype))
    assert_is(found, weight, weight.to(dtype))
    assert found.kind == "outside" and found.dtype == str(dtype).removeprefix("torch.")
    assert (found.relative == 0) == (dtype == torch.float32)


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.name)
def test_rows_of_zeros_have_neither_error_nor_crest(form):
    weight = drawn(6, 128)
    weight[1] = weight[4] = 0
    found = measure("blocks.0.up", weight, quantize_rows(weight, form))
    assert_is(found, weight, quantize_rows(weight, form).dequantize())
    weight[5] *= 1e-13  # below the smallest scale
    tiny = measure("blocks.0.up", weight, quantize_rows(weight, form))
    assert tiny.crest == measure("blocks.0.up", weight[:5], quantize_rows(weight[:5], form)).crest
    nothing = measure("blocks.0.up", 0 * weight, quantize_rows(0 * weight, form))
    cast = measure_cast("head.head.weight", 0 * weight, (0 * weight).half())
    for empty in (nothing, cast):
        assert empty.relative == empty.worst_row == empty.crest == empty.usual_crest == 0
    assert find_outliers([nothing, cast]) == []


@pytest.mark.parametrize("size", [1e-8, 1e20, 1e36])
@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.name)
def test_the_size_of_a_weight_does_not_matter(form, size):
    weight = drawn(20, 200)
    usual = measure("blocks.0.up", weight, quantize_rows(weight, form))
    scaled = measure("blocks.0.up", weight * size, quantize_rows(weight * size, form))
    assert scaled.relative == pytest.approx(usual.relative, rel=1e-3)
    assert scaled.worst_row == pytest.approx(usual.worst_row, rel=1e-3)
    assert scaled.crest == pytest.approx(usual.crest, rel=1e-3)
    exact = measure_cast("head.head.weight", weight * size, (weight * size).bfloat16())
    assert exact.relative == pytest.approx(1.66e-3, rel=0.05)


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.name)
def test_a_row_with_one_large_value_is_an_outlier_of_its_class(form):
    weights = [drawn(40, 1024, seed) for seed in range(5)]
    weights[3][29, 100] = 2.0  # a hundred times the others
    errors = [measure(f"blocks.{n}.o", w, quantize_rows(w, form)) for n, w in enumerate(weights)]
    outliers = find_outliers(errors)
    assert {(one.name, one.row) for one in outliers} == {("blocks.3.o", 29)}
    crest = next(one for one in outliers if one.what == "crest")
    assert crest.found == pytest.approx(errors[3].crest) and crest.found > 7 * crest.usual
    if form == INT8:
        assert {one.what for one in outliers} == {"crest", "error"}


def test_an_even_class_has_no_outliers():
    weights = [drawn(40, 1024, seed) * 10.0**seed for seed in range(5)]
    for form in FORMS:
        errors = [
            measure(f"blocks.{n}.o", weight, quantize_rows(weight, form))
            for n, weight in enumerate(weights)
        ]
        assert find_outliers(errors) == []


def test_classes_are_told_apart_by_kind_and_format():
    weight = drawn(32, 256)
    made = [("blocks.0.up", INT8), ("blocks.1.up", INT8), ("blocks.1.down", INT8)]
    made.append(("blocks.2.up", E4M3))
    errors = [measure(name, weight, quantize_rows(weight, form)) for name, form in made]
    errors.append(measure_cast("text_embedding.0.weight", weight, weight.bfloat16()))
    classes = report(errors)["classes"]
    found = [(one["kind"], one["dtype"], one["tensors"], one["values"]) for one in classes]
    assert found == [
        ("up", "int8", 2, 2 * 32 * 256),
        ("down", "int8", 1, 32 * 256),
        ("up", "float8_e4m3fn", 1, 32 * 256),
        ("outside", "bfloat16", 1, 32 * 256),
    ]
    assert classes[0]["relative"] == pytest.approx(errors[0].relative)
    assert 3 * classes[0]["relative"] < classes[2]["relative"]


def test_the_report_is_json_and_its_tensors_can_be_made_again_from_it():
    weight = drawn(32, 256)
    weight[5, 5] = 9.0
    errors = [measure("blocks.0.down", weight, quantize_rows(weight), "not calibrated")]
    read = json.loads(json.dumps(report(errors), allow_nan=False))
    assert [TensorError(**one) for one in read["tensors"]] == errors
    assert read["tensors"][0] == asdict(errors[0])
    assert read["outliers"][0]["name"] == "blocks.0.down" and read["outliers"][0]["row"] == 5
    assert read["classes"][0]["worst_tensor"] == "blocks.0.down"


def test_what_was_copied_is_named_and_a_class_of_its_own():
    weight = drawn(32, 256)
    weight[:16] *= 0.1
    scale = torch.full((32,), weight.abs().max() / 448)  # one for all, as files of FP8 have it
    rows = Rows((weight / scale[:, None]).to(torch.float8_e4m3fn), scale)
    exact = rows.dequantize()
    errors = [
        measure("blocks.0.qkv", weight, quantize_rows(weight)),
        measure("blocks.1.qkv", exact, rows, "", ["self_attn.q", "self_attn.v"]),
    ]
    assert_is(errors[1], exact, exact)
    found = report(errors)
    assert found["copied"] == ["blocks.1.self_attn.q.weight", "blocks.1.self_attn.v.weight"]
    assert [(one["copied"], one["relative"] < 1e-6) for one in found["classes"]] == [
        (0, False),
        (2, True),
    ]
    assert found["outliers"] == []
    table = list(lines(errors))
    assert table[2].startswith("qkv       float8_e4m3fn copied        1")
    assert table[-1] == "copied: the 8-bit codes of 2 weights are those of the file"


def test_nothing_built_is_an_empty_report():
    assert report([]) == {"classes": [], "copied": [], "outliers": [], "tensors": []}
    assert len(list(lines([]))) == 1


def test_the_table_has_a_line_for_each_class_and_names_some_outliers():
    errors = []
    for n in range(SHOWN + 3):
        weight = drawn(32, 1024, n)
        weight[n, 0] = 1.0
        errors.append(measure(f"blocks.{n}.up", weight, quantize_rows(weight)))
    table = list(lines(errors))
    assert all(len(line) <= 80 for line in table)
    assert table[1].split()[:3] == ["up", "float8_e4m3fn", str(SHOWN + 3)]
    assert len([line for line in table if line.startswith("outlier: ")]) == SHOWN
    assert table[-1] == f"and {len(find_outliers(errors)) - SHOWN} more outliers"
