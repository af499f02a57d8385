//! `--acts kernel`: products of codes, exact where the arithmetic is, scales applied to the sums.
//!
//! * integers: sums of a segment of k are exact in 32 bits, rounded once to f32;
//! * fp8: products are exact, sums are f32 chains;
//! * NVFP4 and MX: code times local scale is exact on both sides, sums are one f32 chain, global scales come last.
//!
//! A segment is the longest run of k in which neither side changes its scale.

use std::ops::Range;

use ctq_container::TILE;
use ctq_model::scheme::Activation;

use crate::backend::KernelError;
use crate::cpu::isa::for_each_isa;
use crate::cpu::matrix::{CpuMatrix, ScaleUse};
use crate::cpu::product::{Begin, HALF, Out, Product, STRIP, Strips, Unit, multiply};
use crate::cpu::quantize::CodeScales;
use crate::cpu::row_tiles::{SUMS, Task, TaskOut, Workspace, panels, sums, tiles};
use crate::cpu::weights::{Decode, HALVES, RowTile};
use crate::cpu::{CpuBuffer, Isa};
use crate::exact_product::{CodeProduct, Sums, Weights};

/// Codes times their local scales on both sides; the sums are divided by both global scales.
pub(crate) fn scaled(
    isa: Isa,
    x: &Strips,
    (activation, global): (Activation, f32),
    weight: &CpuMatrix,
    rows: Range<usize>,
) -> Result<CpuBuffer, KernelError> {
    weights(weight).scaled(activation)?;
    let divisor = weight.global_scale() * global;
    Ok(tiles(x.rows, rows, |mut task, workspace| {
        let tile = RowTile::new(isa, weight, task.tile, Decode::Scaled);
        sums(isa, &tile, x, &mut task, workspace);
        for row in 0..task.inputs.len() {
            for half in 0..HALVES {
                divide(isa, task.out.row(row, half), divisor);
            }
        }
    }))
}

/// Codes; sums of a segment are multiplied with the scales of both sides.
pub(crate) fn codes(
    isa: Isa,
    x: &Strips,
    scales: &CodeScales,
    weight: &CpuMatrix,
    rows: Range<usize>,
) -> Result<CpuBuffer, KernelError> {
    let CodeProduct { step, sums: kind } = weights(weight).codes(scales.activation, scales.segment)?;
    let input_sums = match kind {
        Sums::Integers if weight.tiled.zeros.is_some() => x.sums(step),
        Sums::Integers | Sums::Floats => Vec::new(),
    };
    let segments = Segments { isa, x, scales, weight, step, input_sums };
    Ok(tiles(x.rows, rows, |task, workspace| segments.run(task, workspace)))
}

fn weights(weight: &CpuMatrix) -> Weights {
    Weights {
        code: weight.tiled.code,
        formula: weight.tiled.formula,
        k: weight.k(),
        group: weight.group_size(),
        permuted: weight.permutation.is_some(),
        zeros: weight.tiled.zeros.is_some(),
    }
}

/// One product of codes: sums of each segment of k, folded into the outputs with the scales of both sides.
struct Segments<'a> {
    isa: Isa,
    x: &'a Strips,
    scales: &'a CodeScales,
    weight: &'a CpuMatrix,
    /// k of one segment.
    step: usize,
    /// [rows, segments]: sums of the words of inputs, where weights have zero points.
    input_sums: Vec<i32>,
}

/// What a segment's sums are multiplied with and freed of, of the columns of one row tile.
struct Columns {
    /// [groups][64].
    scales: Vec<f32>,
    /// [groups][64] of zero points, or none.
    zeros: Vec<i32>,
    /// [segments][64]: sums of the weights' codes.
    sums: Vec<i32>,
}

