# SPDX-License-Identifier: Apache-2.0
"""The tables of README.md and RESULTS.md are those of benchmarks/results.json, and what measures them works."""

import json
import shutil
import sys

import pytest

import run_bert_flax
from benchmarks import curves, results, sections, tables
from tests.conftest import ROOT

MEASURES = [{"name": "masked tokens", "model": 0.4, "baseline": 0.1, "baseline_name": "unigram", "baseline_loss": 6.0}]
ENVIRONMENT = {"cpu": "CPU", "simd": "AVX2", "cores": 2, "date": "2026-01-02", "git_commit": "a" * 40, "versions": {"jax": "1"}}


@pytest.fixture
def pages(tmp_path):
    """A directory with the pages and results of the checkout."""
    for name in results.WRITTEN:
        if (ROOT / name).exists():
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, tmp_path / name)
    return tmp_path


def quickstart(values, **more):
    """Figures of a quick start with so many seeds."""
    curve = {"train": [[10, 8.0], [20, 7.0]], "eval_loss": [[20, 7.1]], "eval_accuracy": [[20, 0.1]]}
    seeds = {
        str(seed): {"seconds": 60.0 + seed, "measures": [MEASURES[0] | {"model": value}], "curve": curve}
        for seed, value in enumerate(values)
    }
    model = {"type": "roberta", "layers": [2], "width": 128, "parameters": 712345, "steps": 20, "rows": 4, "tokens": 64}
    return {"environment": ENVIRONMENT, "command": "make quickstart", "model": model, "seeds": seeds} | more


def test_tables_are_those_of_the_results():
    """If it fails: python benchmarks/results.py --tables, and put into results.json nothing that was not measured."""
    assert results.differences(ROOT) == []


@pytest.mark.parametrize("name", results.PAGES)
def test_a_table_that_was_edited_is_found(pages, name):
    assert results.differences(pages) == []
    text = (pages / name).read_text("utf-8")
    place = text.index(" % ", text.index("<!-- table: "))
    (pages / name).write_text(f"{text[: place - 1]}9{text[place:]}", "utf-8")
    (line,) = results.differences(pages)
    assert line.startswith(f"{name}, line ")


def test_results_that_changed_are_found(pages):
    """Without the tables, and without the picture; afterwards both are right, and stay so."""
    found = results.read_results(pages) | {"quickstarts/mlm": quickstart([0.4123, 0.4, 0.45])}
    results.write(pages / results.RESULTS, results.as_json(found))
    assert json.loads(results.as_json(found)) == found
    lines = results.differences(pages)
    assert {line.partition(",")[0].partition(":")[0] for line in lines} == {*results.PAGES, curves.PATH}
    assert set(results.publish(found, pages)) == {*results.PAGES, curves.PATH}
    assert results.differences(pages) == results.publish(found, pages) == []
    readme = (pages / "README.md").read_text("utf-8")
    assert "masked tokens: 41.2 % (40.0 to 45.0 over 3 seeds; unigram 10.0 %) | 2 CPU cores | 1 min 1 s |" in readme
    assert "trains a RoBERTa of 2 layers, 128 wide, 0.7 million parameters, for\n20 steps of 4 x 64 tokens" in readme
    assert f'<img src="{curves.PATH}"' in readme
    found["quickstarts/mlm"]["seeds"]["1"]["curve"]["train"][0][1] = 9.0
    results.write(pages / results.RESULTS, results.as_json(found))
    assert results.differences(pages) == [f"{curves.PATH}: is not of the curves in {results.RESULTS}"]


