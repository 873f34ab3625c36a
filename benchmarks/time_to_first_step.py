#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Time from the command to the first step of training, with an empty and with a filled compilation cache.

    python benchmarks/time_to_first_step.py

Runs a script as a person would, on a small model and the quick start's text, and notes when its log says what: it has read
its arguments (so all libraries are imported), compiles (so data and weights are there), has compiled, has made a step. The
text is tokenised anew in each run; the compilation cache is JAX's own, set by JAX_COMPILATION_CACHE_DIR.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from benchmarks.machine import cpu_name  # noqa: E402
from benchmarks.workloads import OBJECTIVES, make_corpus, make_tokenizer  # noqa: E402

MARKS = {
    "imported": "Arguments other than the defaults",
    "data and weights": "Compiling the training step",
    "compiled": "Compiled the training step",
    "first step": "step 1 of",
}


def seconds_to_marks(argv: list[str], environment: dict[str, str]) -> dict[str, float]:
    """Run a program, and say after how many seconds each mark stood in its log."""
    start, found, log = time.perf_counter(), {}, []
    process = subprocess.Popen(argv, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True, env=environment)
    for line in process.stderr:
        log.append(line)
        found |= {name: time.perf_counter() - start for name, text in MARKS.items() if text in line and name not in found}
    if process.wait() or len(found) < len(MARKS):
        raise RuntimeError(f"{' '.join(argv)}: exit status {process.returncode}\n{''.join(log[-20:])}")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--objective", choices=OBJECTIVES, nargs="+", default=list(OBJECTIVES))
    parser.add_argument("--num_runs", type=int, default=3)
    parser.add_argument("--cache_dir", type=Path, default=ROOT / "quickstart/build/benchmark", help="text and tokenizer")
    parser.add_argument("--json", type=Path, help="write the figures there: seconds since the start, of each run")
    args = parser.parse_args()
    corpora = {objective: make_corpus(args.cache_dir, as_documents=objective == "nsp") for objective in args.objective}
    found: dict[tuple[str, str], list] = {}
    with tempfile.TemporaryDirectory() as directory:
        for objective in args.objective:
            kind = OBJECTIVES[objective]
            model_dir = Path(directory) / objective
            make_tokenizer(corpora[objective]).save_pretrained(model_dir)
            kind.config_class(**kind.config | kind.sizes["tiny"][2] | {"vocab_size": 8192}).save_pretrained(model_dir)
        for run in tqdm(range(args.num_runs), desc="Timing", unit="turn"):
            for objective in args.objective:
                for cache in ("empty", "filled"):
                    script = ROOT / f"{OBJECTIVES[objective].module}.py"
                    argv = [sys.executable, str(script), "--do_train", "--max_steps", "1"]
                    flags = {
                        "config_name": f"{directory}/{objective}", "tokenizer_name": f"{directory}/{objective}",
                        "train_file": corpora[objective], "output_dir": f"{directory}/run-{objective}-{run}-{cache}",
                        "cache_dir": f"{directory}/data-{objective}-{run}-{cache}", "logging_steps": 1,
                        "block_size" if objective == "clm" else "max_seq_length": 128,
                    }  # fmt: skip
                    argv += [part for name, value in flags.items() for part in (f"--{name}", str(value))]
                    environment = os.environ | {
                        "JAX_COMPILATION_CACHE_DIR": f"{directory}/compiled-{objective}-{run}",
                        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
                    }
                    found.setdefault((objective, cache), []).append(seconds_to_marks(argv, environment))
    print(f"{cpu_name()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f} at the end; seconds since the start, medians")
    print(f"{'':6s}{'cache':>8s}{''.join(f'{name:>18s}' for name in MARKS)}{'min':>8s}{'max':>8s}")
    for (objective, cache), runs in found.items():
        medians = [statistics.median(run[name] for run in runs) for name in MARKS]
        last = [run["first step"] for run in runs]
        print(f"{objective:6s}{cache:>8s}{''.join(f'{m:18.1f}' for m in medians)}{min(last):8.1f}{max(last):8.1f}")
    if args.json:
        figures = [{"objective": objective, "cache": cache, "runs": runs} for (objective, cache), runs in found.items()]
        args.json.write_text(json.dumps(figures, indent=4) + "\n")


if __name__ == "__main__":
    main()
