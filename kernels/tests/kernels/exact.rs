//! `--acts kernel`: products of codes against loops over integers and f64, the codes found by trying all of them.
//!
//! The formulas are those of serving kernels: int8 `amax / 127`, fp8 `amax / 448`, asymmetric int8 over 255 steps, the
//! library's codes for NVFP4 and MXFP4 with global scales at the end.

use std::ops::Range;

use ctq_kernels::{Backend, Compute, KernelError, Pieces, Quantizer, Treatment};
use ctq_model::DType;
use ctq_model::matrix::{Code, Formula, Sharing};
use ctq_model::scheme::{Activation, ActivationScale, ActivationSharing};

use crate::plain::{Packed, Random, amax, e2m1, e4m3, on_every_isa, to_e2m1, to_e4m3};

const ROWS: usize = 107;
const WINDOWS: [Range<usize>; 2] = [0..41, 41..ROWS];

/// Codes without their zero point, and the scale that belongs to each.
struct Coded {
    codes: Vec<f64>,
    scales: Vec<f64>,
}

/// Inputs whose rows differ in size, with a row of zeros, a negative maximum and a constant sign.
fn inputs(k: usize) -> Vec<f32> {
    let mut random = Random::new(17);
    let mut x: Vec<f32> = (0..ROWS)
        .flat_map(|row| random.floats(k).into_iter().map(move |x| x * 3.0_f32.powi(row as i32 % 9 - 4)))
        .collect();
    x[2 * k..3 * k].fill(0.0);
    x[5 * k + 3] = -90.0;
    x[6 * k..7 * k].iter_mut().for_each(|x| *x = x.abs() + 1.0);
    x
}

/// Integers and fp8: `quantize(run)` gives the run's scale and codes.
fn coded(x: &[f32], length: usize, quantize: impl Fn(&[f32]) -> (f32, Vec<f64>)) -> Coded {
    let mut all = Coded { codes: Vec::new(), scales: Vec::new() };
    for run in x.chunks(length) {
        let (scale, codes) = quantize(run);
        all.scales.extend(codes.iter().map(|_| f64::from(scale)));
        all.codes.extend(codes);
    }
    all
}

fn or_epsilon(scale: f32) -> f32 {
    if scale == 0.0 { f32::EPSILON } else { scale }
}

fn int8(run: &[f32]) -> (f32, Vec<f64>) {
    int8_at(run, or_epsilon(amax(run) / 127.0), 0)
}

fn int8_asymmetric(run: &[f32]) -> (f32, Vec<f64>) {
    let low = run.iter().fold(f32::INFINITY, |low, x| low.min(*x));
    let high = run.iter().fold(f32::NEG_INFINITY, |high, x| high.max(*x));
    let scale = or_epsilon((high - low) / 255.0);
    int8_at(run, scale, (-128.0 - low / scale).round_ties_even() as i64)
}

fn int8_at(run: &[f32], scale: f32, zero: i64) -> (f32, Vec<f64>) {
    let code = |x: &f32| ((x / scale).round_ties_even() as i64 + zero).clamp(-128, 127) - zero;
    (scale, run.iter().map(|x| code(x) as f64).collect())
}

fn fp8(run: &[f32]) -> (f32, Vec<f64>) {
    let scale = or_epsilon(amax(run) / 448.0);
    (scale, run.iter().map(|x| to_e4m3(x / scale)).collect())
}

/// NVFP4 under a global scale: the fp8 scale is what multiplies the sums.
fn nvfp4(run: &[f32], global: f32) -> (f32, Vec<f64>) {
    let stored = to_e4m3((global * (amax(run) / 6.0)).min(448.0)) as f32;
    let stored = if stored == 0.0 { 0.125 } else { stored };
    (stored, run.iter().map(|x| to_e2m1(x / (stored / global))).collect())
}

/// MXFP4: the power of two two below that of the largest magnitude, a mantissa from 1.75 on counting as the next one.
fn mxfp4(run: &[f32]) -> (f32, Vec<f64>) {
    let largest = f64::from(amax(run));
    let exponent = largest.log2().floor() as i32;
    let up = i32::from(largest / 2.0_f64.powi(exponent) >= 1.75);
    let scale = if largest == 0.0 { 2.0_f32.powi(-127) } else { 2.0_f32.powi(exponent + up - 2) };
    (scale, run.iter().map(|x| to_e2m1(x / scale)).collect())
}

/// A random matrix, and its codes and scales as numbers.
fn weights(
    code: Code,
    formula: Formula,
    dtype: DType,
    sharing: Sharing,
    zeros: Option<Range<i8>>,
) -> (Packed, Coded) {
    weights_of((70, 256), code, formula, dtype, sharing, zeros)
}

