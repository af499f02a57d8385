//! One row tile after another over all rows of inputs: cut into tasks, decoded panel by panel along k, multiplied where
//! the outputs lie. Knows how work is cut and how sums are blocked along k; not what the products mean.
#![expect(unsafe_code, reason = "tasks write columns of outputs that lie between one another")]

use std::cell::RefCell;
use std::ops::Range;

use ctq_container::TILE;
use rayon::prelude::*;

use crate::cpu::product::{Begin, HALF, Out, Product, STRIP, Strips, Unit, finish, multiply};
use crate::cpu::recycle::FLOATS;
use crate::cpu::weights::{HALVES, Panel, RowTile, Scratch};
use crate::cpu::{CpuBuffer, Isa};

/// Fewest rows that are worth decoding a panel for.
const MIN_ROWS: usize = 96;

/// Sums of one strip and one half.
pub(crate) const SUMS: usize = STRIP * HALF;

/// Rows whose sums of one row tile stay in the second-level cache from one panel to the next.
const MAX_ROWS: usize = 2052;

/// One row tile times some rows of inputs.
pub(crate) struct Task<'a> {
    /// Row tile of the whole matrix.
    pub(crate) tile: usize,
    /// Rows of inputs; they begin a strip.
    pub(crate) inputs: Range<usize>,
    /// Where the task's sums go.
    pub(crate) out: TaskOut<'a>,
}

/// The outputs of one task: rows every `stride`, of which nobody else sees `columns`.
pub(crate) struct TaskOut<'a> {
    /// The tile's first wanted column of the first row.
    first: *mut f32,
    stride: usize,
    rows: usize,
    columns: Range<usize>,
    buffer: std::marker::PhantomData<&'a mut [f32]>,
}

impl TaskOut<'_> {
    /// Wanted columns of one half, counted in the half.
    pub(crate) fn in_half(&self, half: usize) -> Range<usize> {
        let clamp = |column: usize| column.clamp(half * HALF, (half + 1) * HALF) - half * HALF;
        clamp(self.columns.start)..clamp(self.columns.end)
    }

    /// Wanted columns of one half of some rows, as products write them; `None` where they do not begin the half.
    fn of_half(&mut self, half: usize, rows: Range<usize>) -> Option<Out<'_>> {
        let columns = self.in_half(half);
        assert!(rows.end <= self.rows);
        // SAFETY: rows and columns of this task, which nobody else sees as long as it lives.
        (columns.start == 0).then(|| unsafe {
            let column = (half * HALF).saturating_sub(self.columns.start);
            Out::at(self.first.add(rows.start * self.stride + column), self.stride, rows.len(), columns.len())
        })
    }

    /// Wanted columns of one half, of one row.
    pub(crate) fn row(&mut self, row: usize, half: usize) -> &mut [f32] {
        assert!(row < self.rows);
        let columns = self.in_half(half);
        if columns.is_empty() {
            return &mut [];
        }
        let at = row * self.stride + half * HALF + columns.start - self.columns.start;
        // SAFETY: as in `half`; the borrow of `self` keeps it the only one.
        unsafe { std::slice::from_raw_parts_mut(self.first.add(at), columns.len()) }
    }
}

/// Buffers of one thread, kept from one task to the next.
#[derive(Default)]
pub(crate) struct Workspace {
    pub(crate) scratch: Scratch,
    pub(crate) panel: Panel,
    pub(crate) sums: Vec<f32>,
    pub(crate) integers: Vec<i32>,
}

thread_local! {
    static WORKSPACE: RefCell<Workspace> = RefCell::default();
}

/// Runs `compute` over row tiles and runs of input rows: outputs `rows` of the whole matrix for every row of inputs,
/// [count, rows]. A task writes all of its outputs.
pub(crate) fn tiles(
    count: usize,
    rows: Range<usize>,
    compute: impl Fn(Task<'_>, &mut Workspace) + Sync,
) -> CpuBuffer {
    let width = rows.len();
    if width == 0 || count == 0 {
        return CpuBuffer { width, values: Vec::new() };
    }
    let first = rows.start / TILE;
    let row_tiles = rows.end.div_ceil(TILE) - first;
    // Enough tasks for all threads; how rows are cut cannot be seen in the result.
    let cuts = (4 * rayon::current_num_threads()).div_ceil(row_tiles).max(1);
    let run = count.div_ceil(cuts).clamp(MIN_ROWS, MAX_ROWS).next_multiple_of(STRIP);
    let runs = count.div_ceil(run);
    let mut values = FLOATS.take(count * width);
    let base = Base(values.as_mut_ptr());
    (0..row_tiles * runs).into_par_iter().for_each(|task| {
        let base = &base;
        let (tile, start) = (first + task / runs, task % runs * run);
        let inputs = start..count.min(start + run);
        let columns = rows.start.max(tile * TILE)..rows.end.min((tile + 1) * TILE);
        // SAFETY: rows `inputs` and `columns` are inside `values`, and no other task has the same of both.
        let at = unsafe { base.0.add(start * width + columns.start - rows.start) };
        let columns = columns.start - tile * TILE..columns.end - tile * TILE;
        let buffer = std::marker::PhantomData;
        let out = TaskOut { first: at, stride: width, rows: inputs.len(), columns, buffer };
        WORKSPACE.with_borrow_mut(|workspace| compute(Task { tile, inputs, out }, workspace));
    });
    CpuBuffer { width, values }
}

/// The first of all outputs.
struct Base(*mut f32);

// SAFETY: tasks write disjoint elements behind it, and `tiles` waits for all of them.
unsafe impl Sync for Base {}

/// Sums of floats over all of k, in the order of the unit: in f32 chains that start again for each block, else in one
/// chain.
///
/// Sums wait for the next panel side by side: outputs of one strip, a row of a wide matrix apart, would fall into few
/// sets of every cache.
pub(crate) fn sums(isa: Isa, tile: &RowTile<'_>, x: &Strips, task: &mut Task<'_>, workspace: &mut Workspace) {
    let Workspace { scratch, panel, sums, .. } = workspace;
    let strips = task.inputs.len().div_ceil(STRIP);
    sums.resize(sums.len().max(strips * HALVES * SUMS), 0.0);
    for k in panels(x.unit, x.k) {
        tile.panel(x.unit, k.start / TILE..k.end.div_ceil(TILE), scratch, panel);
        for (index, sums) in sums.as_chunks_mut::<SUMS>().0.iter_mut().take(strips * HALVES).enumerate() {
            let (strip, half) = (index / HALVES, index % HALVES);
            if !task.out.in_half(half).is_empty() {
                Piece { isa, x, panel, k: k.clone(), strip, half }.add(task, sums);
            }
        }
    }
}

/// One strip and one half over one panel.
struct Piece<'a> {
    isa: Isa,
    x: &'a Strips,
    panel: &'a Panel,
    k: Range<usize>,
    strip: usize,
    half: usize,
}

