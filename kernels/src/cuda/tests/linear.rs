//! Linears against the CPU backend bit by bit where operands are f32 or codes, against sums in f64 where they are bf16.

use std::num::NonZero;

use ctq_container::TiledMatrix;
use ctq_model::DType;
use ctq_model::matrix::{Code, Sharing};
use ctq_model::scheme::{Activation, ActivationScale, ActivationSharing};

use super::*;
use crate::backend::{Backend, Pieces, Quantizer, Treatment};
use crate::collective::team;
use crate::cpu::math::round_bf16;
use crate::cpu::{self, CpuBuffer, CpuMatrix, CpuOperand, Isa};
use crate::cuda::elementwise::samples::{devices, numbers, same_bits};
use crate::cuda::emulated::{Dense, Emulated, EmulatedMemory, Schedule, Warpgroups};
use crate::cuda::matrix::packed::{
    MXFP4, MXFP8, NVFP4, Random, Scheme, affine, dense as plain, group, integer, operand, schemes, tiled,
};

fn treated(rows: usize, k: usize, treatment: &Treatment, compute: Compute) -> CpuOperand {
    let mut values = Random::new(7).floats(rows * k);
    for (row, values) in values.chunks_exact_mut(k).enumerate() {
        values.iter_mut().for_each(|value| *value *= 3.0_f32.powi(row as i32 % 7 - 3));
    }
    let windows = [0..rows / 3, rows / 3..rows];
    cpu::quantize::prepare(Isa::detect(), &CpuBuffer { width: k, values }, treatment, compute, &windows)
}

/// Some of the rows of a plain operand.
fn part(x: &CpuOperand, rows: Range<usize>) -> CpuOperand {
    let k = x.strips.k;
    x.with_values(Isa::detect(), &x.values()[rows.start * k..rows.end * k])
}

fn on_the_device(
    cuda: &Cuda<Emulated>,
    x: &CpuOperand,
    matrix: &TiledMatrix,
    rows: Range<usize>,
    compute: Compute,
) -> Vec<f32> {
    let device = cuda.device();
    let held = CudaMatrix::upload(device, matrix, rows).expect("a matrix");
    let y = linear(cuda, &operand(device, x, compute), &held, None, compute).expect("a product");
    assert_eq!((y.rows, y.width), (x.rows(), held.rows.len()));
    y.download(device).expect("values")
}

fn on_the_cpu(x: &CpuOperand, matrix: &TiledMatrix, rows: Range<usize>) -> Vec<f32> {
    let held = CpuMatrix::new(matrix, rows.clone());
    cpu::linear::linear(Isa::detect(), x, &held, rows).expect("a product").values.clone()
}

fn first() -> Cuda<Emulated> {
    Cuda::new(Emulated::new(Schedule::ALL[0]))
}

#[test]
fn f32_products_of_every_scheme_have_the_bits_of_the_cpu() {
    let cuda = first();
    for (seed, scheme) in schemes().into_iter().enumerate() {
        let (n, k) = [(70, 97), (130, 200)][seed % 2];
        let matrix = tiled(n, k, scheme, seed as u64);
        let x = treated(9, k, &Treatment::Plain, Compute::F32);
        let rows = [0..n, 16..n, 48..n - 3][seed % 3].clone();
        let expected = on_the_cpu(&x, &matrix, rows.clone());
        let found = on_the_device(&cuda, &x, &matrix, rows, Compute::F32);
        same_bits(&found, &expected, &format!("{scheme:?}"));
    }
}

#[test]
fn f32_sums_have_the_blocks_of_the_cpu_at_every_width() {
    for (k, rows) in [(1, 3), (63, 1), (192, 130), (193, 5), (300, 5), (384, 5), (385, 5), (650, 131)] {
        let matrix = tiled(67, k, plain(Code::F32), k as u64);
        let x = treated(rows, k, &Treatment::Plain, Compute::F32);
        let expected = on_the_cpu(&x, &matrix, 0..67);
        for device in devices() {
            let found = on_the_device(&Cuda::new(device), &x, &matrix, 0..67, Compute::F32);
            same_bits(&found, &expected, &format!("k = {k}"));
        }
    }
}

fn exact(code: Code, symmetric: bool, sharing: ActivationSharing, scale: ActivationScale) -> Treatment {
    let activation = Activation { code, symmetric, sharing, scale };
    Treatment::Exact(Quantizer { activation, scales: vec![0.031], zero: 17.0, global_scale: 2_688.0 / 11.7 })
}

