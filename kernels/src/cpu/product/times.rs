//! Strips of inputs times one half of weights: sums in registers over a run of k.
#![expect(
    unsafe_code,
    reason = "outputs of several threads lie between one another; registers load from pointers"
)]

use super::dot::{Dot, FloatPortable, ShortPortable};
#[cfg(target_arch = "x86_64")]
use super::dot::{FloatAvx2, FloatAvx512, PairAvx512, QuadAvx512, ShortAvx2, ShortAvx512};
use super::{HALF, STRIP, Unit};
use crate::cpu::Isa;
use crate::cpu::isa::for_each_isa;

/// What sums begin with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Begin {
    /// Nothing; what was in the output is lost.
    Zero,
    /// The output: the chain goes on.
    Output,
    /// Nothing, and the sum is added to the output at the end: a chain of its own.
    ZeroThenAdd,
}

/// Inputs and weights over one run of k.
#[derive(Clone, Copy)]
pub(crate) struct Product<'a> {
    /// Strips, from the first step of the run on: [strip][steps of the whole][`STRIP`].
    pub(crate) inputs: &'a [u32],
    /// Words from one strip to the next.
    pub(crate) strip_words: usize,
    /// A half, from the first step of the run on: [steps][`HALF`].
    pub(crate) weights: &'a [u32],
    /// Words along k.
    pub(crate) steps: usize,
}

/// Where sums go: some rows and columns, f32 or i32 as the unit has it.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Out {
    first: *mut u32,
    /// Elements from one row to the next.
    stride: usize,
    rows: usize,
    columns: usize,
}

impl Out {
    /// The first `rows` rows and `columns` columns of a slice.
    ///
    /// # Panics
    /// If the slice is too short.
    pub(crate) fn of(values: &mut [f32], stride: usize, rows: usize, columns: usize) -> Out {
        assert!(columns <= HALF && (rows == 0 || values.len() >= (rows - 1) * stride + columns));
        Out { first: values.as_mut_ptr().cast(), stride, rows, columns }
    }

    /// As [`Out::of`] for integers.
    ///
    /// # Panics
    /// If the slice is too short.
    pub(crate) fn of_integers(values: &mut [i32], stride: usize, rows: usize, columns: usize) -> Out {
        assert!(columns <= HALF && (rows == 0 || values.len() >= (rows - 1) * stride + columns));
        Out { first: values.as_mut_ptr().cast(), stride, rows, columns }
    }

    /// Rows and columns from `first` on.
    ///
    /// # Safety
    /// As long as it is used, `first` points to `rows` rows every `stride` elements of `columns` elements each, and nobody
    /// else looks at them.
    pub(crate) unsafe fn at(first: *mut f32, stride: usize, rows: usize, columns: usize) -> Out {
        Out { first: first.cast(), stride, rows, columns }
    }
}

/// `out = x * w` over one run of k, beginning as `begin` says.
///
/// # Panics
/// If inputs or weights are too short.
pub(crate) fn multiply(isa: Isa, unit: Unit, product: Product<'_>, begin: Begin, out: Out) {
    if out.rows == 0 || out.columns == 0 {
        return;
    }
    let Product { inputs, strip_words, weights, steps } = product;
    let strips = out.rows.div_ceil(STRIP);
    assert!(inputs.len() >= (strips - 1) * strip_words + steps * STRIP && weights.len() >= steps * HALF);
    match unit {
        Unit::Float | Unit::SwappedFloat => floats(isa, product, begin, out),
        Unit::Pair => pairs(isa, product, begin, out),
        Unit::Quad => quads(isa, product, begin, out),
        Unit::Short => shorts(isa, product, begin, out),
    }
}

for_each_isa! {
    /// [`multiply`] of [`Unit::Float`].
    fn floats(product: Product<'_>, begin: Begin, out: Out) {
        avx512bf16: strips::<FloatAvx512, 12, 2>,
        avx512: strips::<FloatAvx512, 12, 2>,
        avx2: strips::<FloatAvx2, 6, 2>,
        portable: strips::<FloatPortable, 4, 4>,
    }
}

for_each_isa! {
    /// [`multiply`] of [`Unit::Pair`], which the other instruction sets have no operands of.
    fn pairs(product: Product<'_>, begin: Begin, out: Out) {
        avx512bf16: strips::<PairAvx512, 12, 2>,
        avx512: no_such_unit,
        avx2: no_such_unit,
        portable: no_such_unit,
    }
}

for_each_isa! {
    /// [`multiply`] of [`Unit::Quad`], which the other instruction sets have no operands of.
    fn quads(product: Product<'_>, begin: Begin, out: Out) {
        avx512bf16: strips::<QuadAvx512, 12, 2>,
        avx512: no_such_unit,
        avx2: no_such_unit,
        portable: no_such_unit,
    }
}

for_each_isa! {
    /// [`multiply`] of [`Unit::Short`].
    fn shorts(product: Product<'_>, begin: Begin, out: Out) {
        avx512bf16: strips::<ShortAvx512, 12, 2>,
        avx512: strips::<ShortAvx512, 12, 2>,
        avx2: strips::<ShortAvx2, 6, 2>,
        portable: strips::<ShortPortable, 4, 4>,
    }
}