impl Piece<'_> {
    /// Goes on with `sums`; with the last panel into the outputs.
    fn add(&self, task: &mut Task<'_>, sums: &mut [f32; SUMS]) {
        let Piece { isa, x, .. } = *self;
        let block = match x.unit {
            Unit::Float => block_length(x.k),
            Unit::SwappedFloat | Unit::Pair | Unit::Quad | Unit::Short => x.k,
        };
        let mut at = self.k.start;
        while at < self.k.end {
            // Up to the end of this panel or of this block, whichever comes first.
            let end = self.k.end.min((at / block + 1) * block);
            let begin = match (at, at.is_multiple_of(block)) {
                (0, _) => Begin::Zero,
                (_, true) => Begin::ZeroThenAdd,
                (_, false) => Begin::Output,
            };
            let product = self.product(task.inputs.start, at..end);
            if end == x.k {
                self.finish(product, begin, sums, task);
            } else {
                multiply(isa, x.unit, product, begin, Out::of(sums, HALF, STRIP, HALF));
            }
            at = end;
        }
    }

    fn product(&self, first_row: usize, k: Range<usize>) -> Product<'_> {
        let unit = self.x.unit;
        Product {
            inputs: self.x.from(first_row + self.strip * STRIP, unit.steps(k.start)),
            strip_words: self.x.strip_words(),
            weights: self.panel.half(self.half, unit.steps(k.start) - unit.steps(self.k.start)),
            steps: unit.steps(k.len()),
        }
    }

    fn finish(&self, product: Product<'_>, begin: Begin, sums: &mut [f32; SUMS], task: &mut Task<'_>) {
        let first = self.strip * STRIP;
        let rows = first..task.inputs.len().min(first + STRIP);
        if let Some(out) = task.out.of_half(self.half, rows.clone()) {
            return finish(self.isa, self.x.unit, product, begin, sums, out);
        }
        // Ranks that share a tile have columns from the middle of a half on.
        multiply(self.isa, self.x.unit, product, begin, Out::of(sums, HALF, STRIP, HALF));
        let columns = task.out.in_half(self.half);
        for (row, sums) in rows.zip(sums.chunks_exact(HALF)) {
            task.out.row(row, self.half).copy_from_slice(&sums[columns.clone()]);
        }
    }
}

/// Runs of whole k tiles that are decoded together: a half of them stays in the first-level cache beside a strip of
/// inputs. No block of an f32 sum reaches from one into another.
pub(crate) fn panels(unit: Unit, k: usize) -> impl Iterator<Item = Range<usize>> {
    let tiles = match unit {
        // Blocks of up to two halves of 192, or of 192.
        Unit::Float if k <= 2 * LONGEST_BLOCK => 2 * LONGEST_BLOCK / TILE,
        Unit::Float | Unit::SwappedFloat => LONGEST_BLOCK / TILE,
        Unit::Pair | Unit::Short => 8,
        Unit::Quad => 16,
    };
    (0..k).step_by(tiles * TILE).map(move |start| start..k.min(start + tiles * TILE))
}

/// Most k of one block of an f32 sum.
const LONGEST_BLOCK: usize = 192;

/// k of one block of an f32 sum: all up to 192, halves up to 384, else 192 with the rest last.
///
/// Restarting a chain keeps its rounding error small. These lengths are those that torch 2.14 with MKL was measured to
/// use at eleven of twelve widths, not at k = 193 (`golden/torch_orders.py`).
pub(crate) fn block_length(k: usize) -> usize {
    if k > LONGEST_BLOCK && k <= 2 * LONGEST_BLOCK { k.div_ceil(2) } else { LONGEST_BLOCK.min(k.max(1)) }
}