const INT8: Code = Code::Int { bits: 8 };
const TOKEN: ActivationSharing = ActivationSharing::Token;
const DYNAMIC: ActivationScale = ActivationScale::Dynamic;

fn integer_f32(bits: u8, sharing: Sharing) -> Scheme {
    affine(Code::Int { bits }, DType::F32, sharing)
}

/// Weights and treatments that have an exact product.
fn exact_pairs() -> Vec<(Scheme, Treatment)> {
    let groups = |size| ActivationSharing::Group { size };
    let block = Sharing::Block { rows: 40, columns: 32 };
    let mut pairs = Vec::new();
    for sharing in [TOKEN, groups(8), groups(64), ActivationSharing::Tensor] {
        for symmetric in [true, false] {
            let treatment = exact(INT8, symmetric, sharing, DYNAMIC);
            pairs.push((integer_f32(8, Sharing::Channel), treatment.clone()));
            pairs.push((integer_f32(8, Sharing::Tensor).with_zeros(), treatment.clone()));
            pairs.push((integer(4, group(32)), treatment.clone()));
            pairs.push((integer(4, group(64)).with_zeros(), treatment));
        }
        for scheme in
            [affine(Code::E4m3, DType::F32, Sharing::Channel), affine(Code::E4m3, DType::F32, block)]
        {
            pairs.push((scheme, exact(Code::E4m3, true, sharing, DYNAMIC)));
        }
        pairs.push((integer(4, group(32)), exact(Code::E4m3, true, sharing, DYNAMIC)));
        pairs.push((integer(8, group(32)).with_zeros(), exact(Code::E4m3, true, sharing, DYNAMIC)));
    }
    pairs.push((integer(4, group(32)).permuted(), exact(INT8, true, TOKEN, DYNAMIC)));
    // Runs of odd length: pairs of k begin anew in each and straddle tiles.
    pairs.push((affine(Code::E4m3, DType::F16, group(36)), exact(Code::E4m3, true, TOKEN, DYNAMIC)));
    pairs.push((integer(8, group(36)), exact(INT8, true, TOKEN, DYNAMIC)));
    let stored = exact(INT8, false, ActivationSharing::Tensor, ActivationScale::Static);
    pairs.push((integer_f32(8, Sharing::Channel), stored));
    let local = exact(Code::E2m1, true, groups(16), ActivationScale::Local);
    let power = exact(Code::E2m1, true, groups(32), ActivationScale::PowerOfTwo);
    let power8 = exact(Code::E4m3, true, groups(32), ActivationScale::PowerOfTwo);
    pairs.extend([(NVFP4, local), (MXFP4, power), (MXFP8, power8)]);
    pairs
}

#[test]
fn products_of_codes_have_the_bits_of_the_cpu() {
    let devices: Vec<_> = devices().map(Cuda::new).collect();
    for (seed, (scheme, treatment)) in exact_pairs().into_iter().enumerate() {
        let (n, k) = (70, 192);
        let matrix = tiled(n, k, scheme, seed as u64);
        let x = treated(11, k, &treatment, Compute::F32);
        for rows in [0..n, 16..n - 1] {
            let expected = on_the_cpu(&x, &matrix, rows.clone());
            let found = on_the_device(&devices[seed % 4], &x, &matrix, rows, Compute::F32);
            same_bits(&found, &expected, &format!("{scheme:?} with {treatment:?}"));
        }
    }
}

/// Blocks, warps and stages that are full and that are not, on tensor cores.
#[test]
fn products_of_codes_over_many_tiles_have_the_bits_of_the_cpu() {
    let groups = |size| ActivationSharing::Group { size };
    let integers = [
        (integer_f32(8, Sharing::Channel), exact(INT8, true, TOKEN, DYNAMIC)),
        (integer_f32(6, Sharing::Channel).with_zeros(), exact(INT8, false, TOKEN, DYNAMIC)),
        (integer(4, group(96)), exact(INT8, true, groups(32), DYNAMIC)),
        (integer(3, group(128)).with_zeros().permuted(), exact(INT8, false, TOKEN, DYNAMIC)),
    ];
    for device in devices() {
        let cuda = Cuda::new(device);
        for (seed, (scheme, treatment)) in integers.iter().enumerate() {
            let (n, k) = (150, 480);
            let matrix = tiled(n, k, *scheme, seed as u64);
            let x = treated(133, k, treatment, Compute::Bf16);
            let rows = 16..n;
            let expected = on_the_cpu(&x, &matrix, rows.clone());
            let found = on_the_device(&cuda, &x, &matrix, rows, Compute::Bf16);
            same_bits(&found, &expected, &format!("{scheme:?} with {treatment:?}"));
        }
    }
}

