//! What codes are worth: a tile at a time, run by run of k that shares a scale.

use ctq_container::TILE;
use ctq_model::DType;
use ctq_model::matrix::Code;
use half::slice::HalfFloatSliceExt;

use crate::cpu::Isa;
use crate::cpu::isa::for_each_isa;
use crate::cpu::math::{e2m1, round_bf16};

/// How a code becomes a number.
#[derive(Clone, Copy, Debug)]
pub(super) enum Worth {
    /// By a table of at most 16.
    Table([f32; 16]),
    /// The code less half its range.
    Integer { half: f32 },
    /// An fp8 number.
    E4m3,
}

impl Worth {
    /// Of codes of at most 8 bits; `None` for wider ones, which are numbers themselves.
    pub(super) fn of(code: Code) -> Option<Worth> {
        match code {
            Code::Int { bits } => {
                let half = f32::from(1_u16 << (bits - 1));
                let table = || Worth::Table(std::array::from_fn(|code| code as f32 - half));
                Some(if bits <= 4 { table() } else { Worth::Integer { half } })
            }
            Code::E2m1 => Some(Worth::Table(std::array::from_fn(|code| e2m1(code as u8)))),
            Code::E4m3 => Some(Worth::E4m3),
            Code::Bf16 | Code::F16 | Code::F32 => None,
        }
    }
}

/// Codes of one tile, and what they are multiplied with.
pub(super) struct Coded<'a> {
    pub(super) worth: &'a Worth,
    /// [64 rows][64 k].
    pub(super) codes: &'a [u8; TILE * TILE],
    /// Runs of k that share a scale, side by side over all 64.
    pub(super) runs: &'a [Run],
    /// Scales, [groups][64], or none: 1.
    pub(super) scales: &'a [f32],
    /// Zero points, [groups][64], or none: 0.
    pub(super) zeros: &'a [f32],
    /// What products are rounded to.
    pub(super) rounding: Option<DType>,
}

/// k of a tile that share a scale.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Run {
    /// The first.
    pub(super) start: usize,
    /// Behind the last.
    pub(super) end: usize,
    /// Which of the matrix's groups.
    pub(super) group: usize,
}

/// `round((worth(code) - zero) * scale)` of a tile, [64 rows][64 k].
pub(super) fn values(isa: Isa, coded: &Coded<'_>, out: &mut [f32; TILE * TILE]) {
    match coded.rounding {
        Some(DType::F16) => {
            tile(isa, coded, out);
            round_f16(out);
        }
        Some(DType::BF16) => tile_in_bf16(isa, coded, out),
        // Scales of no other dtype are narrower than f32.
        _ => tile(isa, coded, out),
    }
}

for_each_isa! {
    /// A tile's products as they are.
    fn tile(coded: &Coded<'_>, out: &mut [f32; TILE * TILE]) {
        avx512bf16: rows::<Permutation, false>,
        avx512: rows::<Permutation, false>,
        avx2: rows::<OneByOne, false>,
        portable: rows::<OneByOne, false>,
    }
}

for_each_isa! {
    /// A tile's products rounded to bf16.
    fn tile_in_bf16(coded: &Coded<'_>, out: &mut [f32; TILE * TILE]) {
        avx512bf16: rows::<Permutation, true>,
        avx512: rows::<Permutation, true>,
        avx2: rows::<OneByOne, true>,
        portable: rows::<OneByOne, true>,
    }
}

#[inline(always)]
fn rows<L: Lookup, const IN_BF16: bool>(coded: &Coded<'_>, out: &mut [f32; TILE * TILE]) {
    let round = |value: f32| if IN_BF16 { round_bf16(value) } else { value };
    for run in coded.runs {
        for row in 0..TILE {
            let at = run.group * TILE + row;
            let scale = coded.scales.get(at).copied().unwrap_or(1.0);
            let zero = coded.zeros.get(at).copied().unwrap_or(0.0);
            let codes = &coded.codes[row * TILE + run.start..row * TILE + run.end];
            let out = &mut out[row * TILE + run.start..row * TILE + run.end];
            match coded.worth {
                // Sixteen weights instead of one for each code.
                Worth::Table(table) => {
                    let mut weights = *table;
                    weights.iter_mut().for_each(|value| *value = round((*value - zero) * scale));
                    L::look_up(&weights, codes, out);
                }
                Worth::Integer { half } => {
                    let value = |code: u8| round(((f32::from(code) - half) - zero) * scale);
                    out.iter_mut().zip(codes).for_each(|(out, code)| *out = value(*code));
                }
                Worth::E4m3 => {
                    let value = |code: u8| round((e4m3_by_bits(code) - zero) * scale);
                    out.iter_mut().zip(codes).for_each(|(out, code)| *out = value(*code));
                }
            }
        }
    }
}

