# SPDX-License-Identifier: Apache-2.0
"""From benchmarks/results.json to the tables of README.md and RESULTS.md.

They stand between `<!-- table: name -->` and `<!-- end -->`; `<!-- text: name -->`, which may be within a line, does the
same. Of a section that was not measured there are no rows; nothing here measures.
"""

import re
import statistics
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from benchmarks import curves

Results = dict[str, Any]
MARK = re.compile(r"(<!-- (?:table|text): ([\w/-]+) -->)(.*?)(<!-- end -->)", re.DOTALL)
SCRIPTS = {
    "run_mlm_flax.py": "mlm",
    "run_clm_flax.py": "clm",
    "run_t5_mlm_flax.py": "t5",
    "run_bart_dlm_flax.py": "bart",
    "run_pretraining_flax.py": "nsp",
}
NAMES = {
    "roberta": "RoBERTa",
    "modernbert": "ModernBERT",
    "bert": "BERT",
    "gpt2": "GPT-2",
    "t5": "T5",
    "bart": "BART",
    "llama": "Llama",
}
MEASURED = ("quickstarts", "throughput", "vocab_head", "host_pipeline", "preprocessing", "first_step", "run_bert")


def fill(text: str, results: Results) -> str:
    """The page with all that stands between marks made anew. A mark without a maker: ValueError."""

    def replace(found: re.Match) -> str:
        begin, name, old, end = found.groups()
        if name not in MAKERS:
            raise ValueError(f"<!-- table: {name} -->: there is no such table; known are {', '.join(MAKERS)}")
        made = MAKERS[name](results, old)
        return f"{begin}\n{made}\n{end}" if old.startswith("\n") else f"{begin}{made}{end}"

    return MARK.sub(replace, text)


# ---- Parts of them ----


def row_of(cells: Sequence[Any]) -> str:
    return "|" + "|".join(f" {cell} " if cell != "" else " " for cell in cells) + "|"