/// On warpgroups: stages come round more than once, blocks stay for several tiles, segments are one and many.
#[test]
fn products_of_codes_on_warpgroups_have_the_bits_of_the_cpu() {
    let groups = |size| ActivationSharing::Group { size };
    let integers = [
        (integer_f32(8, Sharing::Channel), exact(INT8, true, TOKEN, DYNAMIC), 300, 1000),
        (integer_f32(6, Sharing::Channel).with_zeros(), exact(INT8, false, TOKEN, DYNAMIC), 20, 1100),
        (integer_f32(3, Sharing::Tensor).permuted(), exact(INT8, true, TOKEN, DYNAMIC), 270, 200),
        (integer_f32(4, Sharing::Channel), exact(INT8, false, TOKEN, DYNAMIC), 40, 64),
        (integer(4, group(128)), exact(INT8, true, TOKEN, DYNAMIC), 133, 1220),
        (integer(8, group(256)), exact(INT8, true, groups(128), DYNAMIC), 270, 384),
    ];
    for schedule in Schedule::ALL {
        let device = Emulated::new(schedule).with_warpgroups(Warpgroups::Present);
        let cuda = Cuda::new(device).with_linears(Some(LinearPath::Hopper));
        for (seed, (scheme, treatment, m, k)) in integers.iter().enumerate() {
            let n = 330;
            let matrix = tiled(n, *k, *scheme, seed as u64);
            let x = treated(*m, *k, treatment, Compute::Bf16);
            let rows = 16..n;
            let expected = on_the_cpu(&x, &matrix, rows.clone());
            let found = on_the_device(&cuda, &x, &matrix, rows, Compute::Bf16);
            same_bits(&found, &expected, &format!("{scheme:?} with {treatment:?} under {schedule:?}"));
        }
    }
}

/// The kernels that the test above is meant for are the ones that run.
#[test]
fn warpgroups_take_segments_of_whole_stages() {
    let device = Emulated::new(Schedule::ALL[0]);
    let stored_kernel = |scheme: Scheme, treatment: Treatment, fp8: Option<Stored>| {
        let held = CudaMatrix::upload(&device, &tiled(64, 256, scheme, 1), 0..64).expect("a matrix");
        let mut x = operand(&device, &treated(3, 256, &treatment, Compute::Bf16), Compute::Bf16);
        if let (OperandKind::Codes { stored, .. }, Some(fp8)) = (&mut x.kind, fp8) {
            *stored = fp8;
        }
        match codes::takes(&x.kind, &held).expect("a product").expect("for tensor cores").kernels {
            codes::Kernels::Any(_, kernel) => kernel.map(|kernel| kernel.name),
            codes::Kernels::Warpgroups(kernel) => Some(kernel.name),
        }
    };
    let kernel = |scheme, treatment| stored_kernel(scheme, treatment, None);
    let token = |symmetric| exact(INT8, symmetric, TOKEN, DYNAMIC);
    assert_eq!(kernel(integer(8, Sharing::Channel), token(true)), Some("codes_hopper_int8"));
    assert_eq!(kernel(integer(4, Sharing::Channel), token(false)), Some("codes_hopper_int4_shifted"));
    assert_eq!(kernel(integer(4, group(128)), token(true)), Some("codes_hopper_int4_segments"));
    assert_eq!(kernel(integer(4, group(64)), token(true)), None);
    assert_eq!(kernel(integer(4, group(128)), token(false)), None);
    let fp8 = || exact(Code::E4m3, true, TOKEN, DYNAMIC);
    let scheme = |sharing| affine(Code::E4m3, DType::F32, sharing);
    assert_eq!(kernel(scheme(Sharing::Channel), fp8()), Some("codes_hopper_e4m3"));
    assert_eq!(kernel(scheme(group(64)), fp8()), Some("codes_hopper_e4m3_segments"));
    assert_eq!(kernel(scheme(group(32)), fp8()), None);
    assert_eq!(kernel(integer(4, Sharing::Channel), fp8()), None);
    let kernel = |scheme| stored_kernel(scheme, fp8(), Some(Stored::Bytes));
    for sharing in [Sharing::Channel, group(128), Sharing::Block { rows: 128, columns: 128 }] {
        assert_eq!(kernel(scheme(sharing)), Some("codes_hopper_fp8"), "{sharing:?}");
    }
    assert_eq!(kernel(scheme(group(64))), Some("codes_hopper_e4m3_segments"));
    assert_eq!(kernel(integer(4, Sharing::Channel)), None);
}

