//! Quantization of one row, run by run: extremes, parameters, codes; a line of elements at a time. Knows no buffers.
#![expect(unsafe_code, reason = "lines need their instruction set")]

use ctq_model::matrix::Code;
use ctq_model::scheme::ActivationScale;

use super::parameters::{
    Extremes, Parameters, code_range, kernel, library, local_scale, power_of_two, stored,
};
use crate::backend::Quantizer;
use crate::cpu::isa::for_each_isa;
#[cfg(target_arch = "x86_64")]
use crate::cpu::line::{Avx2, Avx512};
use crate::cpu::line::{LINE, Line, Portable};

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

/// Runs a body over every sixteen elements, a last few beside copies of the last one.
macro_rules! for_each_line {
    (ref $run:expr, $line:ident => $body:expr) => {
        let (lines, rest) = $run.as_chunks::<LINE>();
        for $line in lines {
            $body;
        }
        if let [.., last] = rest {
            let mut line = [*last; LINE];
            line[..rest.len()].copy_from_slice(rest);
            let $line = &line;
            $body;
        }
    };
    ($run:expr, $line:ident => $body:expr) => {
        let (lines, rest) = $run.as_chunks_mut::<LINE>();
        for $line in lines {
            $body;
        }
        if let [.., last] = &*rest {
            let mut line = [*last; LINE];
            line[..rest.len()].copy_from_slice(rest);
            let $line = &mut line;
            $body;
            rest.copy_from_slice(&line[..rest.len()]);
        }
    };
}

for_each_isa! {
    /// Extremes of a run, for a scheme that is `symmetric` or not.
    fn extremes(run: &[f32], symmetric: bool, found: &mut Extremes) {
        avx512bf16: find_extremes::<Avx512>,
        avx512: find_extremes::<Avx512>,
        avx2: find_extremes::<Avx2>,
        portable: find_extremes::<Portable>,
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
    ) {
        avx512bf16: requantize_row::<Avx512>,
        avx512: requantize_row::<Avx512>,
        avx2: requantize_row::<Avx2>,
        portable: requantize_row::<Portable>,
    }
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
    ) {
        avx512bf16: encode_row::<Avx512>,
        avx512: encode_row::<Avx512>,
        avx2: encode_row::<Avx2>,
        portable: encode_row::<Portable>,
    }
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
fn requantize_row<L: Line>(
    row: &mut [f32],
    quantizer: &Quantizer,
    length: usize,
    whole: Option<Extremes>,
    multiplier: Multiplier,
) {
    let code = quantizer.activation.code;
    for (block, values) in row.chunks_mut(length * RUNS).enumerate() {
        let runs = block_parameters::<L>(values, quantizer, length, whole, multiplier, block * RUNS);
        match code {
            Code::Int { .. } => requantize_runs::<L, Whole>(values, length, &runs, code),
            Code::E2m1 => requantize_runs::<L, E2m1>(values, length, &runs, code),
            Code::E4m3 | Code::Bf16 | Code::F16 | Code::F32 => {
                requantize_runs::<L, E4m3>(values, length, &runs, code);
            }
        }
    }
}

/// Parameters of a block whose first run is run `first` of its row.
#[inline(always)]
fn block_parameters<L: Line>(
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
                set(run, library(quantizer, whole_or_own::<L>(whole, values, activation.symmetric)));
            }
        }
        ActivationScale::Local => {
            largest_of_runs::<L>(values, length, whole, &mut runs.scales);
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
            largest_of_runs::<L>(values, length, whole, &mut runs.scales);
            runs.scales.iter_mut().for_each(|scale| *scale = power_of_two(activation.code, *scale));
            runs.multipliers = runs.scales;
        }
    }
    runs
}

