"""Collectives and loops read from the text of programs: one written by hand, and one that XLA compiled."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from fedvlm_jax.analysis.collectives import Collective, find_collectives, read_groups

TEXT = """HloModule made_up, num_partitions=8

%add (x: f32[], y: f32[]) -> f32[] {
  %x = f32[] parameter(0)
  %y = f32[] parameter(1)
  ROOT %sum = f32[] add(%x, %y)
}

%inside (p: bf16[16,32]) -> bf16[8,32] {
  %p = bf16[16,32]{1,0:T(8,128)(2,1)} parameter(0)
  %hidden = bf16[16,32]{1,0} all-reduce(%p), channel_id=3, replica_groups=[4,2]<=[8], to_apply=%add
  ROOT %cut = bf16[8,32]{1,0} slice(%hidden), slice={[0:8], [0:32]}
}

%body (state: (s32[], f32[16], f32[16])) -> (s32[], f32[16], f32[16]) {
  %state = (s32[], f32[16]{0}, f32[16]{0:S(1)}) parameter(0)
  %i = s32[] get-tuple-element(%state), index=0
  %one = s32[] constant(1)
  %next = s32[] add(%i, %one)
  %v = f32[16]{0} get-tuple-element(%state), index=1
  %near = f32[16]{0:S(1)} get-tuple-element(%state), index=2
  %told = f32[16]{0} all-reduce(%v), replica_groups={{0,1},{2,3},{4,5},{6,7}}, to_apply=%add
  %far = f32[16]{0:S(1)} negate(%near), backend_config={"window_config":{"estimated_cycles":"100"}}
  ROOT %out = (s32[], f32[16]{0}, f32[16]{0:S(1)}) tuple(%next, %told, %far)
}

%until (state.1: (s32[], f32[16], f32[16])) -> pred[] {
  %state.1 = (s32[], f32[16]{0}, f32[16]{0:S(1)}) parameter(0)
  %i.1 = s32[] get-tuple-element(%state.1), index=0
  %last = s32[] constant(5)
  ROOT %less = pred[] compare(%i.1, %last), direction=LT
}

ENTRY %main (a: f32[16], b: bf16[16,32]) -> f32[64] {
  %a = f32[16]{0} parameter(0)
  %b = bf16[16,32]{1,0} parameter(1)
  %zero = s32[] constant(2)
  %start = (s32[], f32[16]{0}, f32[16]{0:S(1)}) tuple(%zero, %a, %a)
  %loop = (s32[], f32[16]{0}, f32[16]{0:S(1)}) while(%start), condition=%until, body=%body
  %r = f32[16]{0} get-tuple-element(%loop), index=1
  %fused = bf16[8,32]{1,0} fusion(%b), kind=kCustom, calls=%inside
  %begin = (f32[16]{0}, f32[64]{0}) all-gather-start(%r), replica_groups=mesh['a'=4,'b'=2] {'a'}, dimensions={0}
  %alone = f32[16]{0} all-reduce(%r), replica_groups={{0},{1},{2},{3},{4},{5},{6},{7}}, to_apply=%add
  ROOT %end = f32[64]{0} all-gather-done(%begin)
}
"""


class MadeMesh:
    """What a mesh tells of itself: devices [4, 2] with names for their axes."""

    devices = np.arange(8).reshape(4, 2)
    axis_names = ("clients", "model")


def test_collectives_of_a_program_written_by_hand():
    """Five turns of a sum of 64 bytes, and one hidden in a fusion; the one of single devices is none."""
    assert find_collectives(TEXT, MadeMesh) == (
        (
            Collective("all-gather", ("clients",), 4, 1, 256),
            Collective("all-reduce", ("model",), 2, 5 + 1, 5 * 64 + 2 * 16 * 32),
        ),
        0,
    )


def test_a_loop_whose_end_is_not_told_counts_once_and_is_reported():
    gathered, reduced = find_collectives(TEXT.replace("constant(5)", "parameter(1)"), MadeMesh)[0]
    assert (gathered.runs_per_round, reduced.runs_per_round) == (1, 1 + 1)
    assert find_collectives(TEXT.replace("constant(5)", "parameter(1)"), MadeMesh)[1] == 1


def test_what_a_compiler_counted_is_believed():
    text = TEXT.replace("body=%body", 'body=%body, backend_config={"known_trip_count":{"n":"7"}}')
    assert find_collectives(text, MadeMesh)[0][1].runs_per_round == 7 + 1


def test_a_reduce_scatter_hands_in_more_than_it_gets():
    """And a permutation that is started returns its operand, its result and two counters."""
    text = """ENTRY %main (a: f32[64]) -> f32[16] {
  %a = f32[64]{0} parameter(0)
  %start = (f32[64]{0}, f32[64]{0}, u32[], u32[]) collective-permute-start(%a), source_target_pairs={{0,2},{2,0}}
  %done = f32[64]{0} collective-permute-done(%start)
  ROOT %part = f32[16]{0} reduce-scatter(%done), replica_groups={{0,2,4,6},{1,3,5,7}}, dimensions={0}, to_apply=%add
}

%add (x: f32[], y: f32[]) -> f32[] {
  ROOT %sum = f32[] add(%x, %y)
}
"""
    (permuted, scattered), _ = find_collectives(text, MadeMesh)
    assert (permuted.kind, permuted.axes, permuted.bytes_per_round) == ("collective-permute", ("clients",), 4 * 64)
    assert (scattered.kind, scattered.axes, scattered.bytes_per_round) == ("reduce-scatter", ("clients",), 4 * 64)


@pytest.mark.parametrize(
    ("text", "groups"),
    [
        ("replica_groups={{0,2},{1,3}}, x", [[0, 2], [1, 3]]),
        ("replica_groups={}, x", [[0, 1, 2, 3]]),
        ("channel_id=1", [[0, 1, 2, 3]]),
        ("replica_groups=[2,2]<=[4], x", [[0, 1], [2, 3]]),
        ("replica_groups=[2,2]<=[2,2]T(1,0), x", [[0, 2], [1, 3]]),
        ("replica_groups=mesh['a'=2,'b'=2] {'a'}, x", [[0, 2], [1, 3]]),
        ("replica_groups=mesh['a'=2,'b'=2], device_ids=([2,2]T(1,0)) {'a'}, x", [[0, 1], [2, 3]]),
        ("source_target_pairs={{0,1},{1,0}}, x", [[0, 1], [1, 0]]),
    ],
)
def test_groups_in_all_their_notations(text, groups):
    assert sorted(read_groups(text, 4)) == groups


def test_an_unknown_notation_is_no_guess():
    with pytest.raises(ValueError, match="unknown way"):
        read_groups("replica_groups=everyone", 4)


def test_a_compiled_program_on_forced_devices():
    """A sum over clients in a scan of 3 turns and one over all devices after it, with the bytes that they must have."""
    script = Path(__file__).with_name("collectives_check.py")
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["unknown"] == 0
    assert sorted(
        (one["kind"], one["axes"], one["bytes_per_round"], one["runs_per_round"]) for one in found["collectives"]
    ) == [
        ("all-reduce", ["clients"], 3 * 4 * 24 * 40, 3),
        ("all-reduce", ["clients", "model"], 4 * 40, 1),
    ]
