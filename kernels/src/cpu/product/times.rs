//! Strips of inputs times one half of weights: sums in registers over a run of k.
#![expect(
    unsafe_code,
    reason = "outputs of several threads lie between one another; registers load from pointers"
)]

use std::marker::PhantomData;

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

/// Where sums go: some rows and columns, f32 or i32 as the unit has it, that nobody else sees meanwhile.
pub(crate) struct Out<'a> {
    place: Place,
    values: PhantomData<&'a mut [u32]>,
}

impl<'a> Out<'a> {
    /// The first `rows` rows and `columns` columns of a slice, a row every `stride`.
    ///
    /// # Panics
    /// If the slice is too short.
    pub(crate) fn of(values: &'a mut [f32], stride: usize, rows: usize, columns: usize) -> Out<'a> {
        assert!(rows == 0 || values.len() >= (rows - 1) * stride + columns);
        // SAFETY: as has been checked, and borrowed for as long.
        unsafe { Out::at(values.as_mut_ptr(), stride, rows, columns) }
    }

    /// As [`Out::of`] for integers.
    ///
    /// # Panics
    /// If the slice is too short.
    pub(crate) fn of_integers(values: &'a mut [i32], stride: usize, rows: usize, columns: usize) -> Out<'a> {
        assert!(rows == 0 || values.len() >= (rows - 1) * stride + columns);
        // SAFETY: as has been checked, and borrowed for as long; both elements are 32 bits of anything.
        unsafe { Out::at(values.as_mut_ptr().cast(), stride, rows, columns) }
    }

    /// Rows and columns from `first` on.
    ///
    /// # Safety
    /// For as long as this lives, `first` points to `rows` rows every `stride` elements of `columns` elements each, and
    /// nobody else looks at them.
    ///
    /// # Panics
    /// If there are more columns than a half has.
    pub(crate) unsafe fn at(first: *mut f32, stride: usize, rows: usize, columns: usize) -> Out<'a> {
        assert!(columns <= HALF);
        Out { place: Place { first: first.cast(), stride, rows, columns }, values: PhantomData }
    }
}

/// An [`Out`] without its borrow, which the functions below pass on.
#[derive(Clone, Copy)]
pub(super) struct Place {
    first: *mut u32,
    /// Elements from one row to the next.
    stride: usize,
    rows: usize,
    columns: usize,
}

impl Place {
    /// `rows` rows from `row` on.
    ///
    /// # Safety
    /// They are among its rows.
    unsafe fn rows(self, row: usize, rows: usize) -> Place {
        // SAFETY: the caller's promise.
        Place { first: unsafe { self.first.add(row * self.stride) }, rows, ..self }
    }