/// `(round(clamp(x / scale + zero)) - zero) * multiplier`.
#[inline(always)]
fn requantize_runs<L: Line, R: Rounding>(values: &mut [f32], length: usize, runs: &Runs, code: Code) {
    for (run, values) in values.chunks_mut(length).enumerate() {
        // SAFETY: these bodies are inlined where the instruction set of `L` is there.
        unsafe {
            let scale = L::splat(runs.scales[run]);
            let zero = L::splat(runs.zeros[run]);
            let multiplier = L::splat(runs.multipliers[run]);
            for_each_line!(values, line => {
                let x = L::load(line).div(scale);
                let code = if runs.zeroed {
                    R::round(clamp(x.add(zero), code)).sub(zero)
                } else {
                    R::round(clamp(x, code))
                };
                code.mul(multiplier).store(line);
            });
        }
    }
}

#[inline(always)]
fn encode_row<L: Line>(
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
                kernel(quantizer, whole_or_own::<L>(whole, run, activation.symmetric))
            }
        };
        let finite = match activation.code {
            Code::Int { .. } => encode_integers::<L>(run, activation.code, parameters, shift),
            Code::E2m1 => encode_floats::<L, E2m1>(run, activation.code, parameters),
            Code::E4m3 | Code::Bf16 | Code::F16 | Code::F32 => {
                encode_floats::<L, E4m3>(run, activation.code, parameters)
            }
        };
        // No integer stands for NaN; the scale carries it to the outputs.
        let scale = if finite { parameters.scale } else { f32::NAN };
        *found = CodeScale { scale, offset: parameters.zero.unwrap_or(0.0) + shift };
    }
}

/// Integers of one run; false where one would be NaN and is 0. Kernels round before they add the zero point.
#[inline(always)]
fn encode_integers<L: Line>(run: &mut [f32], code: Code, parameters: Parameters, shift: f32) -> bool {
    // SAFETY: these bodies are inlined where the instruction set of `L` is there.
    unsafe {
        let scale = L::splat(parameters.scale);
        let zero = L::splat(parameters.zero.unwrap_or(0.0));
        let shift = L::splat(shift);
        // Bits of all: those of a NaN stay in the sum, which nothing else makes of them.
        let mut sum = L::splat(0.0);
        for_each_line!(run, line => {
            let code = clamp(L::load(line).div(scale).round().add(zero), code);
            sum = sum.add(code);
            code.add(shift).without_nan().store(line);
        });
        none_is_nan(sum)
    }
}

/// Floats of one run; false where one is NaN. A zero keeps its sign.
#[inline(always)]
fn encode_floats<L: Line, R: Rounding>(run: &mut [f32], code: Code, parameters: Parameters) -> bool {
    // SAFETY: these bodies are inlined where the instruction set of `L` is there.
    unsafe {
        let scale = L::splat(parameters.scale);
        let mut sum = L::splat(0.0);
        for_each_line!(run, line => {
            let code = R::round(clamp(L::load(line).div(scale), code));
            sum = sum.add(code);
            code.store(line);
        });
        none_is_nan(sum)
    }
}

/// Codes are finite or NaN, so that a sum of them is NaN where one is.
///
/// # Safety
/// As [`Line`].
#[inline(always)]
unsafe fn none_is_nan<L: Line>(sum: L) -> bool {
    let mut lanes = [0.0; LINE];
    // SAFETY: the caller's promise.
    unsafe { sum.store(&mut lanes) };
    lanes.iter().all(|lane| !lane.is_nan())
}

/// Largest magnitude of each run, or that of `whole`.
#[inline(always)]
fn largest_of_runs<L: Line>(
    values: &[f32],
    length: usize,
    whole: Option<Extremes>,
    largest: &mut [f32; RUNS],
) {
    if let Some(whole) = whole {
        largest.fill(whole.high);
        return;
    }
    for (run, largest) in values.chunks(length).zip(largest) {
        *largest = largest_of::<L>(run);
    }
}

/// A closure in `unwrap_or_else` might be compiled by itself, without the instruction set.
#[inline(always)]
fn whole_or_own<L: Line>(whole: Option<Extremes>, run: &[f32], symmetric: bool) -> Extremes {
    match whole {
        Some(whole) => whole,
        None => extremes_of::<L>(run, symmetric),
    }
}

