"""Runs that are kept: compared beyond their noise, written down, and refused when damaged."""

import json
import math
import re
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from benchmarks import compare, pictures, record, report, run, timing
from benchmarks.record import (
    BadRecord,
    Figure,
    Record,
    Suite,
    SuiteResult,
    encode,
    read_record,
    write_record,
)
from benchmarks.report import render, write_report

HERE = {"cpu": "AMD EPYC", "cores": 2, "usable_cores": 2, "threads": 1, "memory_gib": 23,
    "gpu": None, "python": "3.11.7", "torch": "2.13.0"}  # fmt: skip
FASTER, HIGHER = "lower", "higher"


def ms(value, noise=0.0, name="decode", unit="ms", better=FASTER, source="measured"):
    return Figure(name, float(value), unit, float(noise), better, source)


def made(*figures, suite="media", date="2026-11-23T10:00:00+00:00", place=HERE, shown=()):
    result = SuiteResult("a test", [{"name": "decode"}], list(figures), list(shown))
    return Record(date, place, {suite: result}, 512)


def verdicts(before, after):
    return {change.key[1]: change.verdict for change in compare.compare(before, after)}


def compared(tmp_path, capsys, before, after, *options):
    """Runs `run.py compare`: its exit status and what it prints."""
    paths = [tmp_path / "before.json", tmp_path / "after.json"]
    for path, one in zip(paths, (before, after)):
        write_record(path, one) if isinstance(one, Record) else path.write_text(one)
    try:
        run.main(["compare", *map(str, paths), *options])
        status = 0
    except SystemExit as end:
        status = end.code
    return status, capsys.readouterr()


# --- what changed


@pytest.mark.parametrize(
    ("before", "after", "verdict"),
    [
        (ms(100), ms(104), "same"),
        (ms(100), ms(106), "worse"),
        (ms(100), ms(94), "better"),
        (ms(100, 6), ms(109, 4), "same"),
        (ms(100, 6), ms(111, 4), "worse"),
        (ms(100, 6), ms(89, 4), "better"),
        (ms(30, unit="GB/s", better=HIGHER), ms(28, unit="GB/s", better=HIGHER), "worse"),
        (ms(30, unit="GB/s", better=HIGHER), ms(29, unit="GB/s", better=HIGHER), "same"),
        (ms(0.9990, unit="cosine", better=HIGHER), ms(0.9989, unit="cosine", better=HIGHER),
            "worse"),
        (ms(31, 0.5, unit="dB", better=HIGHER), ms(30.2, 0.5, unit="dB", better=HIGHER), "same"),
        (ms(100, source="estimate"), ms(101, source="estimate"), "worse"),
        (ms(0), ms(0), "same"),
    ],
)  # fmt: skip
def test_a_figure_changed_if_it_moved_by_more_than_both_noises_and_the_floor(
    before, after, verdict
):
    assert verdicts(made(before), made(after)) == {"decode": verdict}


def test_figures_of_one_run_alone_are_new_or_missing():
    before = made(ms(1, name="decode"), ms(2, name="encode"))
    after = made(ms(3, name="resize"), ms(1, name="decode"))
    assert verdicts(before, after) == {"resize": "new", "decode": "same", "encode": "missing"}


@pytest.mark.parametrize(
    "other",
    [made(ms(1), suite="clip"), made(ms(1, unit="s")), made(ms(1, source="estimate"))],
    ids=["suite", "unit", "source"],
)
def test_a_name_in_another_suite_or_unit_or_of_another_source_is_another_figure(other):
    with pytest.raises(BadRecord, match="no figure in common"):
        compare.compare(made(ms(1)), other)


def test_what_is_worse_is_said_first_and_ends_with_one(tmp_path, capsys):
    before = made(ms(100, 2), ms(50, 1, name="encode"), ms(7, name="resize"))
    after = made(ms(120, 3), ms(40, 1, name="encode"), ms(7, name="resize"))
    status, said = compared(tmp_path, capsys, before, after)
    assert status == 1
    assert said.out.splitlines() == [
        "worse     media: decode",
        "          100 ± 2 ms -> 120 ± 3 ms (measured)  +20.0%, 5.0% may be chance",
        "better    media: encode",
        "          50 ± 1 ms -> 40 ± 1 ms (measured)  -20.0%, 5.0% may be chance",
        "1 within noise, 1 worse, 0 missing, 0 new, 1 better",
    ]
    assert all(len(line) <= 100 for line in said.out.splitlines())


