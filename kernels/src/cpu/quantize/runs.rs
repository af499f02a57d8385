//! Quantization of one row, run by run: extremes, parameters, codes. Loops over lines of a constant count of elements
//! without branches, which compilers make vectors of. Knows no buffers.

use ctq_model::matrix::Code;
use ctq_model::scheme::ActivationScale;

use super::parameters::{
    Extremes, Parameters, clamp, code_range, kernel, library, local_scale, power_of_two, stored,
};
use crate::backend::Quantizer;
use crate::cpu::isa::for_each_isa;
use crate::cpu::math::{round_e2m1, round_e4m3};

/// Elements of a line.
const LINE: usize = 16;

/// Runs whose parameters are found before any of them is quantized.
const RUNS: usize = 64;

/// What codes are multiplied with.
#[derive(Clone, Copy, Debug)]
pub(super) enum Multiplier {
    /// What inputs are divided by: the library's `x'`.
    Scale,
    /// The scale as codes are stored with it, without NVFP4's global scale.
    Stored,
}

/// What comes of the codes of one run.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct CodeScale {
    /// Multiplies sums of codes; NaN where a code is.
    pub(super) scale: f32,
    /// `word - offset` is the code less its zero point.
    pub(super) offset: f32,
}

for_each_isa! {
    /// Extremes of a run, for a scheme that is `symmetric` or not.
    fn extremes(run: &[f32], symmetric: bool, found: &mut Extremes) |run: &[f32], symmetric, found: &mut Extremes| {
        *found = extremes_of(run, symmetric);
    }
}

for_each_isa! {
    /// Quantizes and dequantizes a row whose runs of `length` share parameters, or with those of `whole`.
    fn requantize(
        row: &mut [f32],
        quantizer: &Quantizer,
        length: usize,
        whole: Option<Extremes>,
        multiplier: Multiplier,
    ) requantize_row
}

for_each_isa! {
    /// Makes codes of a row as kernels do, integers plus `shift`; one scale a run.
    fn encode(
        row: &mut [f32],
        quantizer: &Quantizer,
        length: usize,
        whole: Option<Extremes>,
        shift: f32,
        scales: &mut [CodeScale],
    ) encode_row
}

/// Parameters of up to [`RUNS`] runs.
struct Runs {
    /// Inputs are divided by these.
    scales: [f32; RUNS],
    zeros: [f32; RUNS],
    /// Whether there are zero points at all.
    zeroed: bool,
    multipliers: [f32; RUNS],
}

#[inline(always)]
fn requantize_row(
    row: &mut [f32],
    quantizer: &Quantizer,
    length: usize,
    whole: Option<Extremes>,
    multiplier: Multiplier,
) {
    let code = quantizer.activation.code;
    for (block, values) in row.chunks_mut(length * RUNS).enumerate() {
        let runs = block_parameters(values, quantizer, length, whole, multiplier, block * RUNS);
        match code {
            Code::Int { .. } => requantize_runs(values, length, &runs, code, f32::round_ties_even),
            Code::E2m1 => requantize_runs(values, length, &runs, code, round_e2m1),
            Code::E4m3 | Code::Bf16 | Code::F16 | Code::F32 => {
                requantize_runs(values, length, &runs, code, round_e4m3);
            }
        }
    }
}

/// Parameters of a block whose first run is run `first` of its row.
#[inline(always)]
fn block_parameters(
    values: &[f32],
    quantizer: &Quantizer,
    length: usize,
    whole: Option<Extremes>,
    multiplier: Multiplier,
    first: usize,
) -> Runs {
    let activation = quantizer.activation;
    let mut runs = Runs { scales: [0.0; RUNS], zeros: [0.0; RUNS], zeroed: true, multipliers: [0.0; RUNS] };
    let mut set = |run: usize, Parameters { scale, zero }: Parameters| {
        runs.scales[run] = scale;
        runs.zeros[run] = zero.unwrap_or(0.0);
        runs.zeroed = zero.is_some();
        runs.multipliers[run] = scale;
    };
    match activation.scale {
        ActivationScale::Static => {
            let count = values.len().div_ceil(length);
            (0..count).for_each(|run| set(run, stored(quantizer, first + run)));
        }
        ActivationScale::Dynamic => {
            for (run, values) in values.chunks(length).enumerate() {
                let found = whole.unwrap_or_else(|| extremes_of(values, activation.symmetric));
                set(run, library(quantizer, found));
            }
        }
        ActivationScale::Local => {
            largest_of_runs(values, length, whole, &mut runs.scales);
            let global = quantizer.global_scale;
            for (scale, multiplier) in runs.scales.iter_mut().zip(&mut runs.multipliers) {
                *multiplier = local_scale(global, *scale);
                *scale = *multiplier / global;
            }
            match multiplier {
                Multiplier::Scale => runs.multipliers = runs.scales,
                Multiplier::Stored => {}
            }
        }
        ActivationScale::PowerOfTwo => {
            largest_of_runs(values, length, whole, &mut runs.scales);
            runs.scales.iter_mut().for_each(|scale| *scale = power_of_two(activation.code, *scale));
            runs.multipliers = runs.scales;
        }
    }
    runs
}

