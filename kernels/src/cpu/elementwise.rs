//! Operations without a product of matrices: norms, rotation, gates, sums, gathers. Rows are independent, so they are
//! spread over threads; a sum inside a row has one fixed order. Each loop is compiled for each instruction set.
#![expect(unsafe_code, reason = "lines need their instruction set")]

use rayon::prelude::*;

use crate::Rotation;
use crate::backend::Span;
use crate::cpu::exponential::{LINES, Wide, exp};
use crate::cpu::isa::for_each_isa;
#[cfg(target_arch = "x86_64")]
use crate::cpu::line::{Avx2, Avx512};
use crate::cpu::line::{LINE, Line, Portable};
use crate::cpu::math::silu;
use crate::cpu::recycle::FLOATS;
use crate::cpu::{CpuBuffer, Isa};

/// Elements that one task takes of operations that know no rows.
const RUN: usize = 1 << 14;

/// RMS norm in f32, as `LlamaRMSNorm` orders it: `(x * (1 / sqrt(mean + epsilon))) * weight`.
pub(crate) fn norm(isa: Isa, x: &CpuBuffer, weight: &[f32], epsilon: f32) -> CpuBuffer {
    let mut values = FLOATS.take(x.values.len());
    let rows = x.values.par_chunks(x.width.max(1));
    values.par_chunks_mut(x.width.max(1)).zip(rows).for_each(|(out, row)| {
        norm_row(isa, row, weight, epsilon, out);
    });
    CpuBuffer { width: x.width, values }
}

for_each_isa! {
    /// [`norm`] of one row; what is left over behind its last whole run stays.
    fn norm_row(row: &[f32], weight: &[f32], epsilon: f32, out: &mut [f32]) {
        avx512bf16: norm_runs::<Avx512>,
        avx512: norm_runs::<Avx512>,
        avx2: norm_runs::<Avx2>,
        portable: norm_runs::<Portable>,
    }
}

#[inline(always)]
fn norm_runs<L: Line>(row: &[f32], weight: &[f32], epsilon: f32, out: &mut [f32]) {
    let length = weight.len().max(1);
    for (run, out) in row.chunks(length).zip(out.chunks_mut(length)) {
        if run.len() < length {
            out.copy_from_slice(run);
            continue;
        }
        let mean = square_sum::<L>(run) / run.len() as f32;
        let inverse = 1.0 / (mean + epsilon).sqrt();
        for ((out, value), weight) in out.iter_mut().zip(run).zip(weight) {
            *out = (value * inverse) * weight;
        }
    }
}

/// Lanes of one chain of [`square_sum`].
const LANES: usize = 8;
/// Chains that run side by side.
const CHAINS: usize = 4;
/// Elements of all chains side by side.
const SIDE_BY_SIDE: usize = LANES * CHAINS;
/// Additions before a chain's sum moves up a level.
const STEP: usize = 16;

/// Sum of squares in f32 by levels, which keeps the error of long rows small.
///
/// Four chains of eight lanes walk the row side by side; every 16 additions a chain's sum moves up a level. torch 2.14
/// was measured to have the same bits (`golden/torch_orders.py`).
#[inline(always)]
fn square_sum<L: Line>(run: &[f32]) -> f32 {
    let (rows, rest) = run.as_chunks::<SIDE_BY_SIDE>();
    let sums = square_levels::<L>(rows);
    let chain = |chain: usize| &sums[chain * LANES..(chain + 1) * LANES];
    let mut first = [0.0_f32; LANES];
    first.copy_from_slice(chain(0));
    let (tail, rest) = rest.as_chunks::<LANES>();
    for line in tail {
        first.iter_mut().zip(line).for_each(|(sum, value)| *sum += value * value);
    }
    for other in 1..CHAINS {
        first.iter_mut().zip(chain(other)).for_each(|(sum, lane)| *sum += lane);
    }
    let sum = rest.iter().fold(0.0, |sum, value| sum + value * value);
    first.iter().fold(sum, |sum, lane| sum + lane)
}