def test_captions_say_what_is_of_several_runs():
    one = {"throughput/mlm": {"environment": ENVIRONMENT}, "throughput/clm": {"environment": ENVIRONMENT}}
    assert tables.caption(one, ["throughput"]) == "Measured 2026-01-02, commit aaaaaaa; 2 cores of CPU with AVX2; jax 1."
    one["throughput/clm"] = {"environment": ENVIRONMENT | {"simd": "AVX-512", "is_clean": False}}
    *_, first, second = tables.caption(one, ["throughput"]).splitlines()
    assert first.startswith("- throughput (mlm): 2026-01-02, commit aaaaaaa; 2 cores of CPU with AVX2")
    assert "clm): 2026-01-02, commit aaaaaaa with changes that were not committed; 2 cores of CPU with AVX-512" in second


def test_a_mark_must_be_known():
    with pytest.raises(ValueError, match="<!-- table: nonsense -->: there is no such table"):
        tables.fill("<!-- table: nonsense -->\n<!-- end -->", {})


@pytest.mark.parametrize("objective", sections.OBJECTIVES)
def test_commands_are_those_of_the_makefile(objective):
    *preparing, training, showing = sections.quickstart_commands(objective)
    assert tables.SCRIPTS[training[1]] == objective
    assert [command[1] for command in preparing] == ["quickstart/python_docs_corpus.py", "prepare_model_dir.py"]
    assert all((ROOT / command[1]).exists() for command in [*preparing, training, showing])
    assert {"--model_dir", "--corpus_dir"} <= set(showing)
    assert sections.replace_flag(showing, "--model_dir", "x")[2:4] == ["--model_dir", "x"]


def test_a_quick_start_is_measured(roberta_dir, texts, tmp_path, monkeypatch):
    """Real training with two seeds; the program that shows the model is a stand-in."""
    (tmp_path / "train.txt").write_text("\n".join(texts) + "\n", "utf-8")
    show = tmp_path / "show.py"
    written = json.dumps({"measures": MEASURES})
    place = "sys.argv[sys.argv.index('--results_file') + 1]"
    show.write_text(f"import pathlib, sys\npathlib.Path({place}).write_text({written!r})\nsys.exit(1)\n")
    flags = ["--config_name", roberta_dir, "--tokenizer_name", roberta_dir, "--train_file", tmp_path / "train.txt"]
    flags += ["--output_dir", "elsewhere", "--max_seq_length", 32, "--per_device_train_batch_size", 4]
    training = [sys.executable, "run_mlm_flax.py", *map(str, flags)]
    showing = [sys.executable, str(show), "--model_dir", "elsewhere", "--corpus_dir", str(tmp_path)]
    monkeypatch.setattr(sections, "quickstart_commands", lambda objective: [[sys.executable, "-c", ""], training, showing])
    found = sections.measure_quickstart("mlm", sections.Runner(tmp_path / "runs", quick=True))
    assert list(found["seeds"]) == ["42", "1"]
    for seed, run in found["seeds"].items():
        assert run["measures"] == MEASURES
        assert run["seconds"] >= run["seconds_to_train"] > 0
        assert [step for step, _ in run["curve"]["train"]] == list(range(1, 21))
        assert [step for step, _ in run["curve"]["eval_loss"]] == [10, 20]
        record = json.loads((tmp_path / "runs" / f"mlm-{seed}" / "run_info.json").read_text())
        assert record["arguments"]["seed"] == int(seed)
    assert found["seeds"]["42"]["curve"] != found["seeds"]["1"]["curve"]
    assert found["model"] | {"parameters": 0, "width": 0, "layers": 0} == {
        "type": "roberta", "layers": 0, "width": 0, "parameters": 0, "steps": 20, "rows": 4, "tokens": 32
    }  # fmt: skip


def test_measures_are_checked(tmp_path):
    path = tmp_path / "measures.json"
    for text in (
        "",
        "{}",
        '{"measures": []}',
        '{"measures": [{"name": "a", "model": "?", "baseline": 0, "baseline_name": "b"}]}',
    ):
        path.write_text(text)
        with pytest.raises(sections.FailedError, match="holds no measures"):
            sections.read_measures(path)