impl Segments<'_> {
    fn run(&self, mut task: Task<'_>, workspace: &mut Workspace) {
        let (unit, k) = (self.x.unit, self.x.k);
        let decode = if self.floats() { Decode::Codes } else { Decode::Integers };
        let tile = RowTile::new(self.isa, self.weight, task.tile, decode);
        let mut columns = self.columns(task.tile);
        let strips = task.inputs.len().div_ceil(STRIP);
        for run in panels(unit, k) {
            let tiles = run.start / TILE..run.end.div_ceil(TILE);
            tile.panel(unit, tiles, &mut workspace.scratch, &mut workspace.panel);
            for half in 0..HALVES {
                if task.out.in_half(half).is_empty() {
                    continue;
                }
                self.sum_columns(run.clone(), half, workspace, &mut columns);
                for strip in 0..strips {
                    self.strip(run.clone(), (half, strip, strips), &mut task, workspace, &columns);
                }
            }
        }
    }

    fn columns(&self, tile: usize) -> Columns {
        let zeros = self.weight.row_zeros(tile).iter().map(|zero| *zero as i32).collect();
        let scales = self.weight.row_scales(tile, ScaleUse::Stored);
        Columns { scales, zeros, sums: vec![0; self.x.k.div_ceil(self.step) * TILE] }
    }

    /// Runs of one panel that are in one segment.
    fn pieces(&self, panel: Range<usize>) -> impl Iterator<Item = Range<usize>> {
        let step = self.step;
        let mut at = panel.start;
        std::iter::from_fn(move || {
            let start = at;
            at = panel.end.min((start / step + 1) * step);
            (start < panel.end).then_some(start..at)
        })
    }

    /// Adds up the integers of a panel's columns: a strip of ones times the weights.
    fn sum_columns(
        &self,
        panel: Range<usize>,
        half: usize,
        workspace: &mut Workspace,
        columns: &mut Columns,
    ) {
        let ones = match self.x.unit {
            Unit::Quad => 0x0101_0101,
            Unit::Short => 0x0001_0001,
            Unit::Float | Unit::SwappedFloat | Unit::Pair => return,
        };
        for piece in self.pieces(panel.clone()) {
            let steps = self.x.unit.steps(piece.len());
            let mut inputs = vec![0; steps * STRIP];
            inputs.iter_mut().step_by(STRIP).for_each(|word| *word = ones);
            let weights = workspace.panel.half(half, self.x.unit.steps(piece.start - panel.start));
            let product = Product { inputs: &inputs, strip_words: steps * STRIP, weights, steps };
            let sums = &mut columns.sums[piece.start / self.step * TILE + half * HALF..][..HALF];
            multiply(self.isa, self.x.unit, product, Begin::Output, Out::of_integers(sums, HALF, 1, HALF));
        }
    }

    /// One strip and one half over one panel.
    fn strip(
        &self,
        panel: Range<usize>,
        (half, strip, strips): (usize, usize, usize),
        task: &mut Task<'_>,
        workspace: &mut Workspace,
        columns: &Columns,
    ) {
        let (unit, k, step) = (self.x.unit, self.x.k, self.step);
        let first_row = task.inputs.start + strip * STRIP;
        // Sums of a segment that reaches into another panel wait for it; others are used at once.
        let waits = !panel.start.is_multiple_of(step) || panel.end != k && !panel.end.is_multiple_of(step);
        let at = if waits { (half * strips + strip) * SUMS } else { 0 };
        workspace.integers.resize(workspace.integers.len().max(at + SUMS), 0);
        for piece in self.pieces(panel.clone()) {
            let product = Product {
                inputs: self.x.from(first_row, unit.steps(piece.start)),
                strip_words: self.x.strip_words(),
                weights: workspace.panel.half(half, unit.steps(piece.start - panel.start)),
                steps: unit.steps(piece.len()),
            };
            let begin = if piece.start.is_multiple_of(step) { Begin::Zero } else { Begin::Output };
            let sums = &mut workspace.integers[at..at + SUMS];
            multiply(self.isa, unit, product, begin, Out::of_integers(sums, HALF, STRIP, HALF));
            if piece.end == k || piece.end.is_multiple_of(step) {
                let rows = first_row..task.inputs.end.min(first_row + STRIP);
                self.fold(piece.start / step, half, rows, sums, task, columns);
            }
        }
    }

    /// One segment's sums of a strip into the outputs.
    fn fold(
        &self,
        segment: usize,
        half: usize,
        rows: Range<usize>,
        sums: &[i32],
        task: &mut Task<'_>,
        columns: &Columns,
    ) {
        let start = segment * self.step;
        let group = start / self.weight.group_size() * TILE + half * HALF;
        let per_row = self.scales.per_row(self.x.k);
        let fold = Fold {
            floats: self.floats(),
            sums,
            weight_scales: columns.scales[group..].first_chunk().expect("a half's scales"),
            column_sums: columns.sums[segment * TILE + half * HALF..].first_chunk().expect("a half's sums"),
            zeros: columns.zeros.get(group..group + HALF).unwrap_or_default(),
            length: self.step.min(self.x.k - start) as i32,
            begins: start == 0,
            // A scale that does not change along k is applied once, at the end.
            ends: per_row == 1 && start + self.step >= self.x.k,
            varies: per_row > 1,
        };
        let at = |row: usize| row * per_row + start / self.scales.segment;
        let mut factors = [RowFactors::default(); STRIP];
        for (factors, row) in factors.iter_mut().zip(rows.clone()) {
            let offset = self.scales.offsets.get(at(row)).copied().unwrap_or(0.0);
            *factors = RowFactors {
                scale: self.scales.scales[at(row)],
                offset,
                far: (offset - self.shift()).abs() > NEAR,
                input_sum: self
                    .input_sums
                    .get(row * self.x.k.div_ceil(self.step) + segment)
                    .copied()
                    .unwrap_or(0),
            };
        }
        let first = rows.start - task.inputs.start;
        fold_rows(self.isa, &fold, &factors[..rows.len()], &mut task.out, first, half);
    }

    /// What words are above codes.
    fn shift(&self) -> f32 {
        match self.x.unit {
            Unit::Quad => 128.0,
            Unit::Float | Unit::SwappedFloat | Unit::Pair | Unit::Short => 0.0,
        }
    }

    fn floats(&self) -> bool {
        match self.x.unit {
            Unit::Float | Unit::SwappedFloat | Unit::Pair => true,
            Unit::Quad | Unit::Short => false,
        }
    }
}

