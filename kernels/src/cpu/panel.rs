//! The register-blocked kernel that every product of the CPU backend goes through:
//! `out[m][j] += sum over k of x[m][k] * panel[k][j]`.
//!
//! Each output is one chain of fused multiply-adds in a stated [`Order`]. Lanes run across outputs, so blocking and
//! vector width cannot change a bit. Knows no codes, no scales and no tiles.

use crate::cpu::Isa;
use crate::cpu::isa::for_each_isa;
#[cfg(target_arch = "x86_64")]
use crate::cpu::vector::{Avx2, Avx512};
use crate::cpu::vector::{Scalar, Vector};

/// A panel of `k` rows of `width` values, one row every `stride`.
#[derive(Clone, Copy)]
pub(crate) struct Panel<'a, T> {
    pub(crate) values: &'a [T],
    pub(crate) stride: usize,
    pub(crate) width: usize,
    pub(crate) k: usize,
}

/// Inputs: one row of at least `panel.k` values every `stride`.
#[derive(Clone, Copy)]
pub(crate) struct Rows<'a, T> {
    pub(crate) values: &'a [T],
    pub(crate) stride: usize,
    pub(crate) count: usize,
}

/// Order in which a chain takes the elements of k.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Order {
    /// One by one.
    Ascending,
    /// In pairs, the odd element of a pair before the even one: what `vdpbf16ps` does.
    Pairs,
}

/// `out += x * panel` in f32 chains; `out` has one row every `out_stride`.
pub(crate) fn multiply(
    isa: Isa,
    order: Order,
    x: Rows<'_, f32>,
    panel: Panel<'_, f32>,
    out: &mut [f32],
    out_stride: usize,
) {
    match order {
        Order::Ascending => multiply_ascending(isa, x, panel, out, out_stride),
        Order::Pairs => multiply_pairs(isa, x, panel, out, out_stride),
    }
}

const PAIRS: bool = true;
const ASCENDING: bool = false;

for_each_isa! {
    /// [`multiply`] with [`Order::Ascending`].
    fn multiply_ascending(x: Rows<'_, f32>, panel: Panel<'_, f32>, out: &mut [f32], out_stride: usize) {
        avx512bf16: blocks::<Avx512, 12, 2, ASCENDING>,
        avx512: blocks::<Avx512, 12, 2, ASCENDING>,
        avx2: blocks::<Avx2, 6, 2, ASCENDING>,
        portable: blocks::<Scalar<f32>, 4, 4, ASCENDING>,
    }
}

for_each_isa! {
    /// [`multiply`] with [`Order::Pairs`].
    fn multiply_pairs(x: Rows<'_, f32>, panel: Panel<'_, f32>, out: &mut [f32], out_stride: usize) {
        avx512bf16: blocks::<Avx512, 12, 2, PAIRS>,
        avx512: blocks::<Avx512, 12, 2, PAIRS>,
        avx2: blocks::<Avx2, 6, 2, PAIRS>,
        portable: blocks::<Scalar<f32>, 4, 4, PAIRS>,
    }
}

#[inline(always)]
fn blocks<V: Vector, const ROWS: usize, const VECTORS: usize, const IN_PAIRS: bool>(
    x: Rows<'_, V::Element>,
    panel: Panel<'_, V::Element>,
    out: &mut [V::Element],
    out_stride: usize,
) {
    let lanes = V::LANES * VECTORS;
    let wide = panel.width - panel.width % lanes;
    let mut row = 0;
    while row < x.count {
        let whole = x.count - row >= ROWS;
        let rows = Rows { values: &x.values[row * x.stride..], ..x };
        let out = &mut out[row * out_stride..];
        for column in (0..wide).step_by(lanes) {
            if whole {
                block::<V, ROWS, VECTORS, IN_PAIRS>(rows, panel, column, out, out_stride);
            } else {
                block::<V, 1, VECTORS, IN_PAIRS>(rows, panel, column, out, out_stride);
            }
        }
        for column in wide..panel.width {
            for r in 0..if whole { ROWS } else { 1 } {
                let rows = Rows { values: &rows.values[r * x.stride..], ..rows };
                block::<Scalar<V::Element>, 1, 1, IN_PAIRS>(
                    rows,
                    panel,
                    column,
                    &mut out[r * out_stride..],
                    out_stride,
                );
            }
        }
        row += if whole { ROWS } else { 1 };
    }
}