    /// Copies some rows and columns.
    ///
    /// # Safety
    /// Both have as many rows and columns.
    unsafe fn copy_to(self, to: Place, rows: usize, columns: usize) {
        for row in 0..rows {
            // SAFETY: the caller's promise. Both may be the same place.
            unsafe { self.first.add(row * self.stride).copy_to(to.first.add(row * to.stride), columns) };
        }
    }
}

/// `out = x * w` over one run of k, beginning as `begin` says.
///
/// # Panics
/// If inputs or weights are too short.
pub(crate) fn multiply(isa: Isa, unit: Unit, product: Product<'_>, begin: Begin, out: Out<'_>) {
    check(product, out.place);
    run(isa, unit, product, begin, out.place, out.place);
}

/// As [`multiply`] where sums go on, or are added, from those in `from` and end in `out`: rows and columns of one strip.
///
/// # Panics
/// If inputs or weights are too short.
pub(crate) fn finish(
    isa: Isa,
    unit: Unit,
    product: Product<'_>,
    begin: Begin,
    from: &mut [f32; STRIP * HALF],
    out: Out<'_>,
) {
    let out = out.place;
    check(product, out);
    assert!(out.rows <= STRIP);
    run(isa, unit, product, begin, Place { first: from.as_mut_ptr().cast(), stride: HALF, ..out }, out);
}

fn check(Product { inputs, strip_words, weights, steps }: Product<'_>, out: Place) {
    let strips = out.rows.div_ceil(STRIP);
    assert!(
        inputs.len() >= strips.saturating_sub(1) * strip_words + steps * STRIP
            && weights.len() >= steps * HALF
    );
}

fn run(isa: Isa, unit: Unit, product: Product<'_>, begin: Begin, from: Place, out: Place) {
    match unit {
        Unit::Float | Unit::SwappedFloat => floats(isa, product, begin, from, out),
        Unit::Pair => pairs(isa, product, begin, from, out),
        Unit::Quad => quads(isa, product, begin, from, out),
        Unit::Short => shorts(isa, product, begin, from, out),
    }
}

for_each_isa! {
    /// [`multiply`] of [`Unit::Float`].
    fn floats(product: Product<'_>, begin: Begin, from: Place, out: Place) {
        avx512bf16: strips::<FloatAvx512, 12, 2>,
        avx512: strips::<FloatAvx512, 12, 2>,
        avx2: strips::<FloatAvx2, 6, 2>,
        portable: strips::<FloatPortable, 4, 4>,
    }
}

for_each_isa! {
    /// [`multiply`] of [`Unit::Pair`], which the other instruction sets have no operands of.
    fn pairs(product: Product<'_>, begin: Begin, from: Place, out: Place) {
        avx512bf16: strips::<PairAvx512, 12, 2>,
        avx512: no_such_unit,
        avx2: no_such_unit,
        portable: no_such_unit,
    }
}

for_each_isa! {
    /// [`multiply`] of [`Unit::Quad`], which the other instruction sets have no operands of.
    fn quads(product: Product<'_>, begin: Begin, from: Place, out: Place) {
        avx512bf16: strips::<QuadAvx512, 12, 2>,
        avx512: no_such_unit,
        avx2: no_such_unit,
        portable: no_such_unit,
    }
}

for_each_isa! {
    /// [`multiply`] of [`Unit::Short`].
    fn shorts(product: Product<'_>, begin: Begin, from: Place, out: Place) {
        avx512bf16: strips::<ShortAvx512, 12, 2>,
        avx512: strips::<ShortAvx512, 12, 2>,
        avx2: strips::<ShortAvx2, 6, 2>,
        portable: strips::<ShortPortable, 4, 4>,
    }
}

fn no_such_unit(_: Product<'_>, _: Begin, _: Place, _: Place) {
    unreachable!("operands are packed for the instruction set that multiplies them");
}

#[inline(always)]
fn strips<D: Dot, const ROWS: usize, const VECTORS: usize>(
    product: Product<'_>,
    begin: Begin,
    from: Place,
    out: Place,
) {
    for row in (0..out.rows).step_by(STRIP) {
        let part = Product { inputs: &product.inputs[row / STRIP * product.strip_words..], ..product };
        let rows = STRIP.min(out.rows - row);
        // SAFETY: rows of both from `row` on, by the promises that made them.
        let (from, out) = unsafe { (from.rows(row, rows), out.rows(row, rows)) };
        if rows == STRIP && out.columns == HALF {
            // SAFETY: inputs and weights have been checked; a whole strip of whole rows is inside both.
            unsafe { strip::<D, ROWS, VECTORS>(part, begin, from, out) };
        } else {
            edge::<D, ROWS, VECTORS>(part, begin, from, out);
        }
    }
}

/// A strip of which some rows or columns are not there.
#[inline(always)]
fn edge<D: Dot, const ROWS: usize, const VECTORS: usize>(
    product: Product<'_>,
    begin: Begin,
    from: Place,
    out: Place,
) {
    let mut tile = [0_u32; STRIP * HALF];
    let whole = Place { first: tile.as_mut_ptr(), stride: HALF, rows: STRIP, columns: HALF };
    // SAFETY: rows and columns of `from` and `out`, and as many of the tile, which is larger.
    unsafe {
        if begin != Begin::Zero {
            from.copy_to(whole, out.rows, out.columns);
        }
        strip::<D, ROWS, VECTORS>(product, begin, whole, whole);
        whole.copy_to(out, out.rows, out.columns);
    }
}

/// One strip, a block of registers at a time.
///
/// # Safety
/// `product` has a strip and a half of its steps; `from` and `out` have [`STRIP`] rows of [`HALF`] elements.
#[inline(always)]
unsafe fn strip<D: Dot, const ROWS: usize, const VECTORS: usize>(
    product: Product<'_>,
    begin: Begin,
    from: Place,
    out: Place,
) {
    const { assert!(STRIP.is_multiple_of(ROWS) && HALF.is_multiple_of(D::LANES * VECTORS)) };
    for row in (0..STRIP).step_by(ROWS) {
        for column in (0..HALF).step_by(D::LANES * VECTORS) {
            // SAFETY: the caller's promise: rows and columns of a block are inside the strip and the half.
            unsafe {
                let at =
                    |place: Place| Place { first: place.first.add(row * place.stride + column), ..place };
                let (inputs, weights) =
                    (product.inputs.as_ptr().add(row), product.weights.as_ptr().add(column));
                let next = inputs.wrapping_add(product.strip_words);
                block::<D, ROWS, VECTORS>([inputs, next], weights, product.steps, begin, at(from), at(out));
            }
        }
    }
}

/// One block of registers: `ROWS` inputs by `VECTORS` vectors of outputs. `next`: inputs of the strip that is probably next.
///
/// # Safety
/// As [`strip`], for pointers to the block's first row and column.
#[inline(always)]
#[expect(clippy::needless_range_loop, reason = "counted loops are what the compiler unrolls into registers")]
unsafe fn block<D: Dot, const ROWS: usize, const VECTORS: usize>(
    [inputs, next]: [*const u32; 2],
    weights: *const u32,
    steps: usize,
    begin: Begin,
    from: Place,
    out: Place,
) {
    // SAFETY: the caller's promise; a row of the block is one word of inputs a step, a vector `LANES` words of weights.
    unsafe {
        let mut sums = [[D::zero(); VECTORS]; ROWS];
        if begin == Begin::Output {
            for row in 0..ROWS {
                for vector in 0..VECTORS {
                    sums[row][vector] = D::load_sums(from.first.add(row * from.stride + vector * D::LANES));
                }
            }
        }
        for step in 0..steps {
            let (inputs, weights) = (inputs.add(step * STRIP), weights.add(step * HALF));
            prefetch(next.wrapping_add(step * STRIP));
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
                let mut sums = sums[row][vector];
                if begin == Begin::ZeroThenAdd {
                    sums = D::add(D::load_sums(from.first.add(row * from.stride + vector * D::LANES)), sums);
                }
                D::store_sums(sums, out.first.add(row * out.stride + vector * D::LANES));
            }
        }
    }
}

/// Asks for a cache line before it is needed: where inputs of one strip end and those of the next are far away, the
/// processor does not foresee them.
#[inline(always)]
fn prefetch(at: *const u32) {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: a prefetch touches nothing, whatever the address.
    unsafe {
        use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
        _mm_prefetch::<_MM_HINT_T0>(at.cast());
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = at;
}
