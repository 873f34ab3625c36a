# SPDX-License-Identifier: Apache-2.0
"""Named streams of random numbers."""

from flaxlm import randomness


def test_streams_of_random_numbers_differ():
    draws = [randomness.host_rng(1, *stream).random() for stream in (("a",), ("b",), ("a", 0), ("a", 1))]
    draws += [randomness.host_rng(2, "a").random()]
    assert len(set(draws)) == 5
    assert randomness.host_rng(1, "a").random() == draws[0]
