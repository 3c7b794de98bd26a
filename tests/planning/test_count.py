"""FLOPs, memory traffic and bytes sent of programs for which they can be computed by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from gemma2_jax.planning.collectives import axes_of, group_of, sent_bytes
from gemma2_jax.planning.count import count
from gemma2_jax.planning.hlo import read_program

SHAPE = {"data": 2, "tensor": 4}


def costs(function, *arrays, shape=SHAPE):
    text = jax.jit(function).lower(*arrays).compile().as_text()
    assert text is not None
    return count(read_program(text), shape)


def array(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.float32)


@pytest.fixture(scope="module")
def mesh():
    return Mesh(np.array(jax.devices()).reshape(2, 4), tuple(SHAPE), axis_types=(AxisType.Auto,) * 2)


def test_a_product_in_a_loop_is_multiplied_by_the_trip_count():
    def loop(x, weights):
        return jax.lax.scan(lambda carry, weight: (jnp.tanh(carry @ weight), None), x, weights)[0]

    cost = costs(loop, array(64, 32), array(13, 32, 32))
    assert cost.flops == 13 * 2 * 64 * 32 * 32
    assert cost.uncounted == 0
    # Each iteration reads one of the thirteen weights, not the whole stack.
    least = 13 * 4 * (32 * 32 + 2 * 64 * 32)
    assert least <= cost.bytes <= 4 * least


def test_loops_multiply():
    def inner(x):
        return jax.lax.fori_loop(0, 5, lambda _, y: jnp.tanh(y @ y), x)

    cost = costs(lambda x: jax.lax.fori_loop(0, 3, lambda _, y: inner(y), x), array(48, 48))
    assert cost.flops == 15 * 2 * 48**3


def test_a_sum_over_one_axis_of_the_mesh(mesh):
    def total(x):
        return jax.lax.psum(x, "tensor")

    spec = PartitionSpec("tensor", "data")
    summed = jax.shard_map(total, mesh=mesh, in_specs=spec, out_specs=PartitionSpec(None, "data"))
    cost = costs(summed, jax.ShapeDtypeStruct((4, 6), jnp.float32, sharding=NamedSharding(mesh, spec)))
    # Each device sums 3 numbers with those of 3 others; in a ring it sends 2 * 3/4 of their bytes.
    assert dict(cost.sent) == {("all-reduce", ("tensor",)): 2 * 3 / 4 * 12}


def test_a_weight_that_is_gathered_in_a_loop(mesh):
    def loop(x, weights):
        def body(carry, weight):
            whole = jax.lax.with_sharding_constraint(weight, NamedSharding(mesh, PartitionSpec()))
            return jnp.tanh(carry @ whole), None

        return jax.lax.scan(body, x, weights)[0]

    weights = jax.ShapeDtypeStruct(
        (5, 16, 16), jnp.float32, sharding=NamedSharding(mesh, PartitionSpec(None, "data"))
    )
    x = jax.ShapeDtypeStruct((8, 16), jnp.float32, sharding=NamedSharding(mesh, PartitionSpec("tensor")))
    cost = costs(loop, x, weights)
    assert cost.sent["all-gather", ("data",)] == 5 * (16 * 16 * 4) / 2
    assert cost.flops == 5 * 2 * (8 // 4) * 16 * 16


PROGRAM = """
HloModule hand_made

%fused (p: bf16[8,16]) -> bf16[8,16] {
  %p = bf16[8,16]{1,0:T(8,128)} parameter(0)
  ROOT %t = bf16[8,16]{1,0:T(8,128)} tanh(%p)
}

%condition (c: (s32[], bf16[8,16])) -> pred[] {
  %c = (s32[], bf16[8,16]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%c), index=0
  %limit = s32[] constant(7)
  ROOT %less = pred[] compare(%i, %limit), direction=LT
}