#[inline(always)]
fn find_extremes<L: Line>(run: &[f32], symmetric: bool, found: &mut Extremes) {
    *found = extremes_of::<L>(run, symmetric);
}

#[inline(always)]
fn extremes_of<L: Line>(run: &[f32], symmetric: bool) -> Extremes {
    if symmetric {
        return Extremes { low: 0.0, high: largest_of::<L>(run) };
    }
    // SAFETY: these bodies are inlined where the instruction set of `L` is there.
    unsafe {
        let (mut low, mut high) = (L::splat(f32::INFINITY), L::splat(f32::NEG_INFINITY));
        for_each_line!(ref run, line => {
            low = L::load(line).smaller(low);
            high = L::load(line).larger(high);
        });
        let (mut lows, mut highs) = ([0.0; LINE], [0.0; LINE]);
        low.store(&mut lows);
        high.store(&mut highs);
        let low = lows.into_iter().fold(f32::INFINITY, f32::min);
        Extremes { low, high: highs.into_iter().fold(f32::NEG_INFINITY, f32::max) }
    }
}

/// Largest magnitude; NaN are passed over.
#[inline(always)]
fn largest_of<L: Line>(run: &[f32]) -> f32 {
    // SAFETY: these bodies are inlined where the instruction set of `L` is there.
    unsafe {
        let mut largest = L::splat(0.0);
        for_each_line!(ref run, line => largest = L::load(line).masked(MAGNITUDE).larger(largest));
        largest.largest()
    }
}

/// Bits of an f32 but for its sign.
const MAGNITUDE: u32 = 0x7fff_ffff;

/// Bits of an f32's exponent: the power of two at or below a number.
const EXPONENT: u32 = 0x7f80_0000;

/// `x` inside the range of a code; NaN stays.
///
/// # Safety
/// As [`Line`].
#[inline(always)]
unsafe fn clamp<L: Line>(x: L, code: Code) -> L {
    let (low, high) = code_range(code);
    // SAFETY: the caller's promise.
    unsafe { L::splat(high).smaller(L::splat(low).larger(x)) }
}

/// The rounding of one kind of code, of values inside its range.
trait Rounding {
    /// # Safety
    /// As [`Line`].
    unsafe fn round<L: Line>(x: L) -> L;
}

struct Whole;

impl Rounding for Whole {
    #[inline(always)]
    unsafe fn round<L: Line>(x: L) -> L {
        // SAFETY: the caller's promise.
        unsafe { x.round() }
    }
}

/// Ties to the even code, saturating at 6; 6 for NaN: compressed-tensors' `cast_to_fp4`.
struct E2m1;

impl Rounding for E2m1 {
    #[inline(always)]
    unsafe fn round<L: Line>(x: L) -> L {
        // SAFETY: the caller's promise.
        unsafe {
            let magnitude = x.masked(MAGNITUDE).smaller(L::splat(6.0));
            // Steps of a half of the power of two below, and of a half below 1: those of f32 2^22 times as far out.
            let far = magnitude.masked(EXPONENT).larger(L::splat(1.0)).mul(L::splat(4_194_304.0));
            let rounded = magnitude.add(far).sub(far);
            // Only what is less than zero has a sign.
            rounded.or(x.smaller(L::splat(0.0)).masked(!MAGNITUDE))
        }
    }
}

/// As [`round_e4m3`](crate::cpu::math::round_e4m3).
struct E4m3;

impl Rounding for E4m3 {
    #[inline(always)]
    unsafe fn round<L: Line>(x: L) -> L {
        // SAFETY: the caller's promise.
        unsafe {
            let magnitude = x.masked(MAGNITUDE);
            // Steps of an eighth of the power of two below, and of 2^-9 below 2^-6: those of f32 2^20 times as far out.
            let far = magnitude.masked(EXPONENT).larger(L::splat(0.015_625)).mul(L::splat(1_048_576.0));
            magnitude.add(far).sub(far).or(x.masked(!MAGNITUDE))
        }
    }
}
