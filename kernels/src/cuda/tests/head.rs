//! Partial log-sum-exps against the CPU backend: bit by bit in f32; in bf16 the fold of the fused kernels against the
//! fold of stored logits, bit by bit, and those against the CPU's.

use ctq_model::matrix::Code;

use super::*;
use crate::Compute;
use crate::backend::Treatment;
use crate::cpu::{self, CpuBuffer, CpuMatrix, CpuOperand, Isa};
use crate::cuda::LinearPath;
use crate::cuda::elementwise::samples::devices;
use crate::cuda::emulated::{Dense, Emulated, Warpgroups};
use crate::cuda::matrix::packed::{MXFP8, NVFP4, Random, Scheme, dense, group, integer, operand, tiled};

const K: usize = 130;
const N: usize = 420;

fn inputs(rows: usize, compute: Compute) -> CpuOperand {
    let values = Random::new(3).floats(rows * K).iter().map(|x| x * 2.0).collect();
    cpu::quantize::prepare(
        Isa::detect(),
        &CpuBuffer { width: K, values },
        &Treatment::Plain,
        compute,
        std::slice::from_ref(&(0..rows)),
    )
}

/// Targets inside and outside, and rows without one.
fn targets(rows: usize) -> Vec<Option<u32>> {
    (0..rows).map(|row| (row % 5 != 4).then_some((row * 37 % N) as u32)).collect()
}

fn on_the_cpu(x: &CpuOperand, scheme: Scheme, held: Range<usize>, part: Range<usize>) -> HeadTiles {
    let matrix = CpuMatrix::new(&tiled(N, K, scheme, 11), held);
    cpu::head::head(Isa::detect(), x, &matrix, part, &targets(x.rows())).expect("partials")
}

fn on_the_device(
    cuda: &Cuda<Emulated>,
    x: &CpuOperand,
    scheme: Scheme,
    held: Range<usize>,
    part: Range<usize>,
    compute: Compute,
) -> HeadTiles {
    let device = cuda.device();
    let matrix = CudaMatrix::upload(device, &tiled(N, K, scheme, 11), held).expect("a matrix");
    head(cuda, &operand(device, x, compute), &matrix, part, &targets(x.rows())).expect("partials")
}

fn same(found: &HeadTiles, expected: &HeadTiles, what: &str) {
    assert_eq!(found.tiles, expected.tiles, "{what}");
    assert_eq!(found.partials.len(), expected.partials.len(), "{what}");
    for (a, b) in found.partials.iter().zip(&expected.partials) {
        let same = (a.0.to_bits() == b.0.to_bits() && a.1.to_bits() == b.1.to_bits())
            || (a.0.is_nan() && b.0.is_nan() && a.1.is_nan() && b.1.is_nan());
        assert!(same, "{what}: {a:?}, expected {b:?}");
    }
    let bits = |tiles: &HeadTiles| tiles.targets.iter().map(|t| t.map(f32::to_bits)).collect::<Vec<_>>();
    assert_eq!(bits(found), bits(expected), "{what}");
}

/// Rows that are held, and a part of them.
const PARTS: [(Range<usize>, Range<usize>); 3] = [(0..N, 0..N), (128..N, 128..200), (256..300, 0..44)];

#[test]
fn f32_partials_have_the_bits_of_the_cpu() {
    for device in devices() {
        let cuda = Cuda::new(device);
        for scheme in [dense(Code::Bf16), integer(4, group(32)).permuted()] {
            let x = inputs(70, Compute::F32);
            let mut values = x.values();
            values[3 * K] = f32::NAN;
            values[4 * K] = f32::INFINITY;
            values[5 * K..6 * K].fill(0.0);
            let x = x.with_values(Isa::detect(), &values);
            for (held, part) in PARTS {
                let expected = on_the_cpu(&x, scheme, held.clone(), part.clone());
                let found = on_the_device(&cuda, &x, scheme, held, part, Compute::F32);
                let is_nan = |target: &Option<f32>| target.is_some_and(f32::is_nan);
                assert!(found.targets.iter().zip(&expected.targets).all(|(a, b)| is_nan(a) == is_nan(b)));
                let without_nan = |mut tiles: HeadTiles| {
                    tiles
                        .targets
                        .iter_mut()
                        .filter(|target| is_nan(target))
                        .for_each(|target| *target = None);
                    tiles
                };
                same(&without_nan(found), &without_nan(expected), &format!("{scheme:?}"));
            }
        }
    }
}