fn round_f16(values: &mut [f32]) {
    let mut halves = [half::f16::ZERO; TILE];
    for values in values.chunks_exact_mut(TILE) {
        halves.convert_from_f32_slice(values);
        halves.convert_to_f32_slice(values);
    }
}

/// `table[code]` of codes below 16.
trait Lookup {
    fn look_up(table: &[f32; 16], codes: &[u8], out: &mut [f32]);
}

/// By an index each.
struct OneByOne;

impl Lookup for OneByOne {
    #[inline(always)]
    fn look_up(table: &[f32; 16], codes: &[u8], out: &mut [f32]) {
        out.iter_mut().zip(codes).for_each(|(out, code)| *out = table[usize::from(code & 15)]);
    }
}

/// Sixteen at a time by one permutation of AVX-512.
#[cfg(target_arch = "x86_64")]
struct Permutation;

#[cfg(target_arch = "x86_64")]
impl Lookup for Permutation {
    #[inline(always)]
    #[expect(unsafe_code, reason = "vector loads and stores take pointers")]
    fn look_up(table: &[f32; 16], codes: &[u8], out: &mut [f32]) {
        use std::arch::x86_64::*;
        let ((codes, rest), (out, out_rest)) = (codes.as_chunks::<16>(), out.as_chunks_mut::<16>());
        // SAFETY: chunks of sixteen; only instances that are compiled for AVX-512 look up like this.
        unsafe {
            let table = _mm512_loadu_ps(table.as_ptr());
            for (codes, out) in codes.iter().zip(out) {
                let codes = _mm512_cvtepu8_epi32(_mm_loadu_si128(codes.as_ptr().cast()));
                _mm512_storeu_ps(out.as_mut_ptr(), _mm512_permutexvar_ps(codes, table));
            }
        }
        OneByOne::look_up(table, rest, out_rest);
    }
}

/// Value of an fp8 E4M3 (fn) code without a branch: exponent and mantissa where f32 has them, times what lies between the
/// two biases. Code 127 is NaN.
#[inline(always)]
fn e4m3_by_bits(code: u8) -> f32 {
    /// 2^120.
    const BIAS: f32 = f32::from_bits((120 + 127) << 23);
    let magnitude = u32::from(code & 0x7f);
    let value = f32::from_bits(magnitude << 20) * BIAS;
    let value = if magnitude == 0x7f { f32::NAN } else { value };
    f32::from_bits(value.to_bits() | u32::from(code & 0x80) << 24)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cpu::math::e4m3;

    #[test]
    fn fp8_codes_by_bits_are_those_by_definition() {
        for code in 0..=255 {
            let (found, expected) = (e4m3_by_bits(code), e4m3(code));
            assert!(found.to_bits() == expected.to_bits() || found.is_nan() && expected.is_nan(), "{code}");
        }
    }

    #[test]
    fn every_instruction_set_gives_the_formula_s_weight() {
        let runs = [(0, 16), (16, 37), (37, 64)].into_iter().enumerate();
        let runs: Vec<Run> = runs.map(|(group, (start, end))| Run { start, end, group }).collect();
        let scales: Vec<f32> = (0..3 * TILE).map(|at| 0.001 * (at as f32 + 1.0)).collect();
        let zeros: Vec<f32> = (0..3 * TILE).map(|at| (at % 5) as f32).collect();
        for (code, mask) in
            [(Code::Int { bits: 4 }, 15), (Code::E2m1, 15), (Code::Int { bits: 8 }, 255), (Code::E4m3, 126)]
        {
            let codes = std::array::from_fn(|at| (at * 37 / 3) as u8 & mask);
            let worth = Worth::of(code).expect("at most 8 bits");
            let number = |byte: u8| match code {
                Code::Int { bits } => f32::from(byte) - f32::from(1_u16 << (bits - 1)),
                Code::E2m1 => e2m1(byte),
                Code::E4m3 | Code::Bf16 | Code::F16 | Code::F32 => e4m3(byte),
            };
            for rounding in [None, Some(DType::BF16), Some(DType::F16)] {
                let coded = Coded {
                    worth: &worth,
                    codes: &codes,
                    runs: &runs,
                    scales: &scales,
                    zeros: &zeros,
                    rounding,
                };
                for isa in Isa::here() {
                    let mut found = [0.0; TILE * TILE];
                    values(isa, &coded, &mut found);
                    for (at, found) in found.iter().enumerate() {
                        let group = runs.iter().find(|run| at % TILE < run.end).expect("a run").group;
                        let of_row = group * TILE + at / TILE;
                        let exact = (number(codes[at]) - zeros[of_row]) * scales[of_row];
                        let expected = match rounding {
                            Some(DType::BF16) => half::bf16::from_f32(exact).to_f32(),
                            Some(DType::F16) => half::f16::from_f32(exact).to_f32(),
                            _ => exact,
                        };
                        assert_eq!(found.to_bits(), expected.to_bits(), "{isa:?} {code:?} {at} {rounding:?}");
                    }
                }
            }
        }
    }
}
