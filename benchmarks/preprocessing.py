#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Time the way from a text file to rows of tokens, by number of processes.

    python benchmarks/preprocessing.py

Takes the quick start's text so often that it has 20 MB, a tokenizer of 8,192 words made from it, and what main() of a script
calls: files.load and token_rows.tokenize_and_group, with nothing cached. Numbers of processes take turns.
"""

import argparse
import functools
import importlib
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

import datasets
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from benchmarks.machine import ROOT, cpu_name
from benchmarks.workloads import OBJECTIVES, make_corpus, make_tokenizer
from flaxlm import files, token_rows


def write_text(corpus: Path, path: Path, megabytes: float) -> int:
    """The corpus again and again, at least so long; returns its bytes."""
    text = corpus.read_bytes()
    return path.write_bytes(text * max(1, round(megabytes * 1e6 / len(text))))


def prepare(objective: str, tokenizer, path: Path, num_processes: int, cache_dir: str) -> tuple[float, float, int]:
    """Seconds to read the file, seconds to tokenise and cut it into rows, and the number of tokens."""
    script = importlib.import_module(OBJECTIVES[objective].module)
    config = OBJECTIVES[objective].config_class(**OBJECTIVES[objective].config)
    data_args = script.DataTrainingArguments(overwrite_cache=True, preprocessing_num_workers=num_processes)
    config.decoder_start_token_id = tokenizer.pad_token_id
    collator = script.Collator(tokenizer, config, data_args, 512)
    start = time.perf_counter()
    dataset = files.load(str(path), "--train_file", cache_dir, data_args.text_loader_options())
    loaded = time.perf_counter()
    tokenize_fn = functools.partial(script.tokenize_texts, tokenizer=tokenizer, **collator.tokenize_options)
    rows = token_rows.tokenize_and_group({"train": dataset}, tokenize_fn, collator, data_args, cache_dir)["train"]
    return loaded - start, time.perf_counter() - loaded, rows["input_ids"].size


def main() -> None:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--objective", choices=OBJECTIVES, nargs="+", default=list(OBJECTIVES))
    parser.add_argument("--num_processes", type=int, nargs="+", default=[n for n in (1, 2, 4, 8, 16, 32) if n <= cores])
    parser.add_argument("--megabytes", type=float, default=20)
    parser.add_argument("--num_runs", type=int, default=3)
    parser.add_argument("--cache_dir", type=Path, default=ROOT / "quickstart/build/benchmark", help="text and tokenizer")
    parser.add_argument("--json", type=Path, help="write the figures there")
    args = parser.parse_args()
    corpora = {objective: make_corpus(args.cache_dir, as_documents=objective == "nsp") for objective in args.objective}
    tokenizer = make_tokenizer(next(iter(corpora.values())))
    datasets.disable_progress_bars()
    found: dict[tuple[str, int], list] = {}
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "corpus.txt"
        for run in tqdm(range(args.num_runs), desc="Timing", unit="turn"):
            for objective in args.objective:
                size = write_text(corpora[objective], path, args.megabytes)
                for n in args.num_processes:  # a cache of its own, else the next run reads no text
                    cache_dir = str(Path(directory) / f"{run}-{objective}-{n}")
                    found.setdefault((objective, n), []).append(prepare(objective, tokenizer, path, n, cache_dir))
    print(f"{size / 1e6:.1f} MB of text, {cpu_name()}, {cores} cores, load {os.getloadavg()[0]:.1f} at the end; medians")
    print(f"{'':6s}{'processes':>10s}{'read: s':>9s}{'tokens: s':>11s}{'min':>7s}{'max':>7s}{'MB/s':>8s}{'tokens/s':>12s}")
    figures = []
    for (objective, n), runs in found.items():
        read, times = statistics.median(r[0] for r in runs), [r[1] for r in runs]
        seconds, num_tokens = statistics.median(times), runs[0][2]
        print(f"{objective:6s}{n:10d}{read:9.2f}{seconds:11.2f}{min(times):7.2f}{max(times):7.2f}", end="")
        print(f"{size / seconds / 1e6:8.2f}{num_tokens / seconds:12,.0f}")
        figures.append({"objective": objective, "processes": n, "bytes": size, "tokens": num_tokens, "seconds": times})
        figures[-1]["seconds_to_read"] = [r[0] for r in runs]
    if args.json:
        args.json.write_text(json.dumps(figures, indent=4) + "\n")


if __name__ == "__main__":
    main()