fn weights_of(
    (n, k): (usize, usize),
    code: Code,
    formula: Formula,
    dtype: DType,
    sharing: Sharing,
    zeros: Option<Range<i8>>,
) -> (Packed, Coded) {
    let mut random = Random::new(23);
    let (rows, columns) = sharing.shape(n, k);
    let stored = match dtype {
        DType::F32 => {
            random.floats(rows * columns).iter().flat_map(|s| (s.abs() + 0.01).to_le_bytes()).collect()
        }
        DType::F8E4M3 => random.codes(rows * columns, |code| code < 0x7f),
        _ => random.codes(rows * columns, |exponent| (110..130).contains(&exponent)),
    };
    let scale = |index: usize| match dtype {
        DType::F32 => f64::from(f32::from_le_bytes(stored[4 * index..4 * index + 4].try_into().expect("4"))),
        DType::F8E4M3 => e4m3(stored[index]),
        _ => 2.0_f64.powi(i32::from(stored[index]) - 127),
    };
    let scales: Vec<f64> = (0..rows * columns).map(scale).collect();
    let codes = match code {
        Code::Int { bits } => random.codes(n * k, |code| usize::from(code) < 1 << bits),
        Code::E2m1 => random.codes(n * k, |code| code < 16),
        _ => random.codes(n * k, |code| code & 0x7f != 0x7f),
    };
    let zeros: Option<Vec<i8>> = zeros.map(|range| {
        let all: Vec<i8> = range.collect();
        (0..rows * columns).map(|_| all[random.next() as usize % all.len()]).collect()
    });
    let global_scale = (formula == Formula::Nvfp4).then_some(2_688.0 / 0.731);
    let scales_of = Some((dtype, sharing, stored));
    let packed = Packed { n, k, code, formula, codes, scales: scales_of, zeros, global_scale };
    let value = |at: usize| {
        let (stored, scale) = (packed.codes[at], packed.scale_index(at / k, at % k));
        let zero = packed.zeros.as_ref().map_or(0.0, |zeros| f64::from(zeros[scale]));
        match code {
            Code::Int { bits } => f64::from(stored) - 2.0_f64.powi(i32::from(bits) - 1) - zero,
            Code::E2m1 => e2m1(stored),
            _ => e4m3(stored),
        }
    };
    let coded = Coded {
        codes: (0..n * k).map(value).collect(),
        scales: (0..n * k).map(|at| scales[packed.scale_index(at / k, at % k)]).collect(),
    };
    (packed, coded)
}

fn product(packed: &Packed, x: &[f32], quantizer: &Quantizer) -> Vec<f32> {
    let tiled = packed.tiled();
    on_every_isa(|cpu| {
        let treatment = Treatment::Exact(quantizer.clone());
        // Codes are codes: the precision of operands does not touch them.
        let run = |compute| {
            let x = cpu
                .prepare(&cpu.upload(packed.k, x).expect("room"), &treatment, compute, &WINDOWS)
                .expect("room");
            let matrix = cpu.matrix(&tiled, 0..packed.n, Pieces::Atoms).expect("room");
            cpu.download(&cpu.linear(&x, &matrix, None, compute).expect("a product of codes")).expect("room")
        };
        let found = run(Compute::F32);
        assert_eq!(found, run(Compute::Bf16));
        found
    })
}

/// Compares with sums of code products: exact over runs of `exact` along k, each run and each scale rounded once.
fn check(name: &str, found: &[f32], x: &Coded, w: &Coded, k: usize, exact: usize, divisor: f64) {
    let bound = ((k / exact) + 4) as f64 * 2.0_f64.powi(-24);
    let n = w.codes.len() / k;
    for (at, found) in found.iter().enumerate() {
        let (row, column) = (at / n * k, at % n * k);
        let (mut sum, mut size) = (0.0, 0.0);
        for start in (0..k).step_by(exact) {
            let (row, column) = (row + start, column + start);
            let codes = (0..exact).map(|k| x.codes[row + k] * w.codes[column + k]).sum::<f64>();
            let term = codes * x.scales[row] * w.scales[column] / divisor;
            sum += term;
            size += term.abs();
        }
        let distance = (f64::from(*found) - sum).abs();
        assert!(distance <= bound * size, "{name} at {at}: {found}, expected {sum}, terms of {size}");
    }
}

fn quantizer(code: Code, symmetric: bool, sharing: ActivationSharing, scale: ActivationScale) -> Quantizer {
    let activation = Activation { code, symmetric, sharing, scale };
    Quantizer { activation, scales: Vec::new(), zero: 0.0, global_scale: 1.0 }
}