/// Every class of codes that the fused kernels have; scales inside a slice; act-order.
fn bf16_schemes() -> Vec<Scheme> {
    let mut all =
        vec![integer(4, group(32)).permuted(), integer(8, group(64)), integer(4, group(5)), NVFP4, MXFP8];
    all.extend([Code::Bf16, Code::F16, Code::F32].map(dense));
    all
}

#[test]
fn bf16_partials_are_those_of_the_logits() {
    for (device, schemes) in devices().zip(bf16_schemes().chunks(2)) {
        check_bf16_partials(&Cuda::new(device), schemes, 141);
    }
}

#[test]
fn partials_on_warpgroups_are_those_of_the_logits() {
    for (device, schemes) in devices().zip(bf16_schemes().chunks(2)) {
        let cuda = Cuda::new(device.with_warpgroups(Warpgroups::Present));
        check_bf16_partials(&cuda.with_linears(Some(LinearPath::Hopper)), schemes, 270);
    }
}

fn check_bf16_partials(cuda: &Cuda<Emulated>, schemes: &[Scheme], rows: usize) {
    for scheme in schemes {
        let x = inputs(rows, Compute::Bf16);
        for (held, part) in PARTS {
            let expected = on_the_cpu(&x, *scheme, held.clone(), part.clone());
            let found = on_the_device(cuda, &x, *scheme, held.clone(), part.clone(), Compute::Bf16);
            close(&found, &expected, &format!("{scheme:?}"));
            // The same logits through memory.
            let device = cuda.device();
            let matrix = CudaMatrix::upload(device, &tiled(N, K, *scheme, 11), held).expect("a matrix");
            let operand = operand(device, &x, Compute::Bf16);
            let input = Input::new(device, &operand, &matrix).expect("an input");
            let inside: Vec<Option<usize>> = targets(x.rows())
                .iter()
                .map(|t| t.map(|t| t as usize).filter(|t| part.contains(t)).map(|t| t - part.start))
                .collect();
            let partials = Partials::new(device, x.rows(), &inside, found.tiles).expect("room");
            let stored = Stored { tokens: 60, columns: 256 };
            partials.fold_stored(cuda, &input, &matrix, part, stored).expect("partials");
            same(&partials.download(device, &inside).expect("partials"), &found, &format!("{scheme:?}"));
        }
    }
}

fn close(found: &HeadTiles, expected: &HeadTiles, what: &str) {
    assert_eq!((found.tiles, found.partials.len()), (expected.tiles, expected.partials.len()), "{what}");
    for (a, b) in found.partials.iter().zip(&expected.partials) {
        let size = b.0.abs().max(1.0);
        let apart = (a.0 - b.0).abs();
        assert!(apart < 1e-4 * size, "{what}: {a:?}, expected {b:?}");
        let sum = |(largest, sum): &(f32, f64)| f64::from(*largest) + sum.ln();
        assert!((sum(a) - sum(b)).abs() < 1e-4 * f64::from(size), "{what}: {a:?}, expected {b:?}");
    }
    for (a, b) in found.targets.iter().zip(&expected.targets) {
        let near = match (a, b) {
            (None, None) => true,
            (Some(a), Some(b)) => (a - b).abs() < 1e-4 * b.abs().max(1.0),
            (None, Some(_)) | (Some(_), None) => false,
        };
        assert!(near, "{what}: target {a:?}, expected {b:?}");
    }
}

#[test]
fn rows_that_begin_inside_a_tile_are_folded_from_memory() {
    for device in devices() {
        let cuda = Cuda::new(device.with_dense_product(Dense::Present));
        let x = inputs(5, Compute::Bf16);
        let expected = on_the_cpu(&x, NVFP4, 16..N, 128..N - 16);
        let found = on_the_device(&cuda, &x, NVFP4, 16..N, 128..N - 16, Compute::Bf16);
        close(&found, &expected, "rows from 16");
    }
}

#[test]
fn no_tokens_and_no_vocabulary_have_no_partials() {
    let cuda = Cuda::new(Emulated::new(crate::cuda::emulated::Schedule::ALL[0]));
    let none = on_the_device(&cuda, &inputs(0, Compute::Bf16), NVFP4, 0..N, 0..N, Compute::Bf16);
    assert!(none.partials.is_empty() && none.targets.is_empty());
    let empty = on_the_device(&cuda, &inputs(3, Compute::F32), NVFP4, 0..N, 0..0, Compute::F32);
    assert!(empty.partials.is_empty() && empty.targets == [None; 3]);
}
