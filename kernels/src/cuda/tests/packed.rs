//! Random packed matrices of every scheme, and operands for them, on the CPU and on the emulated device.

use ctq_container::{Bytes, ScaleTable, TiledMatrix, Tiling};
use ctq_model::DType;
use ctq_model::matrix::{Code, Formula, Sharing};

use crate::Compute;
use crate::cpu::CpuOperand;
use crate::cpu::product::Unit;
use crate::cpu::quantize::{CodeScales, OperandKind as CpuKind};
use crate::cuda::buffer::{CudaOperand, OperandKind, Stored, upload_floats};
use crate::cuda::device::Device;
use crate::cuda::emulated::{Emulated, EmulatedMemory};

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

    fn below(&mut self, count: usize) -> usize {
        self.next() as usize % count
    }

    /// Uniform in -1..1.
    pub(crate) fn float(&mut self) -> f32 {
        self.next() as f32 / 2_147_483_648.0 - 1.0
    }

    pub(crate) fn floats(&mut self, count: usize) -> Vec<f32> {
        (0..count).map(|_| self.float()).collect()
    }

    /// All of 0..count in some order.
    fn order(&mut self, count: usize) -> Vec<u32> {
        let mut order: Vec<u32> = (0..count as u32).collect();
        for index in (1..count).rev() {
            order.swap(index, self.below(index + 1));
        }
        order
    }
}