/// Sums of squares of rows, lane by lane, over four levels.
#[inline(always)]
fn square_levels<L: Line>(rows: &[[f32; SIDE_BY_SIDE]]) -> [f32; SIDE_BY_SIDE] {
    // SAFETY: these bodies are inlined where the instruction set of `L` is there.
    unsafe {
        let mut levels = [[L::splat(0.0); 2]; 3];
        let (steps, rest) = rows.as_chunks::<STEP>();
        for (done, step) in steps.iter().enumerate() {
            let mut below = square_rows::<L>(step);
            // A level's sixteenth addition sends it up; the last takes all.
            for (level, span) in [STEP, STEP * STEP, usize::MAX].into_iter().enumerate() {
                levels[level] = sum(levels[level], below);
                if !(done + 1).is_multiple_of(span) {
                    break;
                }
                below = std::mem::replace(&mut levels[level], [L::splat(0.0); 2]);
            }
        }
        let mut all = square_rows::<L>(rest);
        for level in levels {
            all = sum(all, level);
        }
        let mut sums = [0.0; SIDE_BY_SIDE];
        let (halves, _) = sums.as_chunks_mut::<LINE>();
        all[0].store(&mut halves[0]);
        all[1].store(&mut halves[1]);
        sums
    }
}

/// Sums of squares, one after the other.
///
/// # Safety
/// As [`Line`].
#[inline(always)]
unsafe fn square_rows<L: Line>(rows: &[[f32; SIDE_BY_SIDE]]) -> [L; 2] {
    // SAFETY: the caller's promise.
    unsafe {
        let mut sums = [L::splat(0.0); 2];
        for row in rows {
            let (halves, _) = row.as_chunks::<LINE>();
            let (first, second) = (L::load(&halves[0]), L::load(&halves[1]));
            sums = sum(sums, [first.mul(first), second.mul(second)]);
        }
        sums
    }
}

/// # Safety
/// As [`Line`].
#[inline(always)]
unsafe fn sum<L: Line>(a: [L; 2], b: [L; 2]) -> [L; 2] {
    // SAFETY: the caller's promise.
    unsafe { [a[0].add(b[0]), a[1].add(b[1])] }
}

/// Half-split rotation: `(a, b)` at `(i, i + d/2)` become `(a cos - b sin, b cos + a sin)`, products rounded first.
pub(crate) fn rotate(isa: Isa, x: &mut CpuBuffer, rotation: &Rotation, spans: &[Span]) {
    let width = x.width;
    for span in spans {
        let first = span.first;
        let rows = &mut x.values[span.rows.start * width..span.rows.end * width];
        rows.par_chunks_mut(width).enumerate().for_each(|(row, values)| {
            let (cos, sin) = rotation.at(first + row);
            rotate_row(isa, values, cos, sin);
        });
    }
}

for_each_isa! {
    /// Rotates the heads of one row.
    fn rotate_row(row: &mut [f32], cos: &[f32], sin: &[f32]) rotate_heads
}

#[inline(always)]
fn rotate_heads(row: &mut [f32], cos: &[f32], sin: &[f32]) {
    for head in row.chunks_exact_mut(2 * cos.len()) {
        let (first, second) = head.split_at_mut(cos.len());
        for ((a, b), (cos, sin)) in first.iter_mut().zip(second).zip(cos.iter().zip(sin)) {
            (*a, *b) = (*a * cos - *b * sin, *b * cos + *a * sin);
        }
    }
}

/// `silu(gate) * up`, written over the gate.
pub(crate) fn gate(isa: Isa, mut gate: CpuBuffer, up: &CpuBuffer) -> CpuBuffer {
    let runs = gate.values.par_chunks_mut(RUN).zip(up.values.par_chunks(RUN));
    runs.for_each(|(gate, up)| gate_run(isa, gate, up));
    gate
}

for_each_isa! {
    /// [`gate`] of some elements.
    fn gate_run(gate: &mut [f32], up: &[f32]) {
        avx512bf16: gate_lines::<Avx512>,
        avx512: gate_lines::<Avx512>,
        avx2: gate_lines::<Avx2>,
        portable: gate_lines::<Portable>,
    }
}