%body (b: (s32[], bf16[8,16])) -> (s32[], bf16[8,16]) {
  %b = (s32[], bf16[8,16]{1,0}) parameter(0)
  %i.1 = s32[] get-tuple-element(%b), index=0
  %x = bf16[8,16]{1,0} get-tuple-element(%b), index=1
  %start = (bf16[8,16]{1,0}, bf16[32,16]{1,0:T(8,128)}) all-gather-start(%x), replica_groups=[2,4]<=[8]
  %done = bf16[32,16]{1,0} all-gather-done(%start)
  %w = bf16[16,16]{1,0:T(8,128)(2,1)S(1)} constant({...})
  %conv = bf16[32,16]{1,0} convolution(%done, %w), dim_labels=bf_io->bf
  %batched = f32[4,8,16]{2,1,0} convolution(%q, %k), window={size=4 stride=3 lhs_dilate=4}, dim_labels=0bf_0io->0bf
  %q = f32[4,8,32]{2,1,0} constant({...})
  %k = f32[4,32,16]{2,1,0} constant({...})
  %kernel = f32[8]{0} custom-call(%x), custom_call_target="tpu_custom_call"
  %one = s32[] constant(1)
  %next = s32[] add(%i.1, %one)
  ROOT %r = (s32[], bf16[8,16]{1,0}) tuple(%next, %x)
}

ENTRY %main (a: bf16[8,16]) -> bf16[8,16] {
  %a = bf16[8,16]{1,0} parameter(0)
  %zero = s32[] constant(0)
  %init = (s32[], /*index=1*/bf16[8,16]{1,0}) tuple(%zero, %a)
  %loop = (s32[], bf16[8,16]{1,0}) while(%init), condition=%condition, body=%body
  %y = bf16[8,16]{1,0} get-tuple-element(%loop), index=1
  ROOT %f = bf16[8,16]{1,0} fusion(%y), kind=kLoop, calls=%fused
}
"""


def test_a_program_of_the_tpu_compiler():
    cost = count(read_program(PROGRAM), SHAPE)
    # A plain product, and one whose batch of 4 is a spatial dimension with 4 valid positions of 16.
    assert cost.flops == 7 * (2 * 32 * 16 * 16 + 2 * 4 * 8 * 32 * 16)
    assert dict(cost.sent) == {("all-gather", ("tensor",)): 7 * 32 * 16 * 2 * 3 / 4}
    assert dict(cost.kernels) == {"tpu_custom_call": 7}


def test_a_fusion_moves_only_inputs_and_outputs_and_on_chip_memory_is_free():
    text = PROGRAM.replace("constant(7)", "constant(0)")
    assert count(read_program(text), SHAPE).bytes == 2 * (8 * 16 * 2)
    inside = text.replace("ROOT %f = bf16[8,16]{1,0} fusion", "ROOT %f = bf16[8,16]{1,0:S(1)} fusion")
    assert count(read_program(inside), SHAPE).bytes == 8 * 16 * 2


def test_a_counter_that_the_compiler_raises_by_two():
    assert count(
        read_program(PROGRAM.replace("%one = s32[] constant(1)", "%one = s32[] constant(2)")), SHAPE
    ).kernels == {"tpu_custom_call": 4}
    begun = PROGRAM.replace("%zero = s32[] constant(0)", "%zero = s32[] constant(5)")
    assert count(read_program(begun), SHAPE).kernels == {"tpu_custom_call": 2}


SCATTER = """
HloModule written_in_place

%add (a: s8[], b: s8[]) -> s8[] {
  %a = s8[] parameter(0)
  ROOT %b = s8[] parameter(1)
}

%fused (p: s8[4,1000,16], i: s32[2,2], u: s8[2,16]) -> s8[4,1000,16] {
  %p = s8[4,1000,16]{2,1,0} parameter(0)
  %i = s32[2,2]{1,0} parameter(1)
  %u = s8[2,16]{1,0} parameter(2)
  ROOT %s = s8[4,1000,16]{2,1,0} scatter(%p, %i, %u), update_window_dims={1}, to_apply=%add
}