const INT8: Code = Code::Int { bits: 8 };
const TOKEN: ActivationSharing = ActivationSharing::Token;
const DYNAMIC: ActivationScale = ActivationScale::Dynamic;

/// Weights that int8 activations meet, and the run of k in which they keep their scale.
fn integer_weights() -> Vec<(&'static str, (Packed, Coded), usize)> {
    let affine =
        |bits, sharing, zeros| weights(Code::Int { bits }, Formula::Affine, DType::F32, sharing, zeros);
    let group = |size| Sharing::Group { size };
    vec![
        ("int8 channel", affine(8, Sharing::Channel, None), 256),
        ("int8 tensor", affine(8, Sharing::Tensor, None), 256),
        ("int8 channel with zero points", affine(8, Sharing::Channel, Some(-100..100)), 256),
        ("int4 g32", affine(4, group(32), None), 32),
        ("int4 g128 with zero points", affine(4, group(128), Some(-8..7)), 128),
    ]
}

#[test]
fn int8_products_are_exact_sums_of_integers() {
    for (name, (packed, w), run) in integer_weights() {
        let k = packed.k;
        let x = inputs(k);
        let token = quantizer(INT8, true, TOKEN, DYNAMIC);
        check(name, &product(&packed, &x, &token), &coded(&x, k, int8), &w, k, run, 1.0);
        let group = quantizer(INT8, true, ActivationSharing::Group { size: 64 }, DYNAMIC);
        check(name, &product(&packed, &x, &group), &coded(&x, 64, int8), &w, k, run.min(64), 1.0);
        let asymmetric = quantizer(INT8, false, TOKEN, DYNAMIC);
        check(name, &product(&packed, &x, &asymmetric), &coded(&x, k, int8_asymmetric), &w, k, run, 1.0);
        // A scale for all tokens is found in each window by itself.
        let tensor = quantizer(INT8, true, ActivationSharing::Tensor, DYNAMIC);
        let windows = WINDOWS.map(|window| {
            let x = &x[window.start * k..window.end * k];
            coded(x, x.len(), int8)
        });
        let both = Coded {
            codes: windows.iter().flat_map(|window| window.codes.clone()).collect(),
            scales: windows.iter().flat_map(|window| window.scales.clone()).collect(),
        };
        check(name, &product(&packed, &x, &tensor), &both, &w, k, run, 1.0);
        let stored = Quantizer {
            scales: vec![0.031],
            zero: 17.0,
            ..quantizer(INT8, false, ActivationSharing::Tensor, ActivationScale::Static)
        };
        let at = |run: &[f32]| int8_at(run, 0.031, 17);
        check(name, &product(&packed, &x, &stored), &coded(&x, k, at), &w, k, run, 1.0);
    }
}

/// A sum that climbs far beyond 2^24 and comes back: a chain of f32 would lose what is left.
#[test]
fn integer_sums_keep_every_unit() {
    let k = 8192;
    let codes: Vec<u8> = (0..k).map(|at| if at == k - 1 { 254 } else { 255 }).collect();
    let packed = Packed {
        n: 1,
        k,
        code: INT8,
        formula: Formula::Affine,
        codes,
        scales: Some((DType::F32, Sharing::Channel, 1.0_f32.to_le_bytes().to_vec())),
        zeros: None,
        global_scale: None,
    };
    let x: Vec<f32> = (0..ROWS * k).map(|at| if at % k < k / 2 { 127.0 } else { -127.0 }).collect();
    let found = product(&packed, &x, &quantizer(INT8, true, TOKEN, DYNAMIC));
    assert_eq!(found, vec![127.0; ROWS]);
}

#[test]
fn fp8_products_are_sums_of_code_products() {
    let affine = |sharing| weights(Code::E4m3, Formula::Affine, DType::F32, sharing, None);
    let block = Sharing::Block { rows: 32, columns: 128 };
    let group = ActivationSharing::Group { size: 128 };
    for (name, (packed, w)) in [
        ("fp8 channel", affine(Sharing::Channel)),
        ("fp8 tensor", affine(Sharing::Tensor)),
        ("fp8 block", affine(block)),
    ] {
        let k = packed.k;
        let x = inputs(k);
        let token = quantizer(Code::E4m3, true, TOKEN, DYNAMIC);
        check(name, &product(&packed, &x, &token), &coded(&x, k, fp8), &w, k, 1, 1.0);
        let group = quantizer(Code::E4m3, true, group, DYNAMIC);
        check(name, &product(&packed, &x, &group), &coded(&x, 128, fp8), &w, k, 1, 1.0);
        let activation = quantizer(Code::E4m3, true, ActivationSharing::Tensor, ActivationScale::Static);
        let stored = Quantizer { scales: vec![0.0133], ..activation };
        let at = |run: &[f32]| (0.0133, run.iter().map(|x| to_e4m3(x / 0.0133)).collect());
        check(name, &product(&packed, &x, &stored), &coded(&x, k, at), &w, k, 1, 1.0);
    }
}