def test_a_section_that_fails_leaves_what_was_there(tmp_path, monkeypatch, capsys):
    """The others are measured, and written at once."""
    results.copy_pages(tmp_path)
    found = {"one": {"environment": ENVIRONMENT, "value": 1}, "two": {"environment": ENVIRONMENT, "value": 1}}
    results.write(tmp_path / results.RESULTS, results.as_json(found))

    def fail(runner):
        runner.run([sys.executable, "-c", "print('what happened'); raise SystemExit(3)"], "failing")

    made = {"one": sections.Section(fail, 1), "two": sections.Section(lambda runner: {"value": 0.123456789}, 1)}
    monkeypatch.setattr(results, "SECTIONS", made)
    assert results.measure(["one", "two"], sections.Runner(tmp_path / "runs"), tmp_path) == ["one"]
    said, kept = capsys.readouterr().err, results.read_results(tmp_path)
    assert "one failed: exit status 3" in said and "what happened" in said
    assert (kept["one"], kept["two"]["value"]) == (found["one"], 0.12346)
    assert set(results.KEPT) < set(kept["two"]["environment"])


def test_what_cannot_be_measured_is_said(monkeypatch, capsys):
    section = sections.SECTIONS["compile"]._replace(missing=lambda: "the compilers are not installed")
    monkeypatch.setitem(sections.SECTIONS, "compile", section)
    assert "compile" not in results.chosen_sections(None)
    assert "Left out: compile: the compilers are not installed" in capsys.readouterr().err
    assert results.chosen_sections(["vocab_head", "run_bert"]) == ["vocab_head/mlm", "vocab_head/clm", "run_bert"]
    for only, line in (("compile", "the compilers are not installed"), ("nonsense", "there is no such section")):
        with pytest.raises(SystemExit) as exit:
            results.chosen_sections([only])
        assert exit.value.code == 2
        assert f"--only {only}: {line}" in capsys.readouterr().err


def test_the_table_of_run_bert_is_read(tmp_path, monkeypatch):
    """As the script makes it, among other lines."""
    encoders = [run_bert_flax.TimedEncoder.__new__(run_bert_flax.TimedEncoder) for _ in range(2)]
    for encoder, precision, seconds in zip(encoders, ("float32", "bfloat16"), (2.0, 0.5), strict=True):
        encoder.precision, encoder.compile_seconds, encoder.seconds = precision, 1.0, [seconds, seconds]
    shown = run_bert_flax.results_table(encoders, run_bert_flax.TimingArguments(batch_size=8))
    written = f"12:00:00 INFO Compiled for float32 in 1.0 s\nfloat32: median 1 ms\n{shown}\n"

    def run(runner, argv, name):
        results.write(runner.directory / "logs" / f"{name}.log", written)
        return 21.0

    monkeypatch.setattr(sections.Runner, "run", run)
    found = sections.measure_run_bert(sections.Runner(tmp_path))
    assert found["seconds"] == 21.0
    assert found["precisions"]["float32"]["examples_per_second"] == 4.0
    assert found["precisions"]["bfloat16"]["ratio"] == 4.0
    assert tables.bfloat16_speed(found) == "bfloat16 at 4.00 times the speed of float32"


def test_the_quick_way_runs_benchmarks(run_script, tmp_path):
    """Two sections in earnest, of which one calls a script's loss as the script does; nothing is written into the checkout."""
    before = {name: (ROOT / name).read_bytes() for name in results.WRITTEN if (ROOT / name).exists()}
    only = ["--quick", "--only", "host_pipeline", "vocab_head/mlm", "--output_dir", tmp_path]
    done = run_script(ROOT / "benchmarks" / "results.py", *only)
    assert done.returncode == 0, done.stderr
    assert list(results.read_results(tmp_path)) == ["vocab_head/mlm", "host_pipeline"]
    page = (tmp_path / "benchmarks/RESULTS.md").read_text("utf-8")
    assert "| collate | " in page
    assert "this script | " in page
    assert before == {name: (ROOT / name).read_bytes() for name in before}
