# SPDX-License-Identifier: Apache-2.0
"""The clock of training, and advice about the machine."""

import time

import pytest

from flaxlm import cli, logs


def test_stopwatch_leaves_out_the_stops():
    watch = logs.Stopwatch()
    watch.start()
    time.sleep(0.05)
    watch.stop()
    time.sleep(0.2)
    watch.start()
    assert 0.05 <= watch.seconds() < 0.15


@pytest.mark.parametrize(("cpuinfo", "warned"), [("flags : avx2 avx512_bf16", False), ("Features : asimd", True)])
def test_bfloat16_without_instructions_for_it(cpuinfo, warned, monkeypatch, caplog):
    monkeypatch.setattr(logs.sys, "platform", "linux")
    monkeypatch.setattr(logs.Path, "exists", lambda path: False)
    monkeypatch.setattr(logs.Path, "read_text", lambda path: cpuinfo)
    monkeypatch.setattr(cli.logger, "propagate", True)
    logs.advise_on_cpu("bfloat16")
    assert ("saves memory but no time" in caplog.text) == warned
    caplog.clear()
    logs.advise_on_cpu("float32")
    assert not caplog.text
