"""The source of the b200_* kernels, to compile them again: python b200_kernels.py NAME TARGET.txtpb DIRECTORY.

No GPU is needed, but the packages jax-cuda13-plugin and jax-cuda13-pjrt; the target is XLA's description of a B200. The
dumps kept here are the .ptx without .loc and .file lines, and of the .mlir-passes.log the host function.
"""

import os
import sys

NAME, TARGET, DIRECTORY = sys.argv[1:]
os.environ.update(
    JAX_PLATFORMS="cpu", JAX_SKIP_CUDA_CONSTRAINTS_CHECK="1", MOSAIC_GPU_DUMP_TO=os.path.abspath(DIRECTORY)
)

import jax  # noqa: E402
import jax.experimental.pallas as pl  # noqa: E402
import jax.experimental.pallas.mosaic_gpu as plgpu  # noqa: E402
import jax.numpy as jnp  # noqa: E402
from jax import lax  # noqa: E402
from jax.experimental import topologies  # noqa: E402

M, K, TK = 128, 256, 64
BF16 = jnp.bfloat16


def smem(*shape, swizzle=128):
    transforms = (plgpu.TilingTransform((8, swizzle // 2)), plgpu.SwizzleTransform(swizzle))
    return plgpu.SMEM(shape, BF16, transforms=transforms)


def simple(a_is_km, b_is_kn, a_in_tensor_memory=False, swizzle=128, n=128):
    """One warpgroup, one step after the other."""

    def kernel(a_gmem, b_gmem, out_gmem, scratch):
        a_smem, b_smem, acc_smem, acc_tmem, *a_tmem, copied, multiplied = scratch
        for k in range(K // TK):
            ks = pl.ds(k * TK, TK)
            plgpu.copy_gmem_to_smem(a_gmem.at[ks, :] if a_is_km else a_gmem.at[:, ks], a_smem, copied)
            plgpu.copy_gmem_to_smem(b_gmem.at[ks, :] if b_is_kn else b_gmem.at[:, ks], b_smem, copied)
            plgpu.barrier_wait(copied)
            a = plgpu.transpose_ref(a_smem, (1, 0)) if a_is_km else a_smem
            if a_in_tensor_memory:
                plgpu.async_store_tmem(a_tmem[0], plgpu.load(a_smem, layout=plgpu.Layout.TCGEN05))
                plgpu.commit_tmem()
                a = a_tmem[0]
            b = b_smem if b_is_kn else plgpu.transpose_ref(b_smem, (1, 0))
            plgpu.tcgen05_mma(acc_tmem, a, b, multiplied, accumulate=k > 0)
            plgpu.barrier_wait(multiplied)
        acc_smem[...] = plgpu.async_load_tmem(acc_tmem).astype(BF16)
        plgpu.wait_load_tmem()
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(acc_smem, out_gmem)
        plgpu.wait_smem_to_gmem(0)

    scratch = [
        smem(*((TK, M) if a_is_km else (M, TK)), swizzle=swizzle),
        smem(*((TK, n) if b_is_kn else (n, TK)), swizzle=swizzle),
        smem(M, n, swizzle=swizzle),
        plgpu.TMEM((M, n), jnp.float32),
        *([plgpu.TMEM((M, TK), BF16, packed=True)] if a_in_tensor_memory else []),
        plgpu.Barrier(num_arrivals=2),
        plgpu.Barrier(orders_tensor_core=True),
    ]
    out = jax.ShapeDtypeStruct((M, n), BF16)
    shapes = [(K, M) if a_is_km else (M, K), (K, n) if b_is_kn else (n, K)]
    return plgpu.kernel(kernel, out_type=out, scratch_types=[scratch]), shapes


def warp_specialized(n=256, tile=64, buffers=2):
    """A warp that copies, one that multiplies and a warpgroup that stores; persistent over tiles of the result."""
    steps = K // TK

    def kernel(a_gmem, b_gmem, out_gmem, a_smem, b_smem, acc_smem, acc_tmem, full, consumed, done, free):
        group = lax.axis_index("wg")

        @pl.when(group == 0)
        def _():
            @plgpu.warp_map
            def _per_warp(warp):
                @pl.when(warp == 0)
                def _():
                    def copy(i, _):
                        tile_index, k, slot = i // steps, i % steps, lax.rem(i, buffers)

                        @pl.when(i >= buffers)
                        def _():
                            plgpu.barrier_wait(consumed.at[slot])

                        ks, columns = pl.ds(k * TK, TK), pl.ds(tile_index * tile, tile)
                        plgpu.copy_gmem_to_smem(a_gmem.at[:, ks], a_smem.at[slot], full.at[slot])
                        plgpu.copy_gmem_to_smem(b_gmem.at[ks, columns], b_smem.at[slot], full.at[slot])

                    lax.fori_loop(0, n // tile * steps, copy, None)

                @pl.when(warp == 1)
                def _():
                    def multiply(i, _):
                        tile_index, k, slot = i // steps, i % steps, lax.rem(i, buffers)
                        which = lax.rem(tile_index, 2)

                        @pl.when(jnp.logical_and(k == 0, tile_index > 1))
                        def _():
                            plgpu.barrier_wait(free.at[which])

                        plgpu.barrier_wait(full.at[slot])
                        acc = acc_tmem.at[:, pl.ds(which * tile, tile)]
                        plgpu.tcgen05_mma(acc, a_smem.at[slot], b_smem.at[slot], consumed.at[slot], accumulate=k > 0)

                        @pl.when(k == steps - 1)
                        def _():
                            plgpu.tcgen05_commit_arrive(done.at[which])

                    lax.fori_loop(0, n // tile * steps, multiply, None)

        @pl.when(group == 1)
        def _():
            def store(tile_index, _):
                which = lax.rem(tile_index, 2)
                plgpu.barrier_wait(done.at[which])
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                acc_smem[...] = plgpu.async_load_tmem(acc_tmem.at[:, pl.ds(which * tile, tile)]).astype(BF16)
                plgpu.commit_smem()
                plgpu.copy_smem_to_gmem(acc_smem, out_gmem.at[:, pl.ds(tile_index * tile, tile)])
                plgpu.wait_load_tmem()
                plgpu.barrier_arrive(free.at[which])

            lax.fori_loop(0, n // tile, store, None)
            plgpu.wait_smem_to_gmem(0)

    call = plgpu.kernel(
        kernel,
        out_type=jax.ShapeDtypeStruct((M, n), BF16),
        num_threads=2,
        thread_name="wg",
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Warpgroup),
        scratch_types=[
            smem(buffers, M, TK),
            smem(buffers, TK, tile),
            smem(M, tile),
            plgpu.TMEM((M, 2 * tile), jnp.float32),
            plgpu.Barrier(num_arrivals=2, num_barriers=buffers),
            plgpu.Barrier(num_barriers=buffers, orders_tensor_core=True),
            plgpu.Barrier(num_barriers=2, orders_tensor_core=True),
            plgpu.Barrier(num_barriers=2, orders_tensor_core=True),
        ],
    )
    return call, [(M, K), (K, n)]


call, shapes = {
    "b200_b_k_major": lambda: simple(False, False),
    "b200_b_n_major": lambda: simple(False, True),
    "b200_transposed_a_swizzle_64": lambda: simple(True, True, swizzle=64),
    "b200_a_in_tensor_memory": lambda: simple(False, False, a_in_tensor_memory=True),
    "b200_warp_specialized": warp_specialized,
}[NAME]()
with open(TARGET) as file:
    topology = topologies.get_topology_desc(
        platform="cuda", topology_name="", target_config=file.read(), topology="1x1x1"
    )
device = topologies.make_mesh(topology, (1,), ("x",)).devices.flat[0]
with jax.default_device(device):
    arguments = [jax.ShapeDtypeStruct(shape, BF16) for shape in shapes]
    jax.jit(call).trace(*arguments).lower(lowering_platforms=("cuda",)).compile()