/// `(round(clamp(x / scale + zero)) - zero) * multiplier`.
#[inline(always)]
fn requantize_runs(
    values: &mut [f32],
    length: usize,
    runs: &Runs,
    code: Code,
    round: impl Fn(f32) -> f32 + Copy,
) {
    let range = code_range(code);
    for (run, values) in values.chunks_mut(length).enumerate() {
        let (scale, zero, multiplier) = (runs.scales[run], runs.zeros[run], runs.multipliers[run]);
        if runs.zeroed {
            each(values, |x| (round(clamp(x / scale + zero, range)) - zero) * multiplier);
        } else {
            each(values, |x| round(clamp(x / scale, range)) * multiplier);
        }
    }
}

/// Changes every value.
#[inline(always)]
fn each(values: &mut [f32], change: impl Fn(f32) -> f32) {
    let (lines, rest) = values.as_chunks_mut::<LINE>();
    for line in lines {
        for value in line {
            *value = change(*value);
        }
    }
    for value in rest {
        *value = change(*value);
    }
}

#[inline(always)]
fn encode_row(
    row: &mut [f32],
    quantizer: &Quantizer,
    length: usize,
    whole: Option<Extremes>,
    shift: f32,
    scales: &mut [CodeScale],
) {
    let activation = quantizer.activation;
    for (run, found) in row.chunks_mut(length).zip(scales) {
        let parameters = match activation.scale {
            ActivationScale::Static => Parameters { scale: quantizer.scales[0], zero: Some(quantizer.zero) },
            ActivationScale::Dynamic | ActivationScale::Local | ActivationScale::PowerOfTwo => {
                kernel(quantizer, whole.unwrap_or_else(|| extremes_of(run, activation.symmetric)))
            }
        };
        let finite = encode_run(run, activation.code, parameters, shift);
        // No integer stands for NaN; the scale carries it to the outputs.
        let scale = if finite { parameters.scale } else { f32::NAN };
        *found = CodeScale { scale, offset: parameters.zero.unwrap_or(0.0) + shift };
    }
}

/// Codes of one run; false where one is NaN, which no integer stands for. Kernels round before they add the zero point.
#[inline(always)]
fn encode_run(run: &mut [f32], code: Code, parameters: Parameters, shift: f32) -> bool {
    let range = code_range(code);
    let (scale, zero) = (parameters.scale, parameters.zero.unwrap_or(0.0));
    match code {
        Code::Int { .. } => each_code(run, |x| {
            let code = clamp((x / scale).round_ties_even() + zero, range);
            (code, if code.is_nan() { 0.0 } else { code + shift })
        }),
        // A float's zero keeps its sign.
        Code::E4m3 | Code::Bf16 | Code::F16 | Code::F32 => each_code(run, |x| {
            let code = round_e4m3(clamp(x / scale, range));
            (code, code)
        }),
        Code::E2m1 => each_code(run, |x| {
            let code = round_e2m1(clamp(x / scale, range));
            (code, code)
        }),
    }
}

/// Replaces every value by what stands second of `change`; whether no code, which stands first, is NaN.
#[inline(always)]
fn each_code(values: &mut [f32], change: impl Fn(f32) -> (f32, f32)) -> bool {
    let mut nan = [0_u32; LINE];
    let (lines, rest) = values.as_chunks_mut::<LINE>();
    for line in lines {
        for (value, nan) in line.iter_mut().zip(&mut nan) {
            let (code, word) = change(*value);
            *nan |= u32::from(code.is_nan());
            *value = word;
        }
    }
    for (value, nan) in rest.iter_mut().zip(&mut nan) {
        let (code, word) = change(*value);
        *nan |= u32::from(code.is_nan());
        *value = word;
    }
    nan.iter().all(|nan| *nan == 0)
}

/// The larger of two; the second where the first is NaN.
#[inline(always)]
fn larger(a: f32, b: f32) -> f32 {
    if a > b { a } else { b }
}

/// The smaller of two; the second where the first is NaN.
#[inline(always)]
fn smaller(a: f32, b: f32) -> f32 {
    if a < b { a } else { b }
}

/// Largest magnitude of each run, or that of `whole`.
#[inline(always)]
fn largest_of_runs(values: &[f32], length: usize, whole: Option<Extremes>, largest: &mut [f32; RUNS]) {
    if let Some(whole) = whole {
        largest.fill(whole.high);
        return;
    }
    for (run, largest) in values.chunks(length).zip(largest) {
        *largest = fold(run, 0.0, |x, largest| larger(x.abs(), largest), larger);
    }
}

#[inline(always)]
fn extremes_of(run: &[f32], symmetric: bool) -> Extremes {
    if symmetric {
        let high = fold(run, 0.0, |x, largest| larger(x.abs(), largest), larger);
        return Extremes { low: 0.0, high };
    }
    let low = fold(run, f32::INFINITY, smaller, smaller);
    Extremes { low, high: fold(run, f32::NEG_INFINITY, larger, larger) }
}

/// Folds values, in any order, lane by lane and then the lanes.
#[inline(always)]
fn fold(values: &[f32], start: f32, take: impl Fn(f32, f32) -> f32, join: impl Fn(f32, f32) -> f32) -> f32 {
    let mut lanes = [start; LINE];
    let (lines, rest) = values.as_chunks::<LINE>();
    for line in lines {
        for (lane, value) in lanes.iter_mut().zip(line) {
            *lane = take(*value, *lane);
        }
    }
    for (lane, value) in lanes.iter_mut().zip(rest) {
        *lane = take(*value, *lane);
    }
    for width in [8, 4, 2, 1] {
        for at in 0..width {
            lanes[at] = join(lanes[at + width], lanes[at]);
        }
    }
    lanes[0]
}
