"""True bits of a plan, against sums written out by hand."""

from __future__ import annotations

import pytest
from cached import cached_program

from kvxform.evaluate.footprint import bits_at, measure_footprint
from kvxform.evaluate.peers import PEERS

INT4 = {"codec": "int", "bits": 4, "axis": "token", "symmetric": False}


def plan_of(**options):
    program = cached_program({"key": INT4, "value": INT4, **options})
    return program.plan, program.plan.sites[0].key.head_dim


def test_regions_count_with_sixteen_bits():
    plan, dim = plan_of(regions={"sink": 4, "recent": 12})
    body = 4 + 32 / dim
    assert plan.bits_per_value == body
    assert bits_at(plan, 100) == pytest.approx((84 * body + 16 * 16) / 100)
    assert bits_at(plan, 10) == 16


def test_streams_with_rules_of_their_own_are_added_up():
    channel = {"codec": "int", "bits": 4, "axis": "channel", "group": 16}
    plan, dim = plan_of(key=channel, key_regions={"recent": 32})
    key = (32 * 3 * 6 + 4 * 16) / 100  # 96 of 100 tokens in blocks of 32, 4 + 32 / 16 bits each
    assert bits_at(plan, 100) == pytest.approx((key + 4 + 32 / dim) / 2)


def test_footprint_has_whole_pages_in_its_bytes():
    plan, _ = plan_of()
    found = measure_footprint(plan, 100)
    assert found.bits_short == found.bits_long
    assert found.bytes_short == plan.bytes_at([100], 100) == plan.page_bytes(16) * 7


def test_exact_tokens_of_peers():
    peer = PEERS["hf-quanto-4"]
    assert peer.bits_per_value == 4.5
    assert [peer.exact_tokens(n) for n in (1, 2, 128, 129, 1024)] == [0, 1, 127, 0, 127]