#[test]
fn fp8_codes_on_tensor_cores_are_the_products_of_the_cpu() {
    let block = Sharing::Block { rows: 40, columns: 32 };
    let fp8 = |sharing| exact(Code::E4m3, true, sharing, DYNAMIC);
    let pairs = [
        (affine(Code::E4m3, DType::F32, Sharing::Channel), fp8(TOKEN)),
        (affine(Code::E4m3, DType::F32, block), fp8(ActivationSharing::Group { size: 96 })),
        (affine(Code::E4m3, DType::F16, group(64)), fp8(ActivationSharing::Group { size: 64 })),
        (integer(4, group(32)).with_zeros(), fp8(TOKEN)),
        (integer(8, group(16)).with_zeros().permuted(), fp8(ActivationSharing::Tensor)),
    ];
    for (index, schedule) in Schedule::ALL.into_iter().cycle().take(12).enumerate() {
        let (device, (scheme, treatment)) = (Emulated::new(schedule), &pairs[index % pairs.len()]);
        let path = [LinearPath::Fused, LinearPath::Hopper][index / 6];
        let (n, k) = (150, 576);
        let matrix = tiled(n, k, *scheme, index as u64);
        let x = treated(70, k, treatment, Compute::Bf16);
        let expected: Vec<f64> = on_the_cpu(&x, &matrix, 16..n).iter().map(|y| f64::from(*y)).collect();
        let cuda = Cuda::new(device.with_warpgroups(Warpgroups::Present)).with_linears(Some(path));
        let found = on_the_device(&cuda, &x, &matrix, 16..n, Compute::Bf16);
        check_close(&found, &expected, &format!("{scheme:?} with {treatment:?} on {path}"));
    }
}

/// Sums far beyond 2^24, which a chain of f32 would not hold.
#[test]
fn long_sums_of_integers_keep_every_unit() {
    let (n, k) = (3, 6_000);
    let matrix = tiled(n, k, integer_f32(8, Sharing::Channel), 5);
    let matrix = TiledMatrix { codes: vec![255; matrix.codes.len()].into(), ..matrix };
    for symmetric in [true, false] {
        let x = treated(5, k, &exact(INT8, symmetric, TOKEN, DYNAMIC), Compute::F32);
        // Far enough from the end that a code with its zero point is still a byte.
        let values: Vec<f32> = x.values().iter().map(|value| value.abs().min(120.0)).collect();
        let x = x.with_values(Isa::detect(), &values);
        let expected = on_the_cpu(&x, &matrix, 0..n);
        let found = on_the_device(&first(), &x, &matrix, 0..n, Compute::F32);
        same_bits(&found, &expected, &format!("symmetric: {symmetric}"));
    }
}

#[test]
fn pairs_without_a_product_are_refused_as_on_the_cpu() {
    let cuda = first();
    let groups = |size| ActivationSharing::Group { size };
    let fp8 = affine(Code::E4m3, DType::F32, Sharing::Channel);
    for (scheme, treatment) in [
        (fp8, exact(Code::E2m1, true, groups(16), ActivationScale::Local)),
        (MXFP4, exact(INT8, true, TOKEN, DYNAMIC)),
        (fp8, exact(INT8, true, TOKEN, DYNAMIC)),
        (integer(4, group(48)), exact(INT8, true, groups(32), DYNAMIC)),
        (integer(4, group(32)).permuted(), exact(INT8, true, groups(32), DYNAMIC)),
    ] {
        let matrix = tiled(20, 96, scheme, 1);
        for compute in [Compute::F32, Compute::Bf16] {
            let x = treated(4, 96, &treatment, compute);
            let on_cpu = CpuMatrix::new(&matrix, 0..20);
            let expected = cpu::linear::linear(Isa::detect(), &x, &on_cpu, 0..20);
            let held = CudaMatrix::upload(cuda.device(), &matrix, 0..20).expect("a matrix");
            let found = linear(&cuda, &operand(cuda.device(), &x, compute), &held, None, compute);
            let (Err(expected), Err(found)) = (expected, found) else { panic!("{scheme:?} was multiplied") };
            assert_eq!(found.to_string(), expected.to_string());
        }
    }
}

