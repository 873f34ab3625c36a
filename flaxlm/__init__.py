# SPDX-License-Identifier: Apache-2.0
"""What keeps the training scripts running. A script calls it; it never calls a script's loop.

Each module imports only those above it in this list (tests/test_house.py sees to it):

    cli          how a program talks and ends: flags, one line for a mistake, exit statuses, log, progress bars
    randomness   named streams of random numbers
    files        formats of text and reading one; writing other files whole or not at all
    sentences    where the sentences of a text begin
    arguments    the flags that all training scripts share, their limits and checks
    processes    several processes that train together, and being told to stop
    sharding     mesh, compiled steps, the state they update
    pretrained   configuration and tokenizer
    layers       products, sums and dropout that are fast
    attention    attention without an array of [batch, heads, queries, keys]
    losses       cross-entropy over a vocabulary
    patches      what is done to transformers' Flax classes from outside
    weights      fresh or from a file, and saved, in Flax's and PyTorch's layout
    text         the splits of a run as datasets
    token_rows   text tokenised, and cut or padded to rows
    streams      text read while training
    corpus       either of the two: the rows of a run
    batches      sizes, order, noise, and on to the devices
    optimizers   learning rate schedules, optimizers
    outputs      what lies in output_dir
    logs         log lines, progress, TensorBoard
    evaluation   exact over all rows
    hub          uploads
    checkpoints  the training state on disk
    cards        run record, model card, curves
    runs         what a run keeps between steps, for the loop in a script

Shape letters at the end of names, outermost dimension first:

    A  micro-batches in one update      D  devices of this process      B  rows per device       N  rows
    T  tokens in a row                  V  vocabulary                   H  hidden size           C  tokens in a chunk
    K  labelled positions per device    F  features of a layer          X, Y  any

A joined letter is a merged dimension: input_ids_NT holds N = A * D * B rows. Model inputs keep their transformers names.
"""

__version__ = "0.2.0"