/// A last block of k that is cut short.
#[test]
fn ragged_blocks_meet_one_scale_a_token() {
    let block = Sharing::Block { rows: 32, columns: 128 };
    let (packed, w) = weights_of((70, 200), Code::E4m3, Formula::Affine, DType::F32, block, None);
    let x = inputs(packed.k);
    let token = quantizer(Code::E4m3, true, TOKEN, DYNAMIC);
    let found = product(&packed, &x, &token);
    check("ragged block", &found, &coded(&x, packed.k, fp8), &w, packed.k, 1, 1.0);
}

#[test]
fn fp4_products_are_sums_of_codes_times_local_scales() {
    let group = |size| Sharing::Group { size };
    let (packed, w) = weights(Code::E2m1, Formula::Nvfp4, DType::F8E4M3, group(16), None);
    let k = packed.k;
    let x = inputs(k);
    let global = 2_688.0 / 11.7;
    let activation =
        quantizer(Code::E2m1, true, ActivationSharing::Group { size: 16 }, ActivationScale::Local);
    let local = Quantizer { global_scale: global, ..activation };
    let divisor = f64::from(packed.global_scale.expect("a divisor")) * f64::from(global);
    let codes = coded(&x, 16, |run| nvfp4(run, global));
    check("nvfp4", &product(&packed, &x, &local), &codes, &w, k, 1, divisor);

    let (packed, w) = weights(Code::E2m1, Formula::Mx, DType::U8, group(32), None);
    let power =
        quantizer(Code::E2m1, true, ActivationSharing::Group { size: 32 }, ActivationScale::PowerOfTwo);
    check("mxfp4", &product(&packed, &x, &power), &coded(&x, 32, mxfp4), &w, k, 1, 1.0);
}

#[test]
fn a_product_without_a_kernel_is_refused_by_name() {
    let (fp8, _) = weights(Code::E4m3, Formula::Affine, DType::F32, Sharing::Channel, None);
    let (mxfp4, _) = weights(Code::E2m1, Formula::Mx, DType::U8, Sharing::Group { size: 32 }, None);
    let local = quantizer(Code::E2m1, true, ActivationSharing::Group { size: 16 }, ActivationScale::Local);
    for (packed, quantizer) in [
        (&fp8, local),
        (&mxfp4, quantizer(INT8, true, TOKEN, DYNAMIC)),
        (&fp8, quantizer(INT8, true, TOKEN, DYNAMIC)),
    ] {
        let cpu = ctq_kernels::cpu::Cpu::detect();
        let x = cpu.upload(packed.k, &inputs(packed.k)).expect("room");
        let x = cpu.prepare(&x, &Treatment::Exact(quantizer), Compute::F32, &WINDOWS).expect("room");
        let matrix = cpu.matrix(&packed.tiled(), 0..packed.n, Pieces::Atoms).expect("room");
        match cpu.linear(&x, &matrix, None, Compute::F32) {
            Err(error @ KernelError::NoExactProduct { .. }) => {
                assert!(error.to_string().contains("use --acts library"), "{error}");
            }
            Err(error) => panic!("{error}"),
            Ok(_) => panic!("{:?} weights were multiplied", packed.code),
        }
    }
}

#[test]
fn groups_that_straddle_those_of_the_weights_are_refused_by_name() {
    let (packed, _) = weights(Code::E4m3, Formula::Affine, DType::F32, Sharing::Group { size: 48 }, None);
    let groups = quantizer(Code::E4m3, true, ActivationSharing::Group { size: 32 }, DYNAMIC);
    let cpu = ctq_kernels::cpu::Cpu::detect();
    let x = cpu.upload(packed.k, &inputs(packed.k)).expect("room");
    let x = cpu.prepare(&x, &Treatment::Exact(groups), Compute::F32, &WINDOWS).expect("room");
    let matrix = cpu.matrix(&packed.tiled(), 0..packed.n, Pieces::Atoms).expect("room");
    match cpu.linear(&x, &matrix, None, Compute::F32) {
        Err(error @ KernelError::GroupsDoNotMeet { group: 48, .. }) => {
            assert!(error.to_string().contains("runs of 48 inputs"), "{error}");
        }
        Err(error) => panic!("{error}"),
        Ok(_) => panic!("scales that change at 32 and at 48 were applied to one sum"),
    }
}