fn no_such_unit(_: Product<'_>, _: Begin, _: Out) {
    unreachable!("operands are packed for the instruction set that multiplies them");
}

#[inline(always)]
fn strips<D: Dot, const ROWS: usize, const VECTORS: usize>(product: Product<'_>, begin: Begin, out: Out) {
    let whole = out.rows - out.rows % STRIP;
    for row in (0..out.rows).step_by(STRIP) {
        let inputs = &product.inputs[row / STRIP * product.strip_words..];
        // SAFETY: rows of `out` from `row` on, by the promise that made it.
        let first = unsafe { out.first.add(row * out.stride) };
        if row < whole && out.columns == HALF {
            // SAFETY: `multiply` has checked inputs and weights; a whole strip of whole rows is inside `out`.
            unsafe {
                strip::<D, ROWS, VECTORS>(inputs, product.weights, product.steps, begin, first, out.stride);
            }
        } else {
            let part = Out { first, rows: STRIP.min(out.rows - row), ..out };
            edge::<D, ROWS, VECTORS>(inputs, product, begin, part);
        }
    }
}

/// A strip of which some rows or columns are not there.
#[inline(always)]
fn edge<D: Dot, const ROWS: usize, const VECTORS: usize>(
    inputs: &[u32],
    product: Product<'_>,
    begin: Begin,
    out: Out,
) {
    let mut tile = [0_u32; STRIP * HALF];
    // SAFETY: rows and columns of `out`, and as many of the tile, which is larger.
    unsafe {
        if begin != Begin::Zero {
            for row in 0..out.rows {
                let from = out.first.add(row * out.stride);
                from.copy_to_nonoverlapping(tile.as_mut_ptr().add(row * HALF), out.columns);
            }
        }
        let to = tile.as_mut_ptr();
        strip::<D, ROWS, VECTORS>(inputs, product.weights, product.steps, begin, to, HALF);
        for row in 0..out.rows {
            let from = tile.as_ptr().add(row * HALF);
            from.copy_to_nonoverlapping(out.first.add(row * out.stride), out.columns);
        }
    }
}

/// One strip, a block of registers at a time.
///
/// # Safety
/// `inputs` has `steps` times [`STRIP`] words, `weights` `steps` times [`HALF`], `out` [`STRIP`] rows of [`HALF`] elements
/// every `stride`.
#[inline(always)]
unsafe fn strip<D: Dot, const ROWS: usize, const VECTORS: usize>(
    inputs: &[u32],
    weights: &[u32],
    steps: usize,
    begin: Begin,
    out: *mut u32,
    stride: usize,
) {
    const { assert!(STRIP.is_multiple_of(ROWS) && HALF.is_multiple_of(D::LANES * VECTORS)) };
    for row in (0..STRIP).step_by(ROWS) {
        for column in (0..HALF).step_by(D::LANES * VECTORS) {
            // SAFETY: the caller's promise: rows and columns of a block are inside the strip and the half.
            unsafe {
                block::<D, ROWS, VECTORS>(
                    inputs.as_ptr().add(row),
                    weights.as_ptr().add(column),
                    steps,
                    begin,
                    out.add(row * stride + column),
                    stride,
                );
            }
        }
    }
}

/// One block of registers: `ROWS` inputs by `VECTORS` vectors of outputs.
///
/// # Safety
/// As [`strip`], for pointers to the block's first row and column.
#[inline(always)]
#[expect(clippy::needless_range_loop, reason = "counted loops are what the compiler unrolls into registers")]
unsafe fn block<D: Dot, const ROWS: usize, const VECTORS: usize>(
    inputs: *const u32,
    weights: *const u32,
    steps: usize,
    begin: Begin,
    out: *mut u32,
    stride: usize,
) {
    // SAFETY: the caller's promise; a row of the block is one word of inputs a step, a vector `LANES` words of weights.
    unsafe {
        let mut sums = [[D::zero(); VECTORS]; ROWS];
        if begin == Begin::Output {
            for row in 0..ROWS {
                for vector in 0..VECTORS {
                    sums[row][vector] = D::load_sums(out.add(row * stride + vector * D::LANES));
                }
            }
        }
        for step in 0..steps {
            let (inputs, weights) = (inputs.add(step * STRIP), weights.add(step * HALF));
            let mut words = [D::load(weights); VECTORS];
            for vector in 1..VECTORS {
                words[vector] = D::load(weights.add(vector * D::LANES));
            }
            for row in 0..ROWS {
                let input = D::broadcast(inputs.add(row));
                for vector in 0..VECTORS {
                    sums[row][vector] = D::dot(sums[row][vector], input, words[vector]);
                }
            }
        }
        for row in 0..ROWS {
            for vector in 0..VECTORS {
                let to = out.add(row * stride + vector * D::LANES);
                match begin {
                    Begin::Zero | Begin::Output => D::store_sums(sums[row][vector], to),
                    Begin::ZeroThenAdd => D::add_to(sums[row][vector], to),
                }
            }
        }
    }
}