def test_an_improvement_and_other_versions_end_with_zero(tmp_path, capsys):
    after = made(ms(80), place={**HERE, "torch": "2.14.0"})
    status, said = compared(tmp_path, capsys, made(ms(100)), after)
    assert status == 0
    assert said.out.splitlines()[:2] == ["torch: 2.13.0 -> 2.14.0", "better    media: decode"]


def test_figures_that_are_gone_are_listed(tmp_path, capsys):
    before = made(ms(100), ms(50, name="encode"))
    status, said = compared(tmp_path, capsys, before, made(ms(100)))
    assert status == 0
    assert said.out.splitlines()[:2] == [
        "missing   media: encode", "          50 ± 0 ms -> nothing (measured)",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"gpu": "NVIDIA H200"}, "gpu None and NVIDIA H200"),
        ({"threads": 2}, "threads 1 and 2"),
        ({"cores": 64, "cpu": "Xeon"}, "cpu AMD EPYC and Xeon, cores 2 and 64"),
    ],
)
def test_runs_of_two_machines_are_compared_only_when_asked_to(tmp_path, capsys, change, says):
    before, after = made(ms(100)), made(ms(200), place={**HERE, **change})
    status, said = compared(tmp_path, capsys, before, after)
    assert (status, said.out) == (2, "")
    assert f"different machines ({says})" in said.err and "--across" in said.err
    status, said = compared(tmp_path, capsys, before, after, "--across")
    assert status == 0
    assert "+100.0%" in said.out and "nothing here is a regression" in said.out


# --- files


def text(**changes):
    return json.dumps({**encode(made(ms(100))), **changes})


@pytest.mark.parametrize(
    ("damaged", "says"),
    [
        ("", "JSONDecodeError"),
        (text()[:200], "JSONDecodeError"),
        ("\udcff", "UnicodeDecodeError"),
        ("[1, 2]", "TypeError"),
        ('{"media": {"rows": []}}', "KeyError: 'schema'"),
        (text(schema=2), "schema 2, expected 1"),
        (text(suites={"media": {}}), "KeyError: 'figures'"),
        (text(suites=[]), "AttributeError"),
        (text().replace('"unit"', '"units"'), "TypeError"),
    ],
)
def test_a_damaged_or_foreign_file_is_one_sentence_that_names_it(tmp_path, capsys, damaged, says):
    path = tmp_path / "after.json"
    path.write_bytes(damaged.encode(errors="surrogateescape"))
    with pytest.raises(BadRecord, match=re.escape(says)) as error:
        read_record(path)
    assert str(path) in str(error.value)
    write_record(tmp_path / "before.json", made(ms(100)))
    with pytest.raises(SystemExit) as end:
        run.main(["compare", str(tmp_path / "before.json"), str(path)])
    assert end.value.code == 2
    assert capsys.readouterr().err.startswith("error: ")


def test_a_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(BadRecord, match=r"nowhere\.json cannot be read: No such file"):
        read_record(tmp_path / "nowhere.json")


def test_a_run_is_read_as_it_was_written(tmp_path):
    written = made(ms(100, 2.5), ms(31, name="psnr", unit="dB", better=HIGHER), shown=["a.png"])
    write_record(tmp_path / "run.json", written)
    assert read_record(tmp_path / "run.json") == written
    assert [path.name for path in tmp_path.iterdir()] == ["run.json"]


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
def test_a_number_that_json_has_not_is_not_written(tmp_path, number):
    path = tmp_path / "run.json"
    row = SuiteResult("a test", [{"size": [1.0, number]}], [], [])
    with pytest.raises(BadRecord, match=r"quality: a number is not finite"):
        write_record(path, replace(made(), suites={"quality": row}))
    with pytest.raises(BadRecord, match=r"media: a number is not finite"):
        write_record(path, made(ms(number)))
    assert not path.exists()


def test_two_figures_of_one_name_are_not_written():
    with pytest.raises(BadRecord, match="Two figures of media are called decode"):
        encode(made(ms(1), ms(2)))


