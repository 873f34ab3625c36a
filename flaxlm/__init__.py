# SPDX-License-Identifier: Apache-2.0
"""What keeps the training scripts running. A script calls it; it never calls a script's loop.

Each module imports only those above it in this list (tests/test_house.py sees to it):

    cli          how a program talks and ends: flags, one line for a mistake, exit statuses, log, progress bars
    randomness   named streams of random numbers
    addresses    files on other machines, by address
    formats      text in files of several formats, read table by table
    inputs       which files a flag names: lists, patterns, directories, addresses
    files        text in files, and what is prepared of it; writing other files whole or not at all
    sentences    where the sentences of a text begin
    arguments    the flags that all training scripts share
    mixtures     several corpora by weights, and whose row comes next
    processes    several processes that train together, and being told to stop
    profiles     a trace of some steps
    reporters    where points of a run go: TensorBoard, Weights & Biases, Trackio
    outputs      what lies in output_dir, and whose it is
    sharding     what lies where on the devices, compiled steps, the state they update
    flops        how much arithmetic a function is
    machines     what a program can be compiled for, be it here or not
    repositories    files of a model in a directory or on the Hub, and why they cannot be read
    configurations  loading, changing and checking them
    tokenization    loading tokenizers, fitting a configuration to one
    token_ids    tokens that the data has already, instead of text
    layers       what models are made of, as it is fast
    positions    where tokens stand, and what attention makes of it
    attention    which tokens see which, and the ways to compute it
    losses       cross-entropy over a vocabulary
    models       the architectures, one family in a file
    layouts      names of weights, in Flax's and in PyTorch's layout
    weight_files  files of weights, here or on the Hub
    weights      fresh or from files, and saved
    text         the splits of a run as datasets
    token_rows   text tokenised, and cut or padded to rows
    infilling    texts rearranged, so that a model learns to fill in their middle
    streams      text read while training
    corpus       either of the two: the rows of a run
    batches      sizes, order, noise, and on to the devices
    optimizers   learning rate schedules, optimizers
    identity     what a run's result follows from, and what of it may differ in a resumed one
    selection    which evaluation was the best, and is it time to stop
    command_line  the command line of a training script, read and checked
    estimates    what a run would take of a machine
    logs         log lines, progress
    evaluation   exact over all rows
    generation   text that a model writes
    hub          uploads
    checkpoints  the training state on disk
    cards        run record, model card, curves
    runs         what a run keeps between steps, for the loop in a script

Shape letters at the end of names, outermost dimension first:

    A  micro-batches in one update      D  devices of this process      B  rows per device       N  rows
    T  tokens in a row                  V  vocabulary                   H  hidden size           C  tokens in a chunk
    K  labelled positions per device    F  features of a layer          M  heads of attention
    E  numbers in a head                S  tokens that are looked at    X, Y  any

A joined letter is a merged dimension: input_ids_NT holds N = A * D * B rows. Model inputs keep their transformers names.
"""

import os
import signal
import sys

__version__ = "0.5.0"

# The models are ours: transformers need not say at each start that PyTorch is missing.
os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")


def begin(version: str, script: str, as_program: bool) -> None:
    """First thing in a script: is this the version of the package that it was written for?

    As a program it also ends at Ctrl-C and SIGTERM from here on: the libraries take seconds to import, and jax swallows some
    interrupts.
    """
    name = os.path.basename(script)
    if version != __version__:
        place = os.path.dirname(os.path.abspath(__file__))
        advice = "install that one, from its clone with `pip install .`, or copy its folder flaxlm beside this script"
        print(f"{name}: error: needs the package flaxlm {version}, and {place} is {__version__}: {advice}", file=sys.stderr)
        raise SystemExit(2)
    if as_program:
        for signum in STATUS_BEFORE_TRAINING:
            signal.signal(signum, lambda signum, _: end_at_once(name, signum))


INTERRUPTED = "interrupted before training began; nothing to save"
# After SIGTERM not 143, with which runs end that have saved what they gained: who starts those again would start this one for
# ever where the time is too short. It is BSD's EX_TEMPFAIL: nothing is wrong, try it at another time.
NOTHING_GAINED = 75
STATUS_BEFORE_TRAINING = {signal.SIGINT: 128 + signal.SIGINT, signal.SIGTERM: NOTHING_GAINED}


def end_at_once(name: str, signum: int) -> None:
    """End the program here and now, with the exit status of one that has gained nothing."""
    os.write(2, f"{name}: {INTERRUPTED}\n".encode())
    os._exit(STATUS_BEFORE_TRAINING[signum])