/// One register block: `ROWS` inputs by `VECTORS` vectors of outputs, sums in registers over all of k.
#[inline(always)]
#[expect(unsafe_code, reason = "vector loads and stores take pointers")]
#[expect(clippy::needless_range_loop, reason = "counted loops are what the compiler unrolls into registers")]
fn block<V: Vector, const ROWS: usize, const VECTORS: usize, const IN_PAIRS: bool>(
    x: Rows<'_, V::Element>,
    panel: Panel<'_, V::Element>,
    column: usize,
    out: &mut [V::Element],
    out_stride: usize,
) {
    let (k, lanes) = (panel.k, V::LANES * VECTORS);
    if k == 0 {
        return;
    }
    assert!(x.values.len() >= (ROWS - 1) * x.stride + k);
    assert!(panel.values.len() >= (k - 1) * panel.stride + column + lanes);
    assert!(out.len() >= (ROWS - 1) * out_stride + column + lanes);
    let inputs = x.values.as_ptr();
    let weights = panel.values.as_ptr();
    let outputs = out.as_mut_ptr();
    // SAFETY: every pointer below is one of the three above plus an offset that the assertions bound: rows below
    // ROWS, k below `panel.k`, columns below `column + lanes`.
    unsafe {
        let output = |row: usize, vector: usize| outputs.add(row * out_stride + column + vector * V::LANES);
        let mut sums = [[V::load(outputs.add(column)); VECTORS]; ROWS];
        for row in 0..ROWS {
            for vector in 0..VECTORS {
                sums[row][vector] = V::load(output(row, vector));
            }
        }
        let pairs = if IN_PAIRS { k / 2 } else { 0 };
        for pair in 0..pairs {
            step::<V, ROWS, VECTORS>(
                inputs,
                x.stride,
                weights.add(column),
                panel.stride,
                2 * pair + 1,
                &mut sums,
            );
            step::<V, ROWS, VECTORS>(
                inputs,
                x.stride,
                weights.add(column),
                panel.stride,
                2 * pair,
                &mut sums,
            );
        }
        for k in 2 * pairs..k {
            step::<V, ROWS, VECTORS>(inputs, x.stride, weights.add(column), panel.stride, k, &mut sums);
        }
        for row in 0..ROWS {
            for vector in 0..VECTORS {
                sums[row][vector].store(output(row, vector));
            }
        }
    }
}

/// One k of a register block. A function, not a closure: only what is inlined is compiled for the caller's
/// instruction set.
///
/// # Safety
/// `inputs` holds `ROWS` rows every `stride` with more than `k` values, `weights` more than `k` rows every
/// `panel_stride` with `VECTORS` vectors.
#[inline(always)]
#[expect(unsafe_code, reason = "vector loads take pointers")]
#[expect(clippy::needless_range_loop, reason = "counted loops are what the compiler unrolls into registers")]
unsafe fn step<V: Vector, const ROWS: usize, const VECTORS: usize>(
    inputs: *const V::Element,
    stride: usize,
    weights: *const V::Element,
    panel_stride: usize,
    k: usize,
    sums: &mut [[V; VECTORS]; ROWS],
) {
    // SAFETY: the caller's promise.
    unsafe {
        let weights = weights.add(k * panel_stride);
        let weights: [V; VECTORS] = std::array::from_fn(|vector| V::load(weights.add(vector * V::LANES)));
        for row in 0..ROWS {
            let input = *inputs.add(row * stride + k);
            for vector in 0..VECTORS {
                sums[row][vector] = V::fused(input, weights[vector], sums[row][vector]);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The definition, written out: one chain.
    fn chain(order: Order, x: &[f32], w: impl Fn(usize) -> f32, start: f32) -> f32 {
        let mut ks: Vec<usize> = (0..x.len()).collect();
        if order == Order::Pairs {
            ks.chunks_exact_mut(2).for_each(|pair| pair.swap(0, 1));
        }
        ks.into_iter().fold(start, |sum, k| x[k].mul_add(w(k), sum))
    }

    #[test]
    fn every_instruction_set_gives_the_bits_of_the_definition() {
        let mut state = 1_u32;
        let mut random = || {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (state >> 8) as f32 / 8_388_608.0 - 1.0
        };
        for (rows, k, width) in [(1, 1, 1), (3, 7, 5), (12, 64, 64), (29, 33, 48), (25, 130, 80)] {
            let x: Vec<f32> = (0..rows * k).map(|_| random()).collect();
            let w: Vec<f32> = (0..k * width).map(|_| random()).collect();
            let start: Vec<f32> = (0..rows * width).map(|_| random()).collect();
            let isas = || Isa::ALL.into_iter().filter(|isa| isa.available());
            for (isa, order) in isas().flat_map(|isa| [(isa, Order::Ascending), (isa, Order::Pairs)]) {
                let mut out = start.clone();
                let inputs = Rows { values: &x, stride: k, count: rows };
                multiply(isa, order, inputs, Panel { values: &w, stride: width, width, k }, &mut out, width);
                for row in 0..rows {
                    for column in 0..width {
                        let expected = chain(
                            order,
                            &x[row * k..(row + 1) * k],
                            |k| w[k * width + column],
                            start[row * width + column],
                        );
                        assert_eq!(out[row * width + column].to_bits(), expected.to_bits(), "{isa:?}");
                    }
                }
            }
        }
    }
}
