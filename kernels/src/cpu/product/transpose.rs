//! Words of rows to words of columns: how both sides of a product come to lie step by step.
#![expect(unsafe_code, reason = "vector loads and stores take pointers")]

use crate::cpu::Isa;
use crate::cpu::isa::for_each_isa;

/// `to[step * to_stride + row] = from[row * from_stride + step]` for `rows` rows and `steps` steps.
///
/// # Panics
/// If a slice is too short.
pub(crate) fn transpose(
    isa: Isa,
    (from, from_stride): (&[u32], usize),
    (to, to_stride): (&mut [u32], usize),
    rows: usize,
    steps: usize,
) {
    if rows == 0 || steps == 0 {
        return;
    }
    assert!(from.len() >= (rows - 1) * from_stride + steps && to.len() >= (steps - 1) * to_stride + rows);
    words(isa, from, from_stride, to, to_stride, rows, steps);
}

for_each_isa! {
    /// [`transpose`], checked.
    fn words(from: &[u32], from_stride: usize, to: &mut [u32], to_stride: usize, rows: usize, steps: usize) {
        avx512bf16: blocks,
        avx512: blocks,
        avx2: one_by_one,
        portable: one_by_one,
    }
}

#[inline(always)]
fn one_by_one(from: &[u32], from_stride: usize, to: &mut [u32], to_stride: usize, rows: usize, steps: usize) {
    for step in 0..steps {
        for row in 0..rows {
            to[step * to_stride + row] = from[row * from_stride + step];
        }
    }
}

/// Blocks of 16 x 16 words in registers, what is left over one by one.
#[cfg(target_arch = "x86_64")]
#[inline(always)]
fn blocks(from: &[u32], from_stride: usize, to: &mut [u32], to_stride: usize, rows: usize, steps: usize) {
    const SIDE: usize = 16;
    let whole = steps - steps % SIDE;
    for first in (0..rows).step_by(SIDE) {
        let count = SIDE.min(rows - first);
        for step in (0..whole).step_by(SIDE) {
            // SAFETY: `transpose` has checked that `count` rows of 16 words from here on are inside `from`, and 16 rows of
            // `count` words inside `to`.
            unsafe {
                let from = from.as_ptr().add(first * from_stride + step);
                let to = to.as_mut_ptr().add(step * to_stride + first);
                block(from, from_stride, to, to_stride, count);
            }
        }
        for step in whole..steps {
            for row in first..first + count {
                to[step * to_stride + row] = from[row * from_stride + step];
            }
        }
    }
}

/// 16 steps of at most 16 rows.
///
/// # Safety
/// `from` has `rows` rows of 16 words, `to` 16 rows of `rows` words; the processor has AVX-512.
#[cfg(target_arch = "x86_64")]
#[inline(always)]
unsafe fn block(from: *const u32, from_stride: usize, to: *mut u32, to_stride: usize, rows: usize) {
    use std::arch::x86_64::*;
    // SAFETY: the caller's promise; masked stores touch `rows` words.
    unsafe {
        let mut a = [_mm512_setzero_si512(); 16];
        for (row, words) in a[..rows].iter_mut().enumerate() {
            *words = _mm512_loadu_si512(from.add(row * from_stride).cast());
        }
        let mut b = a;
        // Pairs of rows, then quads: four words of four rows side by side in each 128 bits.
        for i in 0..8 {
            b[2 * i] = _mm512_unpacklo_epi32(a[2 * i], a[2 * i + 1]);
            b[2 * i + 1] = _mm512_unpackhi_epi32(a[2 * i], a[2 * i + 1]);
        }
        for i in 0..4 {
            a[4 * i] = _mm512_unpacklo_epi64(b[4 * i], b[4 * i + 2]);
            a[4 * i + 1] = _mm512_unpackhi_epi64(b[4 * i], b[4 * i + 2]);
            a[4 * i + 2] = _mm512_unpacklo_epi64(b[4 * i + 1], b[4 * i + 3]);
            a[4 * i + 3] = _mm512_unpackhi_epi64(b[4 * i + 1], b[4 * i + 3]);
        }
        // a[4 i + j] has in its lane l step 4 l + j of rows 4 i..4 i + 4.
        let mask = if rows == 16 { u16::MAX } else { (1_u16 << rows) - 1 };
        for j in 0..4 {
            let low = _mm512_shuffle_i32x4::<0x44>(a[j], a[4 + j]);
            let high = _mm512_shuffle_i32x4::<0xee>(a[j], a[4 + j]);
            let low_rest = _mm512_shuffle_i32x4::<0x44>(a[8 + j], a[12 + j]);
            let high_rest = _mm512_shuffle_i32x4::<0xee>(a[8 + j], a[12 + j]);
            let steps = [
                _mm512_shuffle_i32x4::<0x88>(low, low_rest),
                _mm512_shuffle_i32x4::<0xdd>(low, low_rest),
                _mm512_shuffle_i32x4::<0x88>(high, high_rest),
                _mm512_shuffle_i32x4::<0xdd>(high, high_rest),
            ];
            for (lane, words) in steps.into_iter().enumerate() {
                _mm512_mask_storeu_epi32(to.add((4 * lane + j) * to_stride).cast(), mask, words);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_word_changes_row_for_column() {
        for (rows, steps) in [(1, 1), (12, 16), (12, 40), (16, 16), (64, 32), (64, 35), (5, 64), (23, 17)] {
            let (from_stride, to_stride) = (steps + 3, rows + 2);
            let from: Vec<u32> = (0..(rows * from_stride) as u32).collect();
            for isa in Isa::here() {
                let mut to = vec![u32::MAX; steps * to_stride];
                transpose(isa, (&from, from_stride), (&mut to, to_stride), rows, steps);
                for (at, word) in to.iter().enumerate() {
                    let (step, row) = (at / to_stride, at % to_stride);
                    let expected = if row < rows { (row * from_stride + step) as u32 } else { u32::MAX };
                    assert_eq!(*word, expected, "{isa:?}, {rows} rows, step {step}, row {row}");
                }
            }
        }
    }
}