#[inline(always)]
fn gate_lines<L: Wide>(gate: &mut [f32], up: &[f32]) {
    let whole = gate.len() - gate.len() % (LINES * LINE);
    let (gates, _) = gate[..whole].as_chunks_mut::<LINE>();
    let (ups, _) = up[..whole].as_chunks::<LINE>();
    for first in (0..gates.len()).step_by(LINES) {
        // SAFETY: these bodies are inlined where the instruction set of `L` is there.
        unsafe {
            let mut negative = [L::splat(0.0); LINES];
            for at in 0..LINES {
                negative[at] = negative[at].sub(L::load(&gates[first + at]));
            }
            let powers = exp(negative);
            for at in 0..LINES {
                let silu = L::load(&gates[first + at]).div(L::splat(1.0).add(powers[at]));
                silu.mul(L::load(&ups[first + at])).store(&mut gates[first + at]);
            }
        }
    }
    gate[whole..].iter_mut().zip(&up[whole..]).for_each(|(gate, up)| *gate = silu(*gate) * up);
}

/// `x += y`.
pub(crate) fn add(isa: Isa, x: &mut CpuBuffer, y: &CpuBuffer) {
    x.values.par_chunks_mut(RUN).zip(y.values.par_chunks(RUN)).for_each(|(x, y)| add_run(isa, x, y));
}

for_each_isa! {
    /// Adds element by element.
    fn add_run(x: &mut [f32], y: &[f32]) |x: &mut [f32], y: &[f32]| {
        x.iter_mut().zip(y).for_each(|(x, y)| *x += y);
    }
}

/// Adds `bias` to every row.
pub(crate) fn add_bias(isa: Isa, x: &mut CpuBuffer, bias: &[f32]) {
    x.values.par_chunks_mut(x.width.max(1)).for_each(|row| add_run(isa, row, bias));
}

/// First row that holds a NaN or an infinity.
pub(crate) fn first_non_finite(isa: Isa, x: &CpuBuffer) -> Option<usize> {
    x.values.par_chunks(x.width.max(1)).position_first(|row| {
        let mut finite = true;
        all_finite(isa, row, &mut finite);
        !finite
    })
}

for_each_isa! {
    /// Whether all are numbers.
    fn all_finite(values: &[f32], finite: &mut bool) |values: &[f32], finite: &mut bool| {
        // No early end: a loop without one is made vectors of.
        let largest = values.iter().fold(0, |largest, value| value.abs().to_bits().max(largest));
        *finite = largest < f32::INFINITY.to_bits();
    }
}

/// Rows `rows` of `x`, in that order.
pub(crate) fn gather(x: &CpuBuffer, rows: &[u32]) -> CpuBuffer {
    let width = x.width;
    let mut values = FLOATS.take(rows.len() * width);
    values.par_chunks_mut(width.max(1)).zip(rows).for_each(|(out, row)| {
        out.copy_from_slice(&x.values[*row as usize * width..(*row as usize + 1) * width]);
    });
    CpuBuffer { width, values }
}

/// `x[rows[i]] += weights[i] * y[i]`, product and sum rounded one after the other.
pub(crate) fn scatter_add(isa: Isa, x: &mut CpuBuffer, y: &CpuBuffer, rows: &[u32], weights: &[f32]) {
    /// Rows of one task.
    const ROWS: usize = 16;
    let width = x.width.max(1);
    // Rows ascend, so that those of a task lie side by side in `rows`. Where they do not, one task takes all.
    let together = if rows.is_sorted() { ROWS } else { x.rows().max(1) };
    x.values.par_chunks_mut(together * width).enumerate().for_each(|(task, x)| {
        let first = task * together;
        let mine = if rows.is_sorted() {
            let before = |end: usize| rows.partition_point(|row| (*row as usize) < end);
            before(first)..before(first + together)
        } else {
            0..rows.len()
        };
        for at in mine {
            let x = &mut x[(rows[at] as usize - first) * width..][..width];
            add_weighted(isa, x, &y.values[at * width..(at + 1) * width], weights[at]);
        }
    });
}