/// What a matrix is.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Scheme {
    pub(crate) code: Code,
    pub(crate) formula: Formula,
    pub(crate) scales: Option<(DType, Sharing)>,
    pub(crate) zeros: Zeros,
    pub(crate) order: Columns,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Zeros {
    None,
    Some,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Columns {
    InOrder,
    Permuted,
}

pub(crate) const fn affine(code: Code, dtype: DType, sharing: Sharing) -> Scheme {
    let scales = Some((dtype, sharing));
    Scheme { code, formula: Formula::Affine, scales, zeros: Zeros::None, order: Columns::InOrder }
}

pub(crate) const fn integer(bits: u8, sharing: Sharing) -> Scheme {
    affine(Code::Int { bits }, DType::BF16, sharing)
}

pub(crate) const fn group(size: usize) -> Sharing {
    Sharing::Group { size }
}

pub(crate) const NVFP4: Scheme =
    Scheme { formula: Formula::Nvfp4, ..affine(Code::E2m1, DType::F8E4M3, group(16)) };
pub(crate) const MXFP4: Scheme = Scheme { formula: Formula::Mx, ..affine(Code::E2m1, DType::U8, group(32)) };
pub(crate) const MXFP8: Scheme = Scheme { formula: Formula::Mx, ..affine(Code::E4m3, DType::U8, group(32)) };

pub(crate) const fn dense(code: Code) -> Scheme {
    Scheme { code, formula: Formula::Dense, scales: None, zeros: Zeros::None, order: Columns::InOrder }
}

impl Scheme {
    pub(crate) const fn with_zeros(self) -> Scheme {
        Scheme { zeros: Zeros::Some, ..self }
    }

    pub(crate) const fn permuted(self) -> Scheme {
        Scheme { order: Columns::Permuted, ..self }
    }
}

/// At least one of everything.
pub(crate) fn schemes() -> Vec<Scheme> {
    let mut all: Vec<Scheme> = (1..=8).map(|bits| integer(bits, group(32))).collect();
    let int4 = Code::Int { bits: 4 };
    let int8 = Code::Int { bits: 8 };
    for dtype in [DType::BF16, DType::F16, DType::F32] {
        for sharing in [Sharing::Tensor, Sharing::Channel, group(16), group(5), group(48), group(128)] {
            all.push(affine(int4, dtype, sharing).with_zeros());
            all.push(affine(Code::E4m3, dtype, sharing));
        }
        for (rows, columns) in [(128, 128), (24, 32), (7, 10)] {
            all.push(affine(Code::E4m3, dtype, Sharing::Block { rows, columns }));
            all.push(affine(int8, dtype, Sharing::Block { rows, columns }).with_zeros());
        }
    }
    all.push(integer(4, group(32)).with_zeros().permuted());
    all.push(affine(int8, DType::F16, group(20)).permuted());
    all.extend([NVFP4, MXFP4, MXFP8]);
    all.extend([Code::Bf16, Code::F16, Code::F32].map(dense));
    all
}

/// A random `n` x `k` matrix.
pub(crate) fn tiled(n: usize, k: usize, scheme: Scheme, seed: u64) -> TiledMatrix {
    let random = &mut Random::new(seed);
    let count = scheme.scales.map_or(0, |(_, sharing)| {
        let (rows, columns) = sharing.shape(n, k);
        rows * columns
    });
    let scales = scheme.scales.map(|(dtype, sharing)| {
        let stored: Vec<u8> = (0..count).flat_map(|_| scale(random, dtype)).collect();
        ScaleTable {
            dtype,
            sharing,
            bytes: ScaleTable::arrange(sharing, n, k, dtype.bytes(), &stored).into(),
        }
    });
    let zeros = scheme.scales.filter(|_| scheme.zeros == Zeros::Some).map(|(_, sharing)| {
        let zeros: Vec<u8> = (0..count).map(|_| (random.below(17) as i8 - 8).cast_unsigned()).collect();
        Bytes::from(ScaleTable::arrange(sharing, n, k, 1, &zeros))
    });
    let codes: Vec<u8> = (0..n * k).flat_map(|_| code(random, scheme.code)).collect();
    let permutation = (scheme.order == Columns::Permuted)
        .then(|| random.order(k).iter().flat_map(|column| column.to_le_bytes()).collect::<Vec<u8>>().into());
    TiledMatrix {
        n,
        k,
        code: scheme.code,
        formula: scheme.formula,
        codes: Tiling::new(n, k, scheme.code.tile_bits()).tile(&codes).into(),
        scales,
        zeros,
        global_scale: (scheme.formula == Formula::Nvfp4).then(|| (2_688.0_f32 / 0.731).to_bits()),
        permutation,
    }
}

fn scale(random: &mut Random, dtype: DType) -> Vec<u8> {
    let value = random.float().abs() * 0.3 + 0.01;
    match dtype {
        DType::BF16 => half::bf16::from_f32(value).to_le_bytes().to_vec(),
        DType::F16 => half::f16::from_f32(value).to_le_bytes().to_vec(),
        DType::F32 => value.to_le_bytes().to_vec(),
        DType::F8E4M3 => vec![random.below(0x7f) as u8],
        _ => vec![118 + random.below(12) as u8],
    }
}

fn code(random: &mut Random, code: Code) -> Vec<u8> {
    let value = random.float();
    match code {
        Code::Int { bits } => vec![random.below(1 << bits) as u8],
        Code::E2m1 => vec![random.below(16) as u8],
        Code::E4m3 => vec![(random.below(0x7f) | random.below(2) << 7) as u8],
        Code::Bf16 => half::bf16::from_f32(value).to_le_bytes().to_vec(),
        Code::F16 => half::f16::from_f32(value).to_le_bytes().to_vec(),
        Code::F32 => value.to_le_bytes().to_vec(),
    }
}

/// An operand of the CPU backend on the device, as the device's own preparation would leave it.
pub(crate) fn operand(device: &Emulated, x: &CpuOperand, compute: Compute) -> CudaOperand<EmulatedMemory> {
    let (rows, k) = (x.rows(), x.strips.k);
    let (kind, bf16) = match &x.kind {
        CpuKind::Values => match compute {
            Compute::Bf16 => (OperandKind::Bf16, true),
            Compute::F32 => (OperandKind::F32, false),
        },
        CpuKind::Codes(codes) => return coded(device, x, codes, compute),
        CpuKind::Scaled { activation, global } => {
            let (activation, global) = (*activation, *global);
            match compute {
                Compute::Bf16 => (OperandKind::ScaledBf16 { activation, global }, true),
                Compute::F32 => (OperandKind::ScaledF32 { activation, global }, false),
            }
        }
    };
    let values = if bf16 {
        upload_bf16(device, &x.values(), k)
    } else {
        upload_floats(device, &x.values()).expect("an upload")
    };
    CudaOperand { rows, k, kind, values }
}

/// Codes as [`prepare`](crate::cuda::quantize::prepare) leaves them.
fn coded(
    device: &Emulated,
    x: &CpuOperand,
    codes: &CodeScales,
    compute: Compute,
) -> CudaOperand<EmulatedMemory> {
    let (rows, k) = (x.rows(), x.strips.k);
    let integers = matches!(codes.activation.code, Code::Int { .. });
    // Words of the CPU may be shifted further than by the zero point.
    let shift = if x.strips.unit == Unit::Quad { 128.0 } else { 0.0 };
    let zeros: Vec<f32> = codes.offsets.iter().map(|offset| offset - shift).collect();
    let mut bytes = Vec::new();
    for row in x.strips.values().chunks_exact(k) {
        let mut padded = vec![0; k.next_multiple_of(64) * if integers { 1 } else { 2 }];
        for (k, word) in row.iter().enumerate() {
            if integers {
                padded[slot(k)] = ((word - shift) as i8).cast_unsigned();
            } else {
                padded[2 * k..2 * k + 2].copy_from_slice(&half::f16::from_f32(*word).to_le_bytes());
            }
        }
        bytes.extend(padded);
    }
    let scales = upload_floats(device, &codes.scales).expect("an upload");
    let shifted = zeros.iter().any(|zero| *zero != 0.0);
    let offsets = shifted.then(|| upload_floats(device, &zeros).expect("an upload"));
    let (activation, segment) = (codes.activation, codes.segment);
    let stored = if integers { Stored::Bytes } else { Stored::Halves };
    let kind = OperandKind::Codes { activation, segment, stored, scales, offsets, compute };
    CudaOperand { rows, k, kind, values: device.upload(&bytes).expect("an upload") }
}

/// Where the integer of `k` lies in its row: of sixteen, 0 8 1 9 2 10 3 11 and so on.
pub(crate) fn slot(k: usize) -> usize {
    k / 16 * 16 + k % 8 * 2 + k % 16 / 8
}

fn upload_bf16(device: &Emulated, values: &[f32], k: usize) -> EmulatedMemory {
    let mut bytes = Vec::new();
    for row in values.chunks_exact(k) {
        for value in row {
            assert_eq!(value.to_bits() & 0xffff, 0, "a bf16 operand");
            bytes.extend_from_slice(&value.to_le_bytes()[2..]);
        }
        bytes.resize(bytes.len() + (k.next_multiple_of(64) - k) * 2, 0);
    }
    device.upload(&bytes).expect("an upload")
}
