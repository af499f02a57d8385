//! The definitions written out: numbers of each format in f64, the nearest code by trying all of them, and random
//! values that are the same on every machine. Slow on purpose, and shares nothing with the kernels.

use ctq_container::{Bytes, ScaleTable, TiledMatrix, Tiling};
use ctq_kernels::Backend;
use ctq_kernels::cpu::{Cpu, Isa};
use ctq_model::DType;
use ctq_model::matrix::{Code, Formula, Sharing};

/// The CPU once for each instruction set that this machine has.
pub(crate) fn cpus() -> Vec<Cpu> {
    Isa::ALL.into_iter().filter_map(Cpu::with_isa).collect()
}

/// Runs `compute` on every instruction set; all must give the same bits.
pub(crate) fn on_every_isa(compute: impl Fn(&Cpu) -> Vec<f32>) -> Vec<f32> {
    let mut cpus = cpus().into_iter();
    let first = compute(&cpus.next().expect("the portable instruction set is always there"));
    for cpu in cpus {
        assert!(same_bits(&compute(&cpu), &first), "{} gives other bits", cpu.identity().isa);
    }
    first
}

pub(crate) fn same_bits(a: &[f32], b: &[f32]) -> bool {
    a.len() == b.len() && a.iter().zip(b).all(|(a, b)| a.to_bits() == b.to_bits())
}

/// A linear congruential generator.
pub(crate) struct Random(u64);

impl Random {
    pub(crate) fn new(seed: u64) -> Random {
        Random(seed)
    }

    pub(crate) fn next(&mut self) -> u32 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 32) as u32
    }

    /// Uniform in -1..1.
    pub(crate) fn float(&mut self) -> f32 {
        self.next() as f32 / 2_147_483_648.0 - 1.0
    }

    pub(crate) fn floats(&mut self, count: usize) -> Vec<f32> {
        (0..count).map(|_| self.float()).collect()
    }

    pub(crate) fn codes(&mut self, count: usize, allowed: impl Fn(u8) -> bool) -> Vec<u8> {
        let codes: Vec<u8> = (0..=255).filter(|code| allowed(*code)).collect();
        (0..count).map(|_| codes[self.next() as usize % codes.len()]).collect()
    }
}

/// Value of an fp8 E4M3 code: sign, 4 bits of exponent with bias 7, 3 bits of mantissa.
pub(crate) fn e4m3(code: u8) -> f64 {
    let (exponent, mantissa) = (i32::from(code >> 3 & 15), f64::from(code & 7));
    let magnitude =
        if exponent == 0 { mantissa / 512.0 } else { (1.0 + mantissa / 8.0) * 2.0_f64.powi(exponent - 7) };
    if code >= 128 { -magnitude } else { magnitude }
}

/// Value of an fp4 E2M1 code.
pub(crate) fn e2m1(code: u8) -> f64 {
    let magnitude = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0][usize::from(code & 7)];
    if code >= 8 { -magnitude } else { magnitude }
}

/// The nearest value of a code's positive half, `top` the largest code, the even code of two that are as near.
fn nearest(x: f64, top: u8, value: impl Fn(u8) -> f64) -> f64 {
    let magnitude = x.abs();
    let distance = |code: u8| (value(code) - magnitude).abs();
    let best = (0..=top).min_by(|a, b| distance(*a).total_cmp(&distance(*b)).then((a & 1).cmp(&(b & 1))));
    value(best.expect("there are codes")) * x.signum()
}

/// The nearest fp8 number.
pub(crate) fn to_e4m3(x: f32) -> f64 {
    nearest(f64::from(x), 0x7e, e4m3)
}

/// The nearest fp4 number.
pub(crate) fn to_e2m1(x: f32) -> f64 {
    nearest(f64::from(x), 7, e2m1)
}

/// The nearest bf16 number, ties to even, by dividing by the unit in its last place.
pub(crate) fn to_bf16(x: f32) -> f64 {
    let x = f64::from(x);
    if x == 0.0 {
        return x;
    }
    let unit = 2.0_f64.powi(x.abs().log2().floor() as i32 - 7);
    (x / unit).round_ties_even() * unit
}

/// The largest magnitude.
pub(crate) fn amax(run: &[f32]) -> f32 {
    run.iter().fold(0.0, |largest, x| x.abs().max(largest))
}

/// Frobenius norm of the difference over that of `expected`.
pub(crate) fn relative(found: &[f32], expected: &[f64]) -> f64 {
    assert_eq!(found.len(), expected.len());
    let difference: f64 = found.iter().zip(expected).map(|(a, b)| (f64::from(*a) - b).powi(2)).sum();
    (difference / expected.iter().map(|b| b * b).sum::<f64>()).sqrt()
}

/// A matrix in tiles from row-major codes and scales.
pub(crate) struct Packed {
    pub(crate) n: usize,
    pub(crate) k: usize,
    pub(crate) code: Code,
    pub(crate) formula: Formula,
    pub(crate) codes: Vec<u8>,
    /// Dtype, sharing, little-endian elements.
    pub(crate) scales: Option<(DType, Sharing, Vec<u8>)>,
    /// In the order of the scales.
    pub(crate) zeros: Option<Vec<i8>>,
    pub(crate) global_scale: Option<f32>,
}

impl Packed {
    pub(crate) fn tiled(&self) -> TiledMatrix {
        let (n, k) = (self.n, self.k);
        let scales = self.scales.as_ref().map(|(dtype, sharing, bytes)| ScaleTable {
            dtype: *dtype,
            sharing: *sharing,
            bytes: ScaleTable::arrange(*sharing, n, k, dtype.bytes(), bytes).into(),
        });
        let zeros = self.zeros.as_ref().zip(self.scales.as_ref()).map(|(zeros, (_, sharing, _))| {
            let zeros: Vec<u8> = zeros.iter().map(|zero| zero.cast_unsigned()).collect();
            Bytes::from(ScaleTable::arrange(*sharing, n, k, 1, &zeros))
        });
        TiledMatrix {
            n,
            k,
            code: self.code,
            formula: self.formula,
            codes: Tiling::new(n, k, self.code.tile_bits()).tile(&self.codes).into(),
            scales,
            zeros,
            global_scale: self.global_scale.map(f32::to_bits),
            permutation: None,
        }
    }

    /// Index of the scale of a code.
    pub(crate) fn scale_index(&self, row: usize, column: usize) -> usize {
        let (_, sharing, _) = self.scales.as_ref().expect("a quantized matrix has scales");
        let columns = sharing.shape(self.n, self.k).1;
        match *sharing {
            Sharing::Tensor => 0,
            Sharing::Channel => row,
            Sharing::Group { size } => row * columns + column / size,
            Sharing::Block { rows, columns: width } => row / rows * columns + column / width,
        }
    }
}