/// Sums in f64 of bf16 operands.
fn truth(x: &CpuOperand, matrix: &TiledMatrix, rows: Range<usize>) -> Vec<f64> {
    let ids: Vec<u32> = (0..rows.len() as u32).collect();
    let weights = cpu::weights::rows(Isa::detect(), &CpuMatrix::new(matrix, rows), &ids).values.clone();
    let k = matrix.k;
    let dot =
        |x: &[f32], w: &[f32]| x.iter().zip(w).map(|(x, w)| f64::from(*x) * f64::from(round_bf16(*w))).sum();
    x.values().chunks_exact(k).flat_map(|x| weights.chunks_exact(k).map(move |w| dot(x, w))).collect()
}

fn check_close(found: &[f32], expected: &[f64], what: &str) {
    assert_eq!(found.len(), expected.len(), "{what}");
    let difference: f64 = found.iter().zip(expected).map(|(a, b)| (f64::from(*a) - b).powi(2)).sum();
    let relative = (difference / expected.iter().map(|b| b * b).sum::<f64>()).sqrt();
    assert!(relative < 1e-6, "{what}: {relative:e}");
}

#[test]
fn bf16_products_of_every_scheme_are_sums_of_operand_products() {
    let devices: Vec<_> = devices().map(Cuda::new).collect();
    for (seed, scheme) in schemes().into_iter().enumerate() {
        let (n, k) = [(150, 200), (70, 63)][seed % 2];
        let matrix = tiled(n, k, scheme, seed as u64);
        let x = treated(20, k, &Treatment::Plain, Compute::Bf16);
        let rows = [0..n, 16..n, 48..n - 3][seed % 3].clone();
        let found = on_the_device(&devices[seed % 4], &x, &matrix, rows.clone(), Compute::Bf16);
        check_close(&found, &truth(&x, &matrix, rows), &format!("{scheme:?}"));
    }
}

#[test]
fn scaled_codes_on_tensor_cores_are_the_products_of_the_cpu() {
    let cuda = first();
    let groups = |size| ActivationSharing::Group { size };
    let local = exact(Code::E2m1, true, groups(16), ActivationScale::Local);
    let power = exact(Code::E2m1, true, groups(32), ActivationScale::PowerOfTwo);
    for (scheme, treatment) in [(NVFP4, local), (MXFP4, power)] {
        let matrix = tiled(70, 192, scheme, 9);
        let x = treated(11, 192, &treatment, Compute::Bf16);
        let expected: Vec<f64> = on_the_cpu(&x, &matrix, 16..70).iter().map(|y| f64::from(*y)).collect();
        let found = on_the_device(&cuda, &x, &matrix, 16..70, Compute::Bf16);
        check_close(&found, &expected, &format!("{scheme:?}"));
    }
}

/// Cuts of tokens and of rows must not be seen: on every schedule, straight and through a library.
fn check_cuts(scheme: Scheme, run: impl Fn(&CpuOperand, &TiledMatrix, Range<usize>) -> Vec<f32>) {
    let (n, k) = (203, 130);
    let matrix = tiled(n, k, scheme, 31);
    let x = treated(141, k, &Treatment::Plain, Compute::Bf16);
    let whole = run(&x, &matrix, 0..n);
    check_close(&whole, &truth(&x, &matrix, 0..n), "whole");
    for tokens in [0..1, 1..130, 130..141] {
        for rows in [0..16, 16..80, 80..n] {
            let found = run(&part(&x, tokens.clone()), &matrix, rows.clone());
            let expected: Vec<f32> =
                tokens.clone().flat_map(|row| whole[row * n..][rows.clone()].to_vec()).collect();
            same_bits(&found, &expected, &format!("tokens {tokens:?}, rows {rows:?}"));
        }
    }
}