for_each_isa! {
    /// `x += weight * y`.
    fn add_weighted(x: &mut [f32], y: &[f32], weight: f32) |x: &mut [f32], y: &[f32], weight: f32| {
        x.iter_mut().zip(y).for_each(|(x, y)| *x += weight * y);
    }
}

/// Columns of several buffers side by side.
pub(crate) fn concatenate(parts: &[&CpuBuffer]) -> CpuBuffer {
    let width: usize = parts.iter().map(|part| part.width).sum();
    let rows = parts.iter().map(|part| part.rows()).max().unwrap_or(0);
    let mut values = FLOATS.take(rows * width);
    values.par_chunks_mut(width.max(1)).enumerate().for_each(|(row, out)| {
        let mut at = 0;
        for part in parts {
            out[at..at + part.width].copy_from_slice(&part.values[row * part.width..(row + 1) * part.width]);
            at += part.width;
        }
    });
    CpuBuffer { width, values }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn numbers(seed: u64, count: usize) -> Vec<f32> {
        let special =
            [0.0, -0.0, f32::INFINITY, f32::NEG_INFINITY, f32::NAN, 1e-40, -1e-45, f32::MAX, -100.5];
        let mut state = seed;
        let mut next = move || {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (state >> 33) as u32
        };
        let mut number = |at: usize| match next() % 101 {
            0 if count > 200 => special[at % special.len()],
            _ => (next() as f32 / 2_147_483_648.0 - 0.5) * f32::exp2((next() % 10) as f32 - 4.0),
        };
        (0..count).map(&mut number).collect()
    }

    #[track_caller]
    fn same(found: &[f32], expected: &[f32], what: &str) {
        assert_eq!(found.len(), expected.len(), "{what}");
        for (at, (found, expected)) in found.iter().zip(expected).enumerate() {
            let same = found.to_bits() == expected.to_bits() || found.is_nan() && expected.is_nan();
            assert!(same, "{what}: element {at}: {found:e} for {expected:e}");
        }
    }

    /// The order of NUMERICS.md, one number after the other.
    fn square_sum_by_levels(run: &[f32]) -> f32 {
        let whole = run.len() / 32 * 32;
        let mut lanes = [0.0_f32; 32];
        for (lane, sum) in lanes.iter_mut().enumerate() {
            let mut levels = [0.0_f32; 4];
            for (row, value) in run[..whole].iter().skip(lane).step_by(32).enumerate() {
                levels[0] += value * value;
                for (level, span) in [(1, 16), (2, 256), (3, 4096)] {
                    if (row + 1) % span == 0 {
                        levels[level] += std::mem::take(&mut levels[level - 1]);
                    }
                }
            }
            *sum = ((levels[0] + levels[1]) + levels[2]) + levels[3];
        }
        let lines = (run.len() - whole) / 8;
        for (at, value) in run[whole..whole + 8 * lines].iter().enumerate() {
            lanes[at % 8] += value * value;
        }
        let mut sum = run[whole + 8 * lines..].iter().fold(0.0, |sum, value| sum + value * value);
        for lane in 0..8 {
            sum += ((lanes[lane] + lanes[8 + lane]) + lanes[16 + lane]) + lanes[24 + lane];
        }
        sum
    }

    #[test]
    fn a_norm_sums_by_levels() {
        // One more than each level takes, and rests of lines and of lanes.
        for width in [1, 7, 8, 33, 128, 32 * 16, 32 * 17 + 11, 2048, 32 * 257 + 40, 32 * 4097 + 9] {
            let x = CpuBuffer { width: 3 * width, values: numbers(1, 3 * width) };
            let weight = numbers(2, width);
            let mut expected = x.values.clone();
            for run in expected.chunks_exact_mut(width) {
                let inverse = 1.0 / (square_sum_by_levels(run) / width as f32 + 1e-5).sqrt();
                run.iter_mut().zip(&weight).for_each(|(value, weight)| *value = (*value * inverse) * weight);
            }
            for isa in Isa::here() {
                same(&norm(isa, &x, &weight, 1e-5).values, &expected, &format!("{isa:?} {width}"));
            }
        }
    }

    #[test]
    fn elements_are_those_of_one_by_one() {
        for (rows, width) in [(1, 1), (3, 37), (9, 2050)] {
            let (x, y) = (numbers(3, rows * width), numbers(4, rows * width));
            let bias = numbers(5, width);
            let buffer = |values: &[f32]| CpuBuffer { width, values: values.to_vec() };
            let pairs = || x.iter().zip(&y);
            let gated: Vec<f32> = pairs().map(|(x, y)| silu(*x) * y).collect();
            let sum: Vec<f32> = pairs().map(|(x, y)| x + y).collect();
            let biased: Vec<f32> = x.iter().zip(bias.iter().cycle()).map(|(x, bias)| x + bias).collect();
            for isa in Isa::here() {
                let what = format!("{isa:?} {rows} x {width}");
                same(&gate(isa, buffer(&x), &buffer(&y)).values, &gated, &what);
                let mut found = buffer(&x);
                add(isa, &mut found, &buffer(&y));
                same(&found.values, &sum, &what);
                let mut found = buffer(&x);
                add_bias(isa, &mut found, &bias);
                same(&found.values, &biased, &what);
            }
        }
    }

    #[test]
    fn heads_are_rotated_product_by_product() {
        let rope = ctq_model::rope::Rope { theta: 10_000.0, scaling: ctq_model::rope::RopeScaling::Default };
        let (head_dim, heads, windows) = (36, 3, [0..2, 2..2, 2..7]);
        let rotation = Rotation::new(&rope, head_dim, 5);
        let x = CpuBuffer { width: heads * head_dim, values: numbers(6, 7 * heads * head_dim) };
        let mut expected = x.values.clone();
        for (row, position) in [0, 1, 0, 1, 2, 3, 4].into_iter().enumerate() {
            let (cos, sin) = rotation.at(position);
            for at in (0..heads).flat_map(|head| (0..head_dim).map(move |i| (head, i))) {
                let (head, i) = at;
                let value = |i: usize| x.values[(row * heads + head) * head_dim + i];
                let half = head_dim / 2;
                expected[(row * heads + head) * head_dim + i] = if i < half {
                    value(i) * cos[i] - value(i + half) * sin[i]
                } else {
                    value(i) * cos[i - half] + value(i - half) * sin[i - half]
                };
            }
        }
        for isa in Isa::here() {
            let mut found = x.clone();
            rotate(isa, &mut found, &rotation, &Span::whole(&windows));
            same(&found.values, &expected, &format!("{isa:?}"));
        }
    }

    #[test]
    fn the_first_bad_row_is_found_wherever_it_is_bad() {
        let (rows, width) = (5, 70);
        for isa in Isa::here() {
            let mut x = CpuBuffer { width, values: vec![f32::MAX; rows * width] };
            assert_eq!(first_non_finite(isa, &x), None);
            for bad in [f32::NAN, -f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
                for at in [rows * width - 1, 3 * width, 2 * width + 64] {
                    x.values[at] = bad;
                    assert_eq!(first_non_finite(isa, &x), Some(at / width), "{isa:?} {bad}");
                }
                x.values.fill(-f32::MAX);
            }
        }
    }

    #[test]
    fn rows_are_added_in_their_order_wherever_they_go() {
        let width = 21;
        let x = CpuBuffer { width, values: numbers(7, 40 * width) };
        for rows in [vec![], vec![0, 3, 3, 15, 16, 39], vec![39, 2, 2, 17], (0..40).collect()] {
            let y = CpuBuffer { width, values: numbers(8, rows.len() * width) };
            let weights = numbers(9, rows.len());
            let mut expected = x.values.clone();
            for (at, row) in rows.iter().enumerate() {
                for i in 0..width {
                    let product = weights[at] * y.values[at * width + i];
                    expected[*row as usize * width + i] += product;
                }
            }
            for isa in Isa::here() {
                let mut found = x.clone();
                scatter_add(isa, &mut found, &y, &rows, &weights);
                same(&found.values, &expected, &format!("{isa:?} {rows:?}"));
            }
        }
    }
}
