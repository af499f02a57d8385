//! Every instruction set against the formulas one number after the other, bit by bit. NaN counts as one value.

use super::*;
use crate::cpu::math::{round_bf16, round_e2m1, round_e4m3};

/// Numbers of all magnitudes, with special ones among them and runs that are all zero or all NaN.
fn numbers(width: usize, rows: usize) -> CpuBuffer {
    let special = [
        0.0,
        -0.0,
        f32::NAN,
        f32::INFINITY,
        f32::NEG_INFINITY,
        1e-40,
        -1e-45,
        f32::MAX,
        f32::MIN_POSITIVE,
        -0.5,
        2.5,
    ];
    let mut state = 9_u64;
    let mut next = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 33) as u32
    };
    let mut values = Vec::with_capacity(width * rows);
    for row in 0..rows {
        for at in 0..width {
            let plain = (next() as f32 / 2_147_483_648.0 - 0.5) * f32::exp2((next() % 24) as f32 - 12.0);
            let value = match row % 6 {
                0 => plain,
                // Halves: ties of many scales.
                1 => (plain * 2.0).round() / 2.0,
                2 if next() % 97 == 0 => special[at % special.len()],
                3 if at / 16 % 3 == 0 => 0.0,
                4 => -plain.abs() * 1e-38,
                5 if at < width / 2 => f32::NAN,
                _ => plain,
            };
            values.push(value);
        }
    }
    CpuBuffer { width, values }
}

fn activations() -> Vec<Activation> {
    let codes = [Code::Int { bits: 8 }, Code::Int { bits: 4 }, Code::E4m3, Code::E2m1];
    let sharings = [
        ActivationSharing::Tensor,
        ActivationSharing::Token,
        ActivationSharing::Head,
        ActivationSharing::Group { size: 16 },
        ActivationSharing::Group { size: 32 },
        ActivationSharing::Group { size: 40 },
    ];
    let scales = [
        ActivationScale::Static,
        ActivationScale::Dynamic,
        ActivationScale::Local,
        ActivationScale::PowerOfTwo,
    ];
    let mut all = Vec::new();
    for (code, sharing) in codes.into_iter().flat_map(|code| sharings.map(|sharing| (code, sharing))) {
        for (scale, symmetric) in scales.into_iter().flat_map(|scale| [(scale, true), (scale, false)]) {
            let powers = matches!(scale, ActivationScale::Local | ActivationScale::PowerOfTwo);
            // Scales in fp8 and powers of two belong to groups of symmetric floats.
            let grouped = matches!(sharing, ActivationSharing::Group { .. });
            let floats = matches!(code, Code::E4m3 | Code::E2m1);
            if powers && !(grouped && symmetric && floats) {
                continue;
            }
            all.push(Activation { code, symmetric, sharing, scale });
        }
    }
    all
}

fn quantizer(activation: Activation, scales: Vec<f32>) -> Quantizer {
    Quantizer { activation, scales, zero: 3.0, global_scale: 37.5 }
}

/// Smallest and largest value.
fn range_of(run: &[f32]) -> (f32, f32) {
    run.iter()
        .fold((f32::INFINITY, f32::NEG_INFINITY), |(low, high), value| (low.min(*value), high.max(*value)))
}

fn code_range(code: Code) -> (f32, f32) {
    match code {
        Code::Int { bits: 4 } => (-8.0, 7.0),
        Code::Int { .. } => (-128.0, 127.0),
        Code::E2m1 => (-6.0, 6.0),
        Code::E4m3 | Code::Bf16 | Code::F16 | Code::F32 => (-448.0, 448.0),
    }
}

fn round(code: Code, value: f32) -> f32 {
    match code {
        Code::Int { .. } => value.round_ties_even(),
        Code::E2m1 => round_e2m1(value),
        Code::E4m3 | Code::Bf16 | Code::F16 | Code::F32 => round_e4m3(value),
    }
}

fn or_epsilon(scale: f32) -> f32 {
    if scale == 0.0 { f32::EPSILON } else { scale }
}

fn local_scale(quantizer: &Quantizer, largest: f32) -> f32 {
    let scale = round_e4m3((quantizer.global_scale * (largest / 6.0)).clamp(-448.0, 448.0));
    if scale == 0.0 { 0.125 } else { scale }
}