#[test]
fn cuts_of_tokens_and_rows_do_not_show_in_bf16() {
    for (device, scheme) in
        devices().zip([integer(4, group(32)), NVFP4, integer(8, group(5)), plain(Code::Bf16)])
    {
        let cuda = Cuda::new(device);
        check_cuts(scheme, |x, matrix, rows| on_the_device(&cuda, x, matrix, rows, Compute::Bf16));
    }
}

fn through_the_library(
    cuda: &Cuda<Emulated>,
    x: &CpuOperand,
    matrix: &TiledMatrix,
    rows: Range<usize>,
) -> Vec<f32> {
    let device = cuda.device();
    let held = CudaMatrix::upload(device, matrix, rows).expect("a matrix");
    let y = CudaBuffer::new(device, x.rows(), held.rows.len()).expect("room");
    store_through_the_library(cuda, x, &held, &y, Store::Over);
    y.download(device).expect("values")
}

fn store_through_the_library(
    cuda: &Cuda<Emulated>,
    x: &CpuOperand,
    held: &CudaMatrix<EmulatedMemory>,
    y: &CudaBuffer<EmulatedMemory>,
    store: Store,
) {
    let device = cuda.device();
    let x = operand(device, x, Compute::Bf16);
    let input = Input::new(device, &x, held).expect("an input");
    let output = (Output::of::<Emulated>(y), store);
    let chunks = dense::Chunks { tokens: 48, rows: 80 };
    dense::product(cuda, &input, 0..x.rows, held, 0..held.rows.len(), output, chunks).expect("a product");
}

/// Whole chunks, which the library adds by itself, and padded ones; rows that it can write to and others.
#[test]
fn a_product_is_added_as_a_sum_afterwards_would_be() {
    let device = Emulated::new(Schedule::ALL[0]).with_dense_product(Dense::Present);
    let cuda = Cuda::new(device);
    for n in [240, 203] {
        let matrix = tiled(n, 130, integer(4, group(32)), 31);
        let x = treated(141, 130, &Treatment::Plain, Compute::Bf16);
        let product = through_the_library(&cuda, &x, &matrix, 0..n);
        let before = numbers(17, 141 * n);
        let expected: Vec<f32> = before.iter().zip(&product).map(|(sum, y)| sum + y).collect();
        let held = CudaMatrix::upload(cuda.device(), &matrix, 0..n).expect("a matrix");
        let sum = CudaBuffer::upload(cuda.device(), n, &before).expect("room");
        store_through_the_library(&cuda, &x, &held, &sum, Store::Added);
        same_bits(&sum.download(cuda.device()).expect("values"), &expected, &format!("{n} outputs"));
    }
}

#[test]
fn cuts_of_tokens_and_rows_do_not_show_through_a_library() {
    for (device, scheme) in
        devices().zip([integer(4, group(32)), NVFP4, integer(8, group(5)).permuted(), plain(Code::F32)])
    {
        let cuda = Cuda::new(device.with_dense_product(Dense::Present));
        check_cuts(scheme, |x, matrix, rows| through_the_library(&cuda, x, matrix, rows));
    }
}

#[test]
fn a_large_matrix_goes_through_the_library_whatever_its_shard() {
    let present = Cuda::new(Emulated::new(Schedule::ALL[0]).with_dense_product(Dense::Present));
    let matrix = tiled(2048, 1024, integer(4, group(128)), 2);
    for rows in [0..2048, 16..32] {
        let large = CudaMatrix::upload(present.device(), &matrix, rows).expect("a matrix");
        assert_eq!(path(&present, &OperandKind::Bf16, &large), Bf16Path::Library);
        assert_eq!(path(&present, &OperandKind::F32, &large), Bf16Path::Fused);
        assert_eq!(path(&first(), &OperandKind::Bf16, &large), Bf16Path::Fused);
    }
    let narrow = tiled(2048, 1000, integer(4, group(128)), 2);
    let narrow = CudaMatrix::upload(present.device(), &narrow, 0..2048).expect("a matrix");
    assert_eq!(path(&present, &OperandKind::Bf16, &narrow), Bf16Path::Fused);
}

