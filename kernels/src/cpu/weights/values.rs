//! What codes are worth: one row of a tile at a time, run by run of k that shares a scale.

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

/// Scale and zero point of a run, and the dtype that the product is rounded to.
#[derive(Clone, Copy, Debug)]
pub(super) struct Scaling {
    pub(super) scale: f32,
    pub(super) zero: f32,
    pub(super) rounding: Option<DType>,
}

/// `round((worth(code) - zero) * scale)` of a run of codes.
pub(super) fn values(isa: Isa, worth: &Worth, scaling: Scaling, codes: &[u8], out: &mut [f32]) {
    match worth {
        Worth::Table(table) => by_table(isa, &scaled(table, scaling), codes, out),
        Worth::Integer { half } => {
            let Scaling { scale, zero, .. } = scaling;
            integers(isa, *half, zero, scale, codes, out);
            round(isa, scaling.rounding, out);
        }
        Worth::E4m3 => {
            let Scaling { scale, zero, .. } = scaling;
            floats(isa, zero, scale, codes, out);
            round(isa, scaling.rounding, out);
        }
    }
}

/// A table of weights instead of codes' worths.
#[inline(always)]
fn scaled(table: &[f32; 16], Scaling { scale, zero, rounding }: Scaling) -> [f32; 16] {
    let mut table = table.map(|value| (value - zero) * scale);
    match rounding {
        Some(DType::BF16) => table = table.map(round_bf16),
        Some(DType::F16) => round_f16(&mut table),
        _ => {}
    }
    table
}

fn round(isa: Isa, dtype: Option<DType>, values: &mut [f32]) {
    match dtype {
        Some(DType::BF16) => round_all_bf16(isa, values),
        Some(DType::F16) => round_f16(values),
        // Scales of no other dtype are narrower than f32.
        _ => {}
    }
}

fn round_f16(values: &mut [f32]) {
    let mut halves = [half::f16::ZERO; 64];
    for values in values.chunks_mut(64) {
        let halves = &mut halves[..values.len()];
        halves.convert_from_f32_slice(values);
        halves.convert_to_f32_slice(values);
    }
}

for_each_isa! {
    /// `table[code]`.
    fn by_table(table: &[f32; 16], codes: &[u8], out: &mut [f32]) {
        avx512bf16: by_permutation, avx512: by_permutation, avx2: one_by_one, portable: one_by_one,
    }
}

for_each_isa! {
    /// `(code - half - zero) * scale`.
    fn integers(half: f32, zero: f32, scale: f32, codes: &[u8], out: &mut [f32]) scale_integers
}

for_each_isa! {
    /// `(e4m3(code) - zero) * scale`.
    fn floats(zero: f32, scale: f32, codes: &[u8], out: &mut [f32]) scale_floats
}

for_each_isa! {
    /// Nearest bf16.
    fn round_all_bf16(values: &mut [f32]) round_each
}

#[inline(always)]
fn one_by_one(table: &[f32; 16], codes: &[u8], out: &mut [f32]) {
    out.iter_mut().zip(codes).for_each(|(out, code)| *out = table[usize::from(code & 15)]);
}

#[inline(always)]
fn scale_integers(half: f32, zero: f32, scale: f32, codes: &[u8], out: &mut [f32]) {
    out.iter_mut().zip(codes).for_each(|(out, code)| *out = ((f32::from(*code) - half) - zero) * scale);
}

#[inline(always)]
fn scale_floats(zero: f32, scale: f32, codes: &[u8], out: &mut [f32]) {
    out.iter_mut().zip(codes).for_each(|(out, code)| *out = (e4m3_by_bits(*code) - zero) * scale);
}

#[inline(always)]
fn round_each(values: &mut [f32]) {
    values.iter_mut().for_each(|value| *value = round_bf16(*value));
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

/// Sixteen at a time by one permutation.
#[cfg(target_arch = "x86_64")]
#[inline(always)]
#[expect(unsafe_code, reason = "vector loads and stores take pointers")]
fn by_permutation(table: &[f32; 16], codes: &[u8], out: &mut [f32]) {
    use std::arch::x86_64::*;
    let ((codes, rest), (out, out_rest)) = (codes.as_chunks::<16>(), out.as_chunks_mut::<16>());
    // SAFETY: chunks of sixteen; the caller has AVX-512.
    unsafe {
        let table = _mm512_loadu_ps(table.as_ptr());
        for (codes, out) in codes.iter().zip(out) {
            let codes = _mm512_cvtepu8_epi32(_mm_loadu_si128(codes.as_ptr().cast()));
            _mm512_storeu_ps(out.as_mut_ptr(), _mm512_permutexvar_ps(codes, table));
        }
    }
    one_by_one(table, rest, out_rest);
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
        let codes: Vec<u8> = (0..=255).chain(0..=255).take(300).collect();
        let kinds =
            [(Code::Int { bits: 4 }, 15), (Code::E2m1, 15), (Code::Int { bits: 8 }, 255), (Code::E4m3, 126)];
        for ((code, mask), rounding) in kinds
            .into_iter()
            .flat_map(|kind| [(kind, None), (kind, Some(DType::BF16)), (kind, Some(DType::F16))])
        {
            let codes: Vec<u8> = codes.iter().map(|code| code & mask).collect();
            let worth = Worth::of(code).expect("at most 8 bits");
            let number = |byte: u8| match code {
                Code::Int { bits } => f32::from(byte) - f32::from(1_u16 << (bits - 1)),
                Code::E2m1 => e2m1(byte),
                Code::E4m3 | Code::Bf16 | Code::F16 | Code::F32 => e4m3(byte),
            };
            for isa in Isa::ALL.into_iter().filter(|isa| isa.available()) {
                let mut found = vec![0.0; codes.len()];
                values(isa, &worth, Scaling { scale: 0.037, zero: 3.0, rounding }, &codes, &mut found);
                for (byte, found) in codes.iter().zip(found) {
                    let exact = (number(*byte) - 3.0) * 0.037;
                    let expected = match rounding {
                        Some(DType::BF16) => half::bf16::from_f32(exact).to_f32(),
                        Some(DType::F16) => half::f16::from_f32(exact).to_f32(),
                        _ => exact,
                    };
                    assert_eq!(found.to_bits(), expected.to_bits(), "{isa:?} {code:?} {byte} {rounding:?}");
                }
            }
        }
    }
}