/// Scale, zero point, and the stored scale where the scheme has one.
fn library(quantizer: &Quantizer, (low, high): (f32, f32)) -> (f32, Option<f32>, f32) {
    let activation = quantizer.activation;
    let (low, high) = (low.min(0.0), high.max(0.0));
    let (code_low, code_high) = code_range(activation.code);
    if !activation.symmetric {
        let scale = (high - low) / (code_high - code_low);
        let zero = (code_low - low / scale).clamp(code_low, code_high).round_ties_even();
        return (or_epsilon(scale), Some(if zero.is_nan() { 0.0 } else { zero }), 1.0);
    }
    let largest = if high > -low { high } else { -low };
    let (scale, stored) = match activation.scale {
        ActivationScale::Local => {
            let local = local_scale(quantizer, largest);
            (local / quantizer.global_scale, local)
        }
        ActivationScale::PowerOfTwo => {
            let bits = if largest == 0.0 { 1 << 31 } else { largest.to_bits() };
            let rounded = (bits + (1 << 21)) & 0xff80_0000;
            let offset = if activation.code == Code::E4m3 { 8 } else { 2 };
            let exponent = ((rounded >> 23) as i32 - offset).clamp(0, 255);
            let scale = if exponent == 0 { 0x0040_0000 } else { (exponent as u32) << 23 };
            (f32::from_bits(scale), f32::from_bits(scale))
        }
        ActivationScale::Dynamic | ActivationScale::Static => {
            (or_epsilon(largest / ((code_high - code_low) / 2.0)), 1.0)
        }
    };
    (scale, Some(0.0), stored)
}

/// Quantized and dequantized; `stored`: codes times what stands beside them.
fn requantized_one_by_one(
    x: &CpuBuffer,
    quantizer: &Quantizer,
    head_dim: usize,
    windows: &[Range<usize>],
    stored: bool,
) -> Vec<f32> {
    let activation = quantizer.activation;
    let (low, high) = code_range(activation.code);
    let mut values = x.values.clone();
    for window in windows {
        let rows = &mut values[window.start * x.width..window.end * x.width];
        let whole = range_of(rows);
        for row in rows.chunks_mut(x.width) {
            let heads = quantizer.scales.len() > 1;
            let length = if heads { head_dim } else { run_length(&activation, x.width, head_dim) };
            for (run, values) in row.chunks_mut(length).enumerate() {
                let range = match activation.sharing {
                    ActivationSharing::Tensor => whole,
                    ActivationSharing::Token | ActivationSharing::Group { .. } | ActivationSharing::Head => {
                        range_of(values)
                    }
                };
                let (scale, zero, multiplier) = match activation.scale {
                    ActivationScale::Static => {
                        let scale = quantizer.scales[if heads { run } else { 0 }];
                        (scale, (!activation.symmetric).then_some(quantizer.zero), scale)
                    }
                    ActivationScale::Dynamic | ActivationScale::Local | ActivationScale::PowerOfTwo => {
                        let (scale, zero, local) = library(quantizer, range);
                        (scale, zero, if stored { local } else { scale })
                    }
                };
                for value in values {
                    let shifted = zero.map_or(*value / scale, |zero| *value / scale + zero);
                    let code = round(activation.code, shifted.clamp(low, high));
                    let back = if stored { code } else { zero.map_or(code, |zero| code - zero) };
                    *value = back * multiplier;
                }
            }
        }
    }
    values
}

/// Codes less the shift of their words, scales, and zero points.
fn encoded_one_by_one(
    x: &CpuBuffer,
    quantizer: &Quantizer,
    windows: &[Range<usize>],
) -> (Vec<f32>, Vec<f32>, Vec<f32>) {
    let activation = quantizer.activation;
    let (low, high) = code_range(activation.code);
    let (mut codes, mut scales, mut zeros) = (x.values.clone(), Vec::new(), Vec::new());
    let length = run_length(&activation, x.width, x.width);
    for window in windows {
        let rows = &mut codes[window.start * x.width..window.end * x.width];
        let whole = range_of(rows);
        for values in rows.chunks_exact_mut(length) {
            let shared = matches!(activation.sharing, ActivationSharing::Tensor);
            let (smallest, largest) = if shared { whole } else { range_of(values) };
            let (scale, zero) = match (activation.scale, activation.symmetric) {
                (ActivationScale::Static, _) => (quantizer.scales[0], quantizer.zero),
                (_, true) => (or_epsilon(largest.max(-smallest).max(0.0) / high), 0.0),
                (_, false) => {
                    let scale = or_epsilon((largest - smallest) / (high - low));
                    (scale, (low - smallest / scale).round_ties_even())
                }
            };
            let mut finite = true;
            for value in values {
                let code = match activation.code {
                    Code::Int { .. } => ((*value / scale).round_ties_even() + zero).clamp(low, high),
                    Code::E2m1 | Code::E4m3 | Code::Bf16 | Code::F16 | Code::F32 => {
                        round(activation.code, (*value / scale).clamp(low, high))
                    }
                };
                finite &= !code.is_nan();
                *value = code;
            }
            scales.push(if finite { scale } else { f32::NAN });
            zeros.push(zero);
        }
    }
    (codes, scales, zeros)
}