def table(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    return "\n".join([row_of(header), "|" + "---|" * len(header), *map(row_of, rows)])


def sections(results: Results, group: str) -> dict[str, Results]:
    """The sections of a group by their second name, in the order in which they are kept."""
    return {name.partition("/")[2]: found for name, found in results.items() if name.partition("/")[0] == group}


def percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


def triple(values: dict[str, float], digits: int = 2) -> str:
    """Median (least to most)."""
    texts = {name: f"{values[name]:,.{digits}f}" for name in ("median", "min", "max") if name in values}
    return f"{texts['median']} ({texts['min']} to {texts['max']})" if len(texts) == 3 else texts["median"]


def bold_triple(values: dict[str, float]) -> str:
    middle, _, around = triple(values).partition(" ")
    return f"**{middle}** {around}".strip()


def number(value: float) -> str:
    """About three digits, and whole from a hundred on."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def gib(value: float | None) -> str:
    return "?" if value is None else f"{value:.1f}"


def processor(environment: Results) -> str:
    """The device that JAX used, if it was another than the CPU, and the CPU."""
    has = f" with {environment['simd']}" if environment.get("simd") else ""
    cores = f"{environment['cores']} cores" + (f" of {environment['cpu']}{has}" if environment["cpu"] else "")
    return cores if environment.get("device", "cpu") == "cpu" else f"{environment['device']}, {cores}"


def hardware(environment: Results) -> str:
    return f"{environment['cores']} CPU cores" if environment.get("device", "cpu") == "cpu" else environment["device"]


def circumstances(environment: Results) -> str:
    """Date, commit, machine and versions in a line."""
    state = {False: " with changes that were not committed"}.get(environment.get("is_clean"), "")
    memory = f" and {environment['memory_gib']:.0f} GiB" if environment.get("memory_gib") else ""
    versions = ", ".join(f"{name} {version}" for name, version in environment["versions"].items())
    commit = f", commit {environment['git_commit'][:7]}" if environment.get("git_commit") else ""
    return f"{environment['date'][:10]}{commit}{state}; {processor(environment)}{memory}; {versions}"


def caption(results: Results, groups: Sequence[str]) -> str:
    """Where and when the sections of these groups were measured; if they are of several runs, each with its names."""
    found: dict[str, dict[str, list[str]]] = {}
    for name, section in results.items():
        group, _, part = name.partition("/")
        if group in groups:
            found.setdefault(circumstances(section["environment"]), {}).setdefault(group, []).append(part)
    if not found:
        return "Not measured."
    if len(found) == 1:
        return f"Measured {next(iter(found))}."
    lines = ["**Not of one run:**", ""]
    for where, names in found.items():
        parts = [f"{group} ({', '.join(parts)})" if any(parts) else group for group, parts in names.items()]
        lines.append(f"- {', '.join(parts)}: {where}")
    return "\n".join(lines)


# ---- README ----


def headline(quickstart: Results) -> str:
    """The first measure: the median of the seeds, how far they are apart, and the baseline."""
    measures = [seed["measures"][0] for seed in quickstart["seeds"].values()]
    values, first = [measure["model"] for measure in measures], measures[0]
    several = f"{100 * min(values):.1f} to {100 * max(values):.1f} over {len(values)} seeds; " if len(values) > 1 else ""
    baseline = f"{first['baseline_name']} {percent(first['baseline'])}" if first["baseline_name"] else "no baseline"
    return f"{first['name']}: {percent(statistics.median(values))} ({several}{baseline})"


def median_seconds(quickstart: Results) -> float:
    return statistics.median(seed["seconds"] for seed in quickstart["seeds"].values())


def fill_last_columns(results: Results, old: str) -> str:
    """The table of scripts: its first four columns as they stand, and result, hardware and time."""
    lines = []
    for line in old.strip("\n").splitlines():
        cells = [cell.strip() for cell in line.strip().strip("|").split("|")]
        script = re.search(r"\w+\.py", cells[0])
        objective = SCRIPTS.get(script[0]) if script else None
        found = results.get(f"quickstarts/{objective}") or (results.get("run_bert") if script and "bert" in script[0] else None)
        if found and objective:
            cells[-3:] = [headline(found), hardware(found["environment"]), clock(median_seconds(found))]
        elif found:
            cells[-3:] = [bfloat16_speed(found), hardware(found["environment"]), clock(found["seconds"])]
        lines.append(row_of(cells) if script else line)
    return "\n".join(lines)


def bfloat16_speed(found: Results) -> str:
    return f"bfloat16 at {found['precisions']['bfloat16']['ratio']:.2f} times the speed of float32"


def quickstart_text(objective: str) -> Callable[[Results, str], str]:
    """What a quick start trains and reaches, in a sentence."""

    def text(results: Results, old: str) -> str:
        found = results.get(f"quickstarts/{objective}")
        if not found or "model" not in found:
            return f"`make {'quickstart' if objective == 'mlm' else f'quickstart-{objective}'}`."
        model = found["model"]
        name = NAMES.get(model["type"], model["type"])
        return (
            f"`{found['command']}` trains a {name} of {' + '.join(map(str, model['layers']))} layers, {model['width']} wide,"
            f" {model['parameters'] / 1e6:.1f} million parameters, for\n{model['steps']:,} steps of {model['rows']} x"
            f" {model['tokens']} tokens: {headline(found)}."
        )

    return text


def speed_against_torch(results: Results, old: str) -> str:
    """Of all objectives, least to most, on the processor of the last run and, if it was another, of one before it."""
    found = list(sections(results, "throughput").values())
    by_processor = {found[0]["environment"]["simd"]: [one["ratio"]["median"] for one in found]} if found else {}
    for run in results.get("elsewhere", {}).get("runs", []):
        ratios = [ratio["median"] for ratio in run["ratios"].values()]
        by_processor.setdefault(run["environment"]["simd"], ratios)
    return ", ".join(f"{min(them):.1f} to {max(them):.1f} times ({name})" for name, them in by_processor.items())


def curves_image(results: Results, old: str) -> str:
    """The picture, if there are curves, with what it shows in words."""
    drawn = curves.curves_of(results)
    if not drawn:
        return ""
    ends = [f"{name} {curve['seeds'][next(iter(curve['seeds']))]['train'][-1][1]:.1f}" for name, curve in drawn.items()]
    lines = f"Training loss by step of the quick starts, {max(len(curve['seeds']) for curve in drawn.values())} seeds each"
    return f'<img src="{curves.PATH}" width="600" alt="{lines}; it ends at {", ".join(ends)} nats per token">'


# ---- RESULTS.md ----


def seeds_table(results: Results, old: str) -> str:
    """A row for a measure of a quick start, a column for a seed."""
    found = sections(results, "quickstarts")
    seeds = list(dict.fromkeys(seed for quickstart in found.values() for seed in quickstart["seeds"]))
    rows = []
    for quickstart in found.values():
        by_seed = quickstart["seeds"]
        for i, first in enumerate(next(iter(by_seed.values()))["measures"]):
            cells = [percent(by_seed[seed]["measures"][i]["model"]) if seed in by_seed else "" for seed in seeds]
            baseline = f"{percent(first['baseline'])} ({first['baseline_name']})" if first["baseline_name"] else ""
            begin, time = (f"`{quickstart['command']}`", clock(median_seconds(quickstart))) if i == 0 else ("", "")
            rows.append([begin, first["name"], *cells, baseline, time])
    return table(["command", "measure", *(f"seed {seed}" for seed in seeds), "baseline", "time"], rows)


def throughput_table(results: Results, old: str) -> str:
    rows = []
    for name, found in sections(results, "throughput").items():
        size = re.search(r"vocabulary ([\d,]+), batches of ([\dx to]+) tokens", found["task"])
        rates = [f"{found[key]['median']:,.0f}" for key in ("tokens_per_second", "torch_tokens_per_second")]
        loop = triple(found["loop_percent"], 1) if "loop_percent" in found else ""
        memory = f"{found['step_mib']:,.0f}" if "step_mib" in found else ""
        task = f"{name}, {size[1]} words, {size[2]}" if size else f"{name}, {found['task']}"
        rows.append([task, *rates, found["torch"], bold_triple(found["ratio"]), loop, memory])
    header = ["", "ours, tokens/s", "PyTorch, tokens/s", "PyTorch's way", "ratio", "loop over its step, %", "step, MiB"]
    return table(header, rows)


def vocab_head_table(results: Results, old: str) -> str:
    rows = []
    for found in sections(results, "vocab_head").values():
        own = found["steps"]["this script"]
        for name, step in found["steps"].items():
            is_own = step is own
            rows.append([
                f"{found['task']}: this script" if is_own else f"all scores, {name}", triple(step["seconds"]),
                "" if is_own else triple(step["ratio"]), f"{step['mib']:,.0f}",
            ])  # fmt: skip
    return table(["", "seconds per step", "times this script's", "memory, MiB"], rows)


def host_pipeline_table(results: Results, old: str) -> str:
    rates = results.get("host_pipeline", {}).get("million_tokens_per_second", {})
    rows = [[kind, *(number(found[kind]["median"]) for found in rates.values())] for kind in ("collate", "whole")]
    return table(["", *rates], rows)


def preprocessing_text(results: Results, old: str) -> str:
    """Megabytes of text in a second, by number of processes."""
    found: dict[str, list[str]] = {}
    for row in results.get("preprocessing", {}).get("rows", []):
        processes = f"with {row['processes']} process{'es' * (row['processes'] > 1)}"
        found.setdefault(row["objective"], []).append(f"{row['bytes'] / row['seconds']['median'] / 1e6:.1f} {processes}")
    return "; ".join(f"{objective} {', '.join(speeds)}" for objective, speeds in found.items()) + "."


def first_step_table(results: Results, old: str) -> str:
    names = ["imported", "data and weights", "compiled", "first step"]
    rows = [
        [f"{row['objective']}, cache {row['cache']}", *(f"{row[name]:.1f}" for name in names)]
        for row in results.get("first_step", {}).get("rows", [])
    ]
    return table(["", "libraries imported", *names[1:]], rows)


def run_bert_text(results: Results, old: str) -> str:
    found = results.get("run_bert", {})
    if not found:
        return ""
    speeds = [
        f" ({name} {row['examples_per_second']:.1f} examples/s)"
        for name, row in found["precisions"].items()
        if "examples_per_second" in row
    ]
    return f"{bfloat16_speed(found)}{''.join(speeds)}."


def compile_table(results: Results, old: str) -> str:
    """A row for a command, a column for a machine and precision."""
    rows: dict[str, dict[str, str]] = {}
    for row in results.get("compile", {}).get("rows", []):
        column = f"{row['machine']}, {row.get('how', 'float32').partition(',')[0]}"
        rows.setdefault(row["model"], {})[column] = compiled_cell(row)
    columns = list(dict.fromkeys(column for cells in rows.values() for column in cells))
    return table(["", *columns], [[model, *(cells.get(column, "") for column in columns)] for model, cells in rows.items()])


def compiled_cell(row: Results) -> str:
    """GiB of a step, at most, and of the device; tokens per second."""
    if "error" in row:
        return row["error"]
    peak = f"{gib(row['peak_gib'])} of {gib(row['machine_gib'])}"
    speed = f"; {row['tokens_per_second']:,.0f}" if row["tokens_per_second"] else ""
    return f"{gib(row['step_gib'])}, {peak}{speed}" if row["fits"] else f"{gib(row['step_gib'])}, **{peak}: does not fit**"


def elsewhere_table(results: Results, old: str) -> str:
    """Ratios to PyTorch that were taken on another machine, or with other models."""
    names, rows = ("mlm", "nsp", "clm", "bart", "t5"), []
    for found in results.get("elsewhere", {}).get("runs", []):
        environment = found["environment"]
        where = f"{environment['date']}, {environment['git_commit']}, {environment['simd']}"
        ratios = [bold_triple(found["ratios"][name]) if name in found["ratios"] else "" for name in names]
        rows.append([where, found["what"], *ratios])
    return table(["date, commit, processor", "ours to PyTorch", *names], rows)


def captions(*groups: str) -> Callable[[Results, str], str]:
    return lambda results, old: caption(results, groups)


MAKERS: dict[str, Callable[[Results, str], str]] = {
    "scripts": fill_last_columns,
    "scripts-caption": captions("quickstarts", "run_bert"),
    **{f"quickstart-{name}": quickstart_text(name) for name in SCRIPTS.values()},
    "speed": speed_against_torch,
    "curves": curves_image,
    "quickstarts": seeds_table,
    "throughput": throughput_table,
    "vocab_head": vocab_head_table,
    "host_pipeline": host_pipeline_table,
    "preprocessing": preprocessing_text,
    "first_step": first_step_table,
    "run_bert": run_bert_text,
    "compile": compile_table,
    "elsewhere": elsewhere_table,
    **{f"{name}-caption": captions(name) for name in ("quickstarts", "throughput", "vocab_head", "compile")},
    "all-caption": captions(*MEASURED),
}
