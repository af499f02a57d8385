//! Random packed matrices, one of every scheme that the backends must know.

use ctq_container::{Bytes, ScaleTable, TiledMatrix, Tiling};
use ctq_model::DType;
use ctq_model::matrix::{Code, Formula, Sharing};

use crate::random::Random;

/// What scales are stored as.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Number {
    Bf16,
    F16,
    F32,
    E4m3,
    /// A power of two, as MX has it.
    Exponent,
}

impl Number {
    const fn dtype(self) -> DType {
        match self {
            Number::Bf16 => DType::BF16,
            Number::F16 => DType::F16,
            Number::F32 => DType::F32,
            Number::E4m3 => DType::F8E4M3,
            Number::Exponent => DType::U8,
        }
    }
}

/// How a matrix is quantized.
#[derive(Clone, Copy, Debug)]
pub(super) struct Scheme {
    pub(super) name: &'static str,
    pub(super) code: Code,
    pub(super) formula: Formula,
    /// Numbers and sharing of the scales; `None`: dense.
    pub(super) scales: Option<(Number, Sharing)>,
    pub(super) zeros: Zeros,
    pub(super) columns: Columns,
}

/// Whether there are zero points.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Zeros {
    None,
    Stored,
}

/// Whether act-order has changed the order of the inputs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Columns {
    InOrder,
    Permuted,
}

const fn scheme(
    name: &'static str,
    code: Code,
    formula: Formula,
    scales: Option<(Number, Sharing)>,
) -> Scheme {
    Scheme { name, code, formula, scales, zeros: Zeros::None, columns: Columns::InOrder }
}

const fn int(name: &'static str, bits: u8, number: Number, sharing: Sharing) -> Scheme {
    scheme(name, Code::Int { bits }, Formula::Affine, Some((number, sharing)))
}

const fn fp8(name: &'static str, number: Number, sharing: Sharing) -> Scheme {
    scheme(name, Code::E4m3, Formula::Affine, Some((number, sharing)))
}

const G32: Sharing = Sharing::Group { size: 32 };
const G128: Sharing = Sharing::Group { size: 128 };

/// Every kind of code, scale dtype, sharing and zero point; widths of groups that fit tiles and one that does not.
pub(super) const SCHEMES: &[Scheme] = &[
    int("int4 g128", 4, Number::Bf16, G128),
    Scheme { zeros: Zeros::Stored, ..int("int4 g32 asymmetric", 4, Number::F16, G32) },
    Scheme { columns: Columns::Permuted, ..int("int4 g32 act-order", 4, Number::Bf16, G32) },
    int("int4 g40", 4, Number::F32, Sharing::Group { size: 40 }),
    int("int3 channel", 3, Number::Bf16, Sharing::Channel),
    int("int8 channel", 8, Number::F32, Sharing::Channel),
    Scheme { zeros: Zeros::Stored, ..int("int8 tensor asymmetric", 8, Number::Bf16, Sharing::Tensor) },
    int("int5 g32", 5, Number::F16, G32),
    fp8("fp8 channel", Number::Bf16, Sharing::Channel),
    fp8("fp8 tensor", Number::F32, Sharing::Tensor),
    fp8("fp8 block", Number::F32, Sharing::Block { rows: 128, columns: 128 }),
    scheme("nvfp4", Code::E2m1, Formula::Nvfp4, Some((Number::E4m3, Sharing::Group { size: 16 }))),
    scheme("mxfp4", Code::E2m1, Formula::Mx, Some((Number::Exponent, G32))),
    scheme("mxfp8", Code::E4m3, Formula::Mx, Some((Number::Exponent, G32))),
    scheme("bf16", Code::Bf16, Formula::Dense, None),
    scheme("f16", Code::F16, Formula::Dense, None),
    scheme("f32", Code::F32, Formula::Dense, None),
];

impl Scheme {
    /// The scheme of a name.
    pub(super) fn named(name: &str) -> Scheme {
        *SCHEMES.iter().find(|scheme| scheme.name == name).expect("a scheme of the list")
    }

    /// A random matrix.
    pub(super) fn matrix(self, n: usize, k: usize, random: &mut Random) -> TiledMatrix {
        let codes: Vec<u8> = (0..n * k).flat_map(|_| self.code(random)).collect();
        let scales = self.scales.map(|(number, sharing)| {
            let dtype = number.dtype();
            let (rows, columns) = sharing.shape(n, k);
            let stored: Vec<u8> = (0..rows * columns).flat_map(|_| scale(number, random)).collect();
            ScaleTable {
                dtype,
                sharing,
                bytes: ScaleTable::arrange(sharing, n, k, dtype.bytes(), &stored).into(),
            }
        });
        let zeros = scales.as_ref().filter(|_| self.zeros == Zeros::Stored).map(|table| {
            let (rows, columns) = table.sharing.shape(n, k);
            let zeros: Vec<u8> =
                (0..rows * columns).map(|_| (random.below(15) as i8 - 7).cast_unsigned()).collect();
            Bytes::from(ScaleTable::arrange(table.sharing, n, k, 1, &zeros))
        });
        let permutation = (self.columns == Columns::Permuted).then(|| {
            let mut order: Vec<u32> = (0..k as u32).collect();
            (1..k).for_each(|i| order.swap(i, random.below(i + 1)));
            Bytes::from(order.iter().flat_map(|input| input.to_le_bytes()).collect::<Vec<u8>>())
        });
        TiledMatrix {
            n,
            k,
            code: self.code,
            formula: self.formula,
            codes: Tiling::new(n, k, self.code.tile_bits()).tile(&codes).into(),
            scales,
            zeros,
            global_scale: (self.formula == Formula::Nvfp4).then(|| 321.5_f32.to_bits()),
            permutation,
        }
    }

    /// One code, in the bytes that a row-major matrix has of it.
    fn code(self, random: &mut Random) -> Vec<u8> {
        match self.code {
            Code::Int { bits } => vec![random.below(1 << bits) as u8],
            Code::E2m1 => vec![random.below(16) as u8],
            Code::E4m3 => loop {
                let code = random.below(256) as u8;
                // NaN codes are refused when a checkpoint is read.
                if code & 0x7f != 0x7f {
                    break vec![code];
                }
            },
            Code::Bf16 => half::bf16::from_f32(random.float()).to_le_bytes().to_vec(),
            Code::F16 => half::f16::from_f32(random.float()).to_le_bytes().to_vec(),
            Code::F32 => random.float().to_le_bytes().to_vec(),
        }
    }
}

/// One positive scale, the size that makes weights of about 1.
fn scale(number: Number, random: &mut Random) -> Vec<u8> {
    let value = 0.01 + 0.02 * random.float().abs();
    match number {
        Number::Bf16 => half::bf16::from_f32(value).to_le_bytes().to_vec(),
        Number::F16 => half::f16::from_f32(value).to_le_bytes().to_vec(),
        Number::F32 => value.to_le_bytes().to_vec(),
        Number::E4m3 => vec![8 + random.below(110) as u8],
        Number::Exponent => vec![118 + random.below(10) as u8],
    }
}