#[track_caller]
fn same(found: &[f32], expected: &[f32], what: &str) {
    assert_eq!(found.len(), expected.len(), "{what}");
    for (at, (found, expected)) in found.iter().zip(expected).enumerate() {
        let same = found.to_bits() == expected.to_bits() || found.is_nan() && expected.is_nan();
        assert!(same, "{what}: element {at}: {found:e} for {expected:e}");
    }
}

const WINDOWS: [Range<usize>; 4] = [0..1, 1..1, 1..14, 14..30];

#[test]
fn values_are_requantized_as_one_by_one() {
    for width in [80, 640] {
        let x = numbers(width, 30);
        for activation in activations() {
            let mut quantizers = vec![quantizer(activation, vec![0.37])];
            if matches!(activation.scale, ActivationScale::Static) {
                quantizers
                    .push(quantizer(activation, (1..=width / 20).map(|head| head as f32 / 7.0).collect()));
            }
            for quantizer in quantizers {
                let expected = requantized_one_by_one(&x, &quantizer, 20, &WINDOWS, false);
                for isa in Isa::here() {
                    let mut found = x.clone();
                    fake_quantize(isa, &mut found, &quantizer, 20, &WINDOWS);
                    same(&found.values, &expected, &format!("{isa:?} {width} {quantizer:?}"));
                }
            }
        }
    }
}

#[test]
fn operands_are_the_values_and_codes_of_one_by_one() {
    let x = numbers(640, 30);
    for quantizer in activations().into_iter().map(|activation| quantizer(activation, vec![0.37])) {
        if matches!(quantizer.activation.sharing, ActivationSharing::Head) {
            continue;
        }
        let values = requantized_one_by_one(&x, &quantizer, x.width, &WINDOWS, false);
        let scaled = requantized_one_by_one(&x, &quantizer, x.width, &WINDOWS, true);
        let (codes, scales, zeros) = encoded_one_by_one(&x, &quantizer, &WINDOWS);
        let bf16 = |values: &[f32]| values.iter().map(|value| round_bf16(*value)).collect::<Vec<_>>();
        for isa in Isa::here() {
            let what = format!("{isa:?} {quantizer:?}");
            let library = Treatment::FakeQuantized(quantizer.clone());
            let found = prepare(isa, &x, &library, Compute::F32, &WINDOWS);
            same(&found.strips.values(), &values, &what);
            let found = prepare(isa, &x, &library, Compute::Bf16, &WINDOWS);
            same(&found.strips.values(), &bf16(&values), &what);
            let found = prepare(isa, &x, &Treatment::Exact(quantizer.clone()), Compute::F32, &WINDOWS);
            match &found.kind {
                OperandKind::Scaled { .. } => same(&found.strips.values(), &bf16(&scaled), &what),
                OperandKind::Codes(CodeScales { scales: s, offsets, segment, .. }) => {
                    same(s, &scales, &what);
                    let shift = if found.strips.unit == Unit::Quad { 128.0 } else { 0.0 };
                    let mut words = codes.clone();
                    if matches!(quantizer.activation.code, Code::Int { .. }) {
                        let shifted: Vec<f32> = zeros.iter().map(|zero| zero + shift).collect();
                        same(offsets, &shifted, &what);
                        for (word, run) in words
                            .chunks_mut(*segment)
                            .zip(&scales)
                            .flat_map(|(words, scale)| words.iter_mut().map(move |word| (word, scale)))
                        {
                            // No integer stands for NaN, nor for -0.
                            *word = if word.is_nan() { 0.0 } else { *word + shift };
                            assert!(!word.is_nan() || run.is_nan());
                            *word += 0.0;
                        }
                    }
                    same(&found.strips.values(), &words, &what);
                }
                OperandKind::Values => panic!("{what}: values"),
            }
        }
    }
}

#[test]
fn plain_operands_are_rounded() {
    for (width, rows) in [(1, 1), (37, 13), (640, 25)] {
        let x = numbers(width, rows);
        let bf16: Vec<f32> = x.values.iter().map(|value| round_bf16(*value)).collect();
        for isa in Isa::here() {
            let plain = |compute| prepare(isa, &x, &Treatment::Plain, compute, &[]).strips.values();
            same(&plain(Compute::F32), &x.values, &format!("{isa:?}"));
            same(&plain(Compute::Bf16), &bf16, &format!("{isa:?}"));
        }
    }
}