fn check_experts(cuda: &Cuda<Emulated>, schemes: &[Scheme], compute: Compute) {
    let device = cuda.device();
    let k = 200;
    let tokens = [5, 0, 131, 1];
    let x: Vec<CpuOperand> =
        tokens.iter().map(|rows| treated(*rows, k, &Treatment::Plain, compute)).collect();
    let matrices: Vec<CudaMatrix<EmulatedMemory>> = (0..4)
        .map(|seed| tiled(150, k, schemes[seed % schemes.len()], seed as u64))
        .map(|matrix| CudaMatrix::upload(device, &matrix, 16..150).expect("a matrix"))
        .collect();
    let operands = || -> Vec<_> { x.iter().map(|x| operand(device, x, compute)).collect() };
    let weights: Vec<&CudaMatrix<EmulatedMemory>> = matrices.iter().collect();
    let given = operands();
    let given: Vec<&CudaOperand<EmulatedMemory>> = given.iter().collect();
    let together =
        linear_experts(cuda, &given, &weights, &vec![None; weights.len()], compute).expect("products");
    for ((found, x), weight) in together.iter().zip(operands()).zip(&weights) {
        let alone = linear(cuda, &x, weight, None, compute).expect("a product");
        assert_eq!((found.rows, found.width), (alone.rows, alone.width));
        same_bits(
            &found.download(device).expect("values"),
            &alone.download(device).expect("values"),
            "an expert",
        );
    }
}

#[test]
fn experts_together_have_the_bits_of_each_alone() {
    for device in devices() {
        let cuda = Cuda::new(device);
        check_experts(&cuda, &[integer(4, group(32)), integer(4, group(32)).permuted()], Compute::Bf16);
    }
    let cuda = first();
    // Not of one launch: another code, scales inside a slice, f32.
    check_experts(&cuda, &[integer(4, group(32)), NVFP4], Compute::Bf16);
    check_experts(&cuda, &[integer(4, group(5))], Compute::Bf16);
    check_experts(&cuda, &[NVFP4], Compute::F32);
    assert!(linear_experts(&cuda, &[], &[], &[], Compute::Bf16).expect("nothing").is_empty());
}

#[test]
fn a_shard_without_rows_gives_no_columns() {
    let cuda = first();
    let matrix = tiled(40, 70, integer(4, group(32)), 1);
    for compute in [Compute::Bf16, Compute::F32] {
        let x = treated(3, 70, &Treatment::Plain, compute);
        assert!(on_the_device(&cuda, &x, &matrix, 16..16, compute).is_empty());
    }
}

/// Ranks must take the path that one device takes, however large the experts are.
#[test]
fn experts_on_several_ranks_have_the_bits_of_one_device() {
    let cuda = Cuda::new(Emulated::new(Schedule::ALL[0]).with_dense_product(Dense::Present));
    let ranks = team::in_process(vec![cuda.another_rank(), cuda.another_rank()]);
    let (n, k) = (dense::CHUNKS.rows, 1024);
    let matrices = [1, 2].map(|seed| tiled(n, k, integer(4, group(128)), seed));
    let one = experts(&cuda, &matrices, k);
    for several in
        team::run(&ranks, NonZero::<usize>::MIN, |rank| Ok::<_, KernelError>(experts(rank, &matrices, k)))
    {
        assert_eq!(several.expect("a rank"), one);
    }
}

/// Bits of two experts' outputs.
fn experts<B: Backend>(backend: &B, matrices: &[TiledMatrix], k: usize) -> Vec<u32> {
    let values: Vec<f32> = (0..3 * k).map(|index| (index % 97) as f32 / 97.0 - 0.5).collect();
    let x = backend.upload(k, &values).expect("activations");
    let windows = std::slice::from_ref(&(0..3));
    let operand = backend.prepare(&x, &Treatment::Plain, Compute::Bf16, windows).expect("an operand");
    let weights = matrices.iter().map(|matrix| backend.matrix(matrix, 0..matrix.n, Pieces::Atoms));
    let weights: Vec<B::Matrix> = weights.collect::<Result<_, _>>().expect("matrices");
    let operands = vec![&operand; weights.len()];
    let biases = vec![None; weights.len()];
    let outputs =
        backend.linear_experts(&operands, &weights.iter().collect::<Vec<_>>(), &biases, Compute::Bf16);
    let values = outputs.expect("products").into_iter().flat_map(|y| backend.download(&y).expect("values"));
    values.map(f32::to_bits).collect()
}

#[path = "linear_fp8.rs"]
mod fp8;