def test_a_second_run_of_the_day_adds_its_suites_unless_it_ran_elsewhere():
    older = replace(made(ms(1)), suites={**made(ms(1)).suites, **made(ms(5), suite="clip").suites})
    newer = replace(made(ms(2)), peak_mib=99, date="2026-11-23T12:00:00+00:00")
    both = record.merged(older, newer)
    assert {name: suite.figures[0].value for name, suite in both.suites.items()} == {
        "media": 2, "clip": 5,
    }  # fmt: skip
    assert (both.date, both.peak_mib) == (newer.date, 512)
    with pytest.raises(BadRecord, match=r"2026-11-23 differs in threads, torch"):
        record.merged(older, replace(newer, machine={**HERE, "threads": 2, "torch": "2.14"}))


@pytest.mark.parametrize(
    ("place", "name"),
    [
        (HERE, "cpu-epyc-2"),
        ({"cpu": "Intel(R) Xeon(R) Platinum 8480C @ 2.00GHz", "cores": 96, "gpu": None},
            "cpu-xeon-platinum-8480c-96"),
        ({"cpu": "AMD Ryzen 9 7950X 16-Core Processor", "cores": 32}, "cpu-ryzen-9-7950x-32"),
        ({**HERE, "gpu": "NVIDIA GeForce RTX 4090"}, "rtx-4090"),
        ({**HERE, "gpu": "NVIDIA H200"}, "h200"),
        ({"cpu": "../../etc", "cores": 1}, "cpu-etc-1"),
    ],
)  # fmt: skip
def test_a_file_is_named_after_date_and_machine(place, name):
    assert made(place=place).stem == f"2026-11-23-{name}"


def test_what_is_said_of_this_machine_is_what_it_has_and_not_whose_it_is():
    here = record.machine()
    assert here["cores"] >= here["usable_cores"] >= 1
    assert here["threads"] >= 1 and here["memory_gib"] >= 1
    assert set(record.PLACE) < here.keys()
    assert Path("/proc/sys/kernel/hostname").read_text("utf-8").strip() not in here.values()


# --- the report


def test_the_committed_report_shows_every_figure_and_picture_of_the_committed_runs():
    text = (report.RESULTS / report.REPORT).read_text("utf-8")
    records = report.read_records(report.RESULTS)
    assert records
    latest = {(record.slug(one.machine), name): one for one in records for name in one.suites}
    for one in records:
        for name, suite in one.suites.items():
            if latest[record.slug(one.machine), name] is not one:
                continue  # measured again since; `run.py compare` reads it
            heading = f"### {name}, {record.slug(one.machine)}, {one.date[:10]}"
            # one where it measured, one where it estimated
            sections = [part.partition("\n### ")[0] for part in text.split(heading)[1:]]
            shown = {line.split(" | ")[0] for part in sections for line in part.splitlines()}
            assert {f"| {figure.name}" for figure in suite.figures} <= shown
            for picture in suite.pictures:
                assert any(f"]({picture})" in part for part in sections)
                assert (report.RESULTS / picture).is_file()


def test_measured_and_estimated_figures_never_share_a_table():
    mixed = made(
        ms(12345.6, 12, name="decode"),
        ms(0.5, name="forward | sm89", unit="s", source="estimate"),
        shown=["pictures/a.png"],
    )
    measured, estimated = render([mixed]).split("## Estimated")
    assert "| cpu-epyc-2 | AMD EPYC, 2 of 2 cores | 1 | 23 GiB | none |" in measured
    assert "### media, cpu-epyc-2, 2026-11-23\n\nChecked by a test.\n" in measured
    assert "| decode | 12,346 | 12 | ms | lower |" in measured
    assert "![media](pictures/a.png)" in measured
    assert "forward" not in measured
    assert "| forward \\| sm89 | 0.5 | 0 | s | lower |" in estimated
    assert "decode" not in estimated and "Checked" not in estimated and "png" not in estimated


def test_pictures_of_estimates_stand_with_the_estimates():
    held = made(ms(0.5, source="estimate"), suite="denoiser", shown=["pictures/d.png"])
    measured, estimated = render([held]).split("## Estimated")
    assert "Nothing yet." in measured and "png" not in measured
    assert "![denoiser](pictures/d.png)" in estimated