/// One segment's sums of one strip, and what makes outputs of them.
pub(super) struct Fold<'a> {
    /// Whether the sums are the bits of floats.
    floats: bool,
    /// [12][32].
    sums: &'a [i32],
    /// Of each column.
    weight_scales: &'a [f32; HALF],
    /// Sums of the weights' codes, of each column.
    column_sums: &'a [i32; HALF],
    /// Zero points of each column, or none.
    zeros: &'a [i32],
    /// k of the segment.
    length: i32,
    /// Whether this is the first segment.
    begins: bool,
    /// Whether the rows' scales come now, after the last segment.
    ends: bool,
    /// Whether rows have a scale for each segment.
    varies: bool,
}

/// What belongs to one row of inputs in one segment.
#[derive(Clone, Copy, Default)]
pub(super) struct RowFactors {
    scale: f32,
    /// What inputs are shifted by: `word - offset` is the code less its zero point.
    offset: f32,
    /// Whether the zero point is beyond [`NEAR`].
    far: bool,
    /// Sum of the words, where weights have zero points.
    input_sum: i32,
}

for_each_isa! {
    /// Adds a segment to rows of outputs, from row `first` of the task on.
    fn fold_rows(fold: &Fold<'_>, rows: &[RowFactors], out: &mut TaskOut<'_>, first: usize, half: usize) fold_each
}

#[inline(always)]
fn fold_each(fold: &Fold<'_>, rows: &[RowFactors], out: &mut TaskOut<'_>, first: usize, half: usize) {
    let columns = out.in_half(half);
    let (lines, _) = fold.sums.as_chunks::<HALF>();
    for (row, (factors, line)) in rows.iter().zip(lines).enumerate() {
        let row = out.row(first + row, half);
        // Whole halves are what the compiler makes vectors of.
        if let Ok(out) = <&mut [f32; HALF]>::try_from(&mut *row) {
            fold_line(fold, factors, line, out);
        } else {
            let mut whole = [0.0; HALF];
            whole[columns.clone()].copy_from_slice(row);
            fold_line(fold, factors, line, &mut whole);
            row.copy_from_slice(&whole[columns.clone()]);
        }
    }
}

#[inline(always)]
fn fold_line(fold: &Fold<'_>, factors: &RowFactors, line: &[i32; HALF], out: &mut [f32; HALF]) {
    let sums = if fold.floats {
        line.map(|bits| f32::from_bits(bits.cast_unsigned()))
    } else if factors.far {
        shift_far_back(fold, factors, line)
    } else if fold.zeros.is_empty() {
        let offset = factors.offset as i32;
        let mut sums = [0.0; HALF];
        for (sum, (line, column)) in sums.iter_mut().zip(line.iter().zip(fold.column_sums)) {
            *sum = line.wrapping_sub(offset.wrapping_mul(*column)) as f32;
        }
        sums
    } else {
        shift_back(fold, factors, line)
    };
    let scale = if fold.varies { factors.scale } else { 1.0 };
    for ((out, sum), weight) in out.iter_mut().zip(sums).zip(fold.weight_scales) {
        let begin = if fold.begins { 0.0 } else { *out };
        *out = begin + sum * (weight * scale);
    }
    if fold.ends {
        out.iter_mut().for_each(|out| *out *= factors.scale);
    }
}

/// Zero points up to here leave a code less its own within 256 in magnitude, and sums within 32 bits: of dynamic scales
/// those of inputs around zero.
const NEAR: f32 = 128.0;

/// `sum of (u - o)(w - z) = sum of u w - o sum of w - z (sum of u - o length)`, in 32 bits.
#[inline(always)]
fn shift_back(fold: &Fold<'_>, factors: &RowFactors, line: &[i32; HALF]) -> [f32; HALF] {
    let offset = factors.offset as i32;
    let inputs = factors.input_sum.wrapping_sub(offset.wrapping_mul(fold.length));
    std::array::from_fn(|column| {
        let shifted = line[column].wrapping_sub(offset.wrapping_mul(fold.column_sums[column]));
        shifted.wrapping_sub(fold.zeros[column].wrapping_mul(inputs)) as f32
    })
}

/// As [`shift_back`] in f64, for inputs that are all far from zero.
#[inline(always)]
fn shift_far_back(fold: &Fold<'_>, factors: &RowFactors, line: &[i32; HALF]) -> [f32; HALF] {
    let offset = f64::from(factors.offset);
    let inputs = f64::from(factors.input_sum) - offset * f64::from(fold.length);
    std::array::from_fn(|column| {
        let zero = fold.zeros.get(column).map_or(0.0, |zero| f64::from(*zero));
        (f64::from(line[column]) - offset * f64::from(fold.column_sums[column]) - zero * inputs) as f32
    })
}

for_each_isa! {
    /// Divides all by one number.
    fn divide(values: &mut [f32], divisor: f32) divide_each
}

#[inline(always)]
fn divide_each(values: &mut [f32], divisor: f32) {
    values.iter_mut().for_each(|value| *value /= divisor);
}