ENTRY %main (cache: s8[4,1000,16], at: s32[2,2], new: s8[2,16]) -> s8[4,1000,16] {
  %cache = s8[4,1000,16]{2,1,0} parameter(0)
  %at = s32[2,2]{1,0} parameter(1)
  %new = s8[2,16]{1,0} parameter(2)
  %first = s8[4,1000,16]{2,1,0} fusion(%cache, %at, %new), kind=kCustom, calls=%fused
  ROOT %second = s8[4,1000,16]{2,1,0} scatter(%first, %at, %new), update_window_dims={1}, to_apply=%add
}
"""


def test_a_scatter_moves_what_it_writes():
    """Within a fusion, it reads indices and update, and writes the update; alone, it reads and writes the update."""
    assert count(read_program(SCATTER), {}).bytes == (16 + 32 + 32) + 2 * 32


def test_attributes_may_span_several_lines():
    text = PROGRAM.replace(
        'custom_call_target="tpu_custom_call"', 'custom_call_target="tpu_custom_call", x={\n"y": {\n}\n}'
    )
    assert count(read_program(text), SHAPE).sent == count(read_program(PROGRAM), SHAPE).sent


ASYNCHRONOUS = """
%begin (p: f32[2]) -> (f32[2], f32[8]) {
  %p = f32[2]{0} parameter(0)
  %g = f32[8]{0} all-gather(%p), channel_id=3, replica_groups=[2,4]<=[8], dimensions={0}
  ROOT %c = (f32[2]{0}, f32[8]{0}) custom-call(%g), custom_call_target="AsyncCollectiveStart"
}

%end (p.1: f32[2], q: f32[8]) -> f32[8] {
  %p.1 = f32[2]{0} parameter(0)
  %q = f32[8]{0} parameter(1)
  %g.1 = f32[8]{0} all-gather(%p.1), channel_id=3, replica_groups=[2,4]<=[8], dimensions={0}
  ROOT %c.1 = f32[8]{0} custom-call(%q, %g.1), custom_call_target="AsyncCollectiveDone"
}

ENTRY %main (a: f32[2]) -> f32[8] {
  %a = f32[2]{0} parameter(0)
  %f = (f32[2]{0}, f32[8]{0}) fusion(%a), kind=kCustom, calls=%begin
  %x = f32[2]{0} get-tuple-element(%f), index=0
  %y = f32[8]{0} get-tuple-element(%f), index=1
  ROOT %r = f32[8]{0} fusion(%x, %y), kind=kCustom, calls=%end
}
"""


def test_a_collective_that_goes_on_through_fusions_counts_once():
    assert dict(count(read_program(ASYNCHRONOUS), SHAPE).sent) == {("all-gather", ("tensor",)): 3 / 4 * 32}


def test_a_loop_of_unknown_length_is_counted_once_and_reported():
    cost = count(read_program(PROGRAM.replace("constant(7)", "parameter(1)")), SHAPE)
    assert cost.uncounted == 1
    assert cost.kernels["tpu_custom_call"] == 1


@pytest.mark.parametrize(
    ("groups", "group", "axes"),
    [
        ("replica_groups={{0,1,2,3},{4,5,6,7}}", [0, 1, 2, 3], ("tensor",)),
        ("replica_groups=[2,4]<=[8]", [0, 1, 2, 3], ("tensor",)),
        ("replica_groups=[4,2]<=[2,4]T(1,0)", [0, 4], ("data",)),
        ("replica_groups=[1,8]<=[8]", list(range(8)), ("data", "tensor")),
        ("replica_groups=mesh['a'=2,'b'=4] {'a'}", [0, 4], ("data",)),
        ("replica_groups=mesh['a'=2,'b'=4] {'b':(1)2}", [0, 2], ("tensor",)),
        ("replica_groups=mesh['a'=2,'b'=4] {'b':(2)2}", [0, 1], ("tensor",)),
        ("source_target_pairs={{0,4},{4,0},{1,5},{5,1}}", [0, 4], ("data",)),
        ("replica_groups={}", list(range(8)), ("data", "tensor")),
    ],
)
def test_groups_of_every_form(groups, group, axes):
    text = f"ENTRY %e (a: f32[2]) -> f32[2] {{\n  ROOT %r = f32[2]{{0}} all-reduce(%a), {groups}, to_apply=%add\n}}\n"
    instruction = read_program(text).computations["e"].instructions["r"]
    assert group_of(instruction, 8) == group
    assert axes_of(group, SHAPE) == axes


def test_bytes_sent_in_a_ring():
    assert sent_bytes("all-gather", input_bytes=10, output_bytes=40, count=4) == 30
    assert sent_bytes("all-reduce", input_bytes=40, output_bytes=40, count=4) == 60
    assert sent_bytes("reduce-scatter", input_bytes=40, output_bytes=10, count=4) == 30
    assert sent_bytes("collective-permute", input_bytes=40, output_bytes=40, count=4) == 40
    assert sent_bytes("all-reduce", input_bytes=40, output_bytes=40, count=1) == 0