def test_of_each_machine_the_latest_run_of_a_suite_is_shown():
    days = [made(ms(day), date=f"2026-11-2{day}T00:00:00+00:00") for day in (1, 2)]
    away = made(ms(7), place={**HERE, "gpu": "NVIDIA H200"})
    shown = render([*days, away])
    assert re.findall(r"### (.+)\n", shown) == [
        "media, cpu-epyc-2, 2026-11-22", "media, h200, 2026-11-23",
    ]  # fmt: skip
    assert "| decode | 2 | 0 | ms | lower |" in shown and "| decode | 1 |" not in shown


def test_long_tables_are_folded_and_nothing_kept_is_said_so():
    many = made(*(ms(n, name=f"kernel {n}") for n in range(40)))
    assert "<details><summary>40 figures</summary>\n\n| figure |" in render([many])
    assert "<details>" not in render([made(ms(1))])
    assert render([]).count("Nothing yet.") == 2


def test_the_report_refuses_a_run_under_another_name(tmp_path):
    write_record(tmp_path / "2026-11-23-h200.json", made(ms(1)))
    with pytest.raises(BadRecord, match=r"h200\.json holds the run that is called 2026-11-23-cpu"):
        write_report(tmp_path)
    assert not (tmp_path / "RESULTS.md").exists()


@dataclass(frozen=True, slots=True)
class Drawn:
    name: str
    ms: float


def test_a_kept_run_has_its_record_its_pictures_and_its_place_in_the_report(monkeypatch, tmp_path):
    def draw(rows, folder, stem):
        fig, [axes] = pictures.figure(3, 2)
        axes.bar([row.name for row in rows], [row.ms for row in rows], color=pictures.COLOURS[0])
        return pictures.save(fig, folder, stem)

    rows = [Drawn("decode", 4.0)]
    suite = Suite(
        lambda package: (f"a look at {package}", rows), lambda held: held[0].name,
        lambda held: [ms(held[0].ms, name=held[0].name)], draw,
    )  # fmt: skip
    monkeypatch.setattr(run, "suite_of", lambda name: suite)
    monkeypatch.setitem(run.SUITES, "media", ("", ("package", "models")))
    found, drawn = run.measure(["media"], {"package": "tiny", "models": None})
    assert found.suites["media"].checked_by == "a look at tiny"
    written = run.keep(found, drawn, tmp_path)
    stem = f"{found.stem}-media"
    assert [str(path.relative_to(tmp_path)) for path in written] == [
        f"pictures/{stem}.png", f"pictures/{stem}.svg", f"{found.stem}.json", "RESULTS.md",
    ]  # fmt: skip
    assert (tmp_path / f"pictures/{stem}.png").read_bytes().startswith(b"\x89PNG")
    assert "<svg" in (tmp_path / f"pictures/{stem}.svg").read_text("utf-8")
    kept = read_record(tmp_path / f"{found.stem}.json")
    assert kept.suites["media"].rows == [{"name": "decode", "ms": 4.0}]
    assert f"![media](pictures/{stem}.png)" in (tmp_path / "RESULTS.md").read_text("utf-8")
    before = (tmp_path / f"pictures/{stem}.svg").read_bytes()
    run.keep(found, drawn, tmp_path)
    assert (tmp_path / f"pictures/{stem}.svg").read_bytes() == before


# --- an independent clock

# freed memory is kept on both sides, as `media` does: new pages would be half of the time
# --- clocks


def test_a_row_has_the_time_that_its_work_took_by_another_clock(monkeypatch):
    """A clock that only the work moves: no other program can."""
    now = [0.0]
    monkeypatch.setattr(timing.time, "perf_counter", lambda: now[0])
    takes = iter([0.5, 0.1, 0.2, 0.3, 0.9, 0.4, 0.6])

    def work():
        now[0] += next(takes)

    row = timing.measure("work", work, units=10)
    assert (row.ms, row.best_ms, row.worst_ms) == pytest.approx((40, 10, 90))


def test_the_noise_of_a_row_is_half_of_its_spread():
    rows = [timing.Row("drawn", 4.0, 3.5, 6.5)]
    assert timing.figures(rows) == [Figure("drawn", 4.0, "ms", 1.5, "lower", "measured")]
