//! Activation quantization against the CPU backend, bit by bit.

use std::slice;

use super::*;
use crate::cpu::product::Unit;
use crate::cpu::quantize::OperandKind as CpuKind;
use crate::cpu::{self, CpuBuffer, Isa};
use crate::cuda::buffer::download_floats;
use crate::cuda::emulated::{Emulated, EmulatedMemory, Schedule};
use crate::cuda::matrix::packed::slot;

use crate::cuda::elementwise::samples::{devices, numbers, same_bits, upload};

const ROWS: usize = 13;
/// Windows of unequal lengths, one of them empty.
fn windows() -> [Range<usize>; 4] {
    [0..1, 1..8, 8..8, 8..ROWS]
}

/// Activations whose rows are ordinary, constant, zero, tiny, one-sided, or hold what is not a number.
fn activations(width: usize) -> CpuBuffer {
    let mut values = numbers(width as u64, ROWS * width);
    let mut rows: Vec<&mut [f32]> = values.chunks_exact_mut(width).collect();
    rows[1].fill(0.0);
    rows[2].fill(-0.0);
    rows[3].fill(0.375);
    rows[4].iter_mut().for_each(|value| *value = value.abs());
    rows[5].iter_mut().for_each(|value| *value = -value.abs());
    rows[6].iter_mut().for_each(|value| *value *= 1e-41);
    rows[8].iter_mut().step_by(2).for_each(|value| *value = -0.0);
    rows[9][width / 2] = f32::NAN;
    rows[10][width / 3] = f32::INFINITY;
    rows[11][width - 1] = f32::NEG_INFINITY;
    rows[12].iter_mut().for_each(|value| *value *= 1e30);
    CpuBuffer { width, values }
}

fn quantizer(activation: Activation) -> Quantizer {
    Quantizer { activation, scales: vec![0.037], zero: 3.0, global_scale: 217.5 }
}

const CODES: [Code; 5] =
    [Code::Int { bits: 8 }, Code::Int { bits: 4 }, Code::Int { bits: 2 }, Code::E4m3, Code::E2m1];

fn sharings(width: usize) -> Vec<ActivationSharing> {
    let sizes = [1, 5, 16, 32, 40, 128].into_iter().filter(|size| width.is_multiple_of(*size));
    let groups = sizes.map(|size| ActivationSharing::Group { size });
    [ActivationSharing::Tensor, ActivationSharing::Token].into_iter().chain(groups).collect()
}

/// Every scheme that a row of `width` can have.
fn schemes(width: usize) -> Vec<Activation> {
    let mut all = Vec::new();
    for code in CODES {
        for sharing in sharings(width) {
            for symmetric in [true, false] {
                for scale in [ActivationScale::Static, ActivationScale::Dynamic] {
                    all.push(Activation { code, symmetric, sharing, scale });
                }
            }
            for scale in [ActivationScale::Local, ActivationScale::PowerOfTwo] {
                all.push(Activation { code, symmetric: true, sharing, scale });
            }
        }
    }
    all
}

/// Operands of a device as f32, integers with their zero points, and what lies behind the end of each row.
fn operands_of(device: &Emulated, operand: &CudaOperand<EmulatedMemory>) -> (Vec<f32>, Vec<f32>) {
    let padded = operand.k.next_multiple_of(PADDED);
    let download = |elements: usize, width: usize| {
        let mut bytes = vec![0; operand.rows * elements * width];
        device.download(&operand.values, 0, &mut bytes).expect("a download");
        bytes
    };
    let halves = |number: fn([u8; 2]) -> f32| -> Vec<f32> {
        download(padded, 2).chunks_exact(2).map(|b| number([b[0], b[1]])).collect()
    };
    let values = match &operand.kind {
        OperandKind::Bf16 | OperandKind::ScaledBf16 { .. } => {
            halves(|b| f32::from_bits(u32::from(u16::from_le_bytes(b)) << 16))
        }
        OperandKind::F32 | OperandKind::ScaledF32 { .. } => {
            download_floats(device, &operand.values, operand.rows * operand.k).expect("a download")
        }
        OperandKind::Codes { activation, stored: Stored::Bytes, .. } => {
            let value = match activation.code {
                Code::Int { .. } => |byte: u8| f32::from(byte.cast_signed()),
                _ => e4m3,
            };
            let in_order = |row: &[u8]| -> Vec<f32> { (0..padded).map(|k| value(row[slot(k)])).collect() };
            download(padded, 1).chunks_exact(padded).flat_map(in_order).collect()
        }
        OperandKind::Codes { stored: Stored::Halves, .. } => halves(|b| half::f16::from_le_bytes(b).to_f32()),
    };
    let row = values.len() / operand.rows;
    let rows = values.chunks_exact(row);
    let kept = rows.clone().flat_map(|row| &row[..operand.k]).copied().collect();
    (kept, rows.flat_map(|row| &row[operand.k..]).copied().collect())
}

/// The number of an fp8 code, by its definition.
fn e4m3(code: u8) -> f32 {
    let (exponent, mantissa) = (i32::from(code >> 3 & 15), f32::from(code & 7));
    let size = if exponent == 0 {
        mantissa * 2.0_f32.powi(-9)
    } else {
        (8.0 + mantissa) * 2.0_f32.powi(exponent - 10)
    };
    assert!(code & 0x7f != 0x7f, "a code that is a number");
    if code & 0x80 == 0 { size } else { -size }
}

/// Fp8 as bytes are the numbers that f16 are; no code stands for NaN.
fn check_bytes(device: &Emulated, x: &CpuBuffer, treatment: &Treatment, halves: &[f32], what: &str) {
    let preparing = Preparing { compute: Compute::Bf16, fp8: Stored::Bytes };
    let found = prepare(device, &upload(device, x.width, &x.values), treatment, preparing, &windows());
    let (values, padding) = operands_of(device, &found.expect("operands"));
    assert!(padding.iter().all(|value| value.to_bits() == 0), "{what}: padding of bytes");
    let wanted: Vec<f32> = halves.iter().map(|value| if value.is_nan() { 0.0 } else { *value }).collect();
    same_bits(&values, &wanted, &format!("bytes of {what}"));
}

fn check(device: &Emulated, x: &CpuBuffer, treatment: &Treatment, compute: Compute) {
    if let Treatment::Exact(Quantizer { activation, .. }) = treatment
        && matches!(activation.scale, ActivationScale::Local | ActivationScale::PowerOfTwo)
        && matches!(activation.code, Code::Int { .. })
    {
        // No scheme has them: integers times a local scale are no operands.
        return;
    }
    let what = format!("{treatment:?} of {} in {compute}", x.width);
    let expected = cpu::quantize::prepare(Isa::detect(), x, treatment, compute, &windows());
    let found = prepare(device, &upload(device, x.width, &x.values), treatment, compute, &windows())
        .expect("operands");
    let (values, padding) = operands_of(device, &found);
    if let (OperandKind::Codes { stored: Stored::Halves, .. }, Compute::Bf16) = (&found.kind, compute) {
        check_bytes(device, x, treatment, &values, &what);
    }
    assert!(padding.iter().all(|value| value.to_bits() == 0), "{what}: padding");
    let values: Vec<f32> = match found.kind {
        // Codes times scales are bf16 numbers, but for subnormal ones.
        OperandKind::ScaledF32 { .. } => values.into_iter().map(cpu::math::round_bf16).collect(),
        OperandKind::Bf16 | OperandKind::F32 | OperandKind::ScaledBf16 { .. } | OperandKind::Codes { .. } => {
            values
        }
    };
    // Words of the CPU may be shifted further than by the zero point.
    let shift = if expected.strips.unit == Unit::Quad { 128.0 } else { 0.0 };
    let wanted: Vec<f32> = match &expected.kind {
        CpuKind::Codes(codes) => {
            // No integer stands for NaN: a word of 0 does, and the run's scale is one.
            let lost = |at: usize, word: f32| word == 0.0 && codes.scales[at / codes.segment].is_nan();
            let code = |(at, word)| if lost(at, word) { values[at] } else { word - shift };
            expected.strips.values().into_iter().enumerate().map(code).collect()
        }
        CpuKind::Values | CpuKind::Scaled { .. } => expected.values(),
    };
    same_bits(&values, &wanted, &what);
    match (&found.kind, &expected.kind) {
        (OperandKind::Bf16, CpuKind::Values) => assert_eq!(compute, Compute::Bf16),
        (OperandKind::F32, CpuKind::Values) => assert_eq!(compute, Compute::F32),
        (OperandKind::Codes { activation, segment, scales, offsets, .. }, CpuKind::Codes(expected)) => {
            assert_eq!((*activation, *segment), (expected.activation, expected.segment), "{what}");
            let scales = download_floats(device, scales, expected.scales.len()).expect("scales");
            same_bits(&scales, &expected.scales, &format!("scales of {what}"));
            let count = expected.offsets.len();
            let zeros = match offsets {
                Some(offsets) => download_floats(device, offsets, count).expect("zero points"),
                None => vec![0.0; count],
            };
            for (zero, offset) in zeros.iter().zip(&expected.offsets) {
                // Further out the CPU's shift is rounded.
                let same =
                    zero + shift == *offset || zero.abs() > 8_388_000.0 || zero.is_nan() && offset.is_nan();
                assert!(same, "{what}: zero point {zero} for {offset} less {shift}");
            }
        }
        (
            OperandKind::ScaledBf16 { activation, global } | OperandKind::ScaledF32 { activation, global },
            CpuKind::Scaled { activation: a, global: g },
        ) => assert_eq!((activation, global), (a, g), "{what}"),
        (found, expected) => panic!("{what}: {found:?} for {expected:?}"),
    }
}

#[test]
fn plain_operands_are_rounded_and_padded() {
    for device in devices() {
        for width in [1, 3, 64, 80, 1000, 1028] {
            for compute in [Compute::F32, Compute::Bf16] {
                check(&device, &activations(width), &Treatment::Plain, compute);
            }
        }
    }
}

#[test]
fn every_bf16_number_and_its_neighbours_are_rounded_as_on_the_cpu() {
    let device = Emulated::new(Schedule::ALL[0]);
    let window = 0..1;
    let activation = |code| Activation {
        code,
        symmetric: true,
        sharing: ActivationSharing::Tensor,
        scale: ActivationScale::Static,
    };
    for near in [0, 1, 0x7fff, 0x8000, 0x8001, 0xffff] {
        let values = (0..=0xffff_u32).map(|high| f32::from_bits(high << 16 | near)).collect();
        let x = CpuBuffer { width: 1 << 16, values };
        for code in [Code::E4m3, Code::E2m1, Code::Int { bits: 8 }] {
            let quantizer = Quantizer { scales: vec![1.0], zero: 0.0, ..quantizer(activation(code)) };
            let mut expected = x.clone();
            cpu::quantize::fake_quantize(
                Isa::detect(),
                &mut expected,
                &quantizer,
                x.width,
                slice::from_ref(&window),
            );
            let mut found = upload(&device, x.width, &x.values);
            fake_quantize(&device, &mut found, &quantizer, x.width, slice::from_ref(&window))
                .expect("values");
            same_bits(&found.download(&device).expect("a download"), &expected.values, &format!("{code:?}"));
        }
        let plain = prepare(
            &device,
            &upload(&device, x.width, &x.values),
            &Treatment::Plain,
            Compute::Bf16,
            slice::from_ref(&window),
        );
        let (found, _) = operands_of(&device, &plain.expect("operands"));
        let expected: Vec<f32> = x.values.iter().map(|x| cpu::math::round_bf16(*x)).collect();
        same_bits(&found, &expected, "bf16");
    }
}

#[test]
fn library_values_of_every_scheme() {
    for (device, width) in devices().flat_map(|device| [35, 80, 1].map(|width| (device.clone(), width))) {
        let x = activations(width);
        for activation in schemes(width) {
            for compute in [Compute::F32, Compute::Bf16] {
                check(&device, &x, &Treatment::FakeQuantized(quantizer(activation)), compute);
            }
        }
    }
}

#[test]
fn kernel_operands_of_every_scheme() {
    for (device, width) in devices().flat_map(|device| [35, 80, 1].map(|width| (device.clone(), width))) {
        let x = activations(width);
        for activation in schemes(width) {
            for compute in [Compute::F32, Compute::Bf16] {
                check(&device, &x, &Treatment::Exact(quantizer(activation)), compute);
            }
        }
    }
}

#[test]
fn runs_that_are_longer_than_a_warp() {
    let device = Emulated::new(Schedule::ALL[3]);
    let x = activations(256);
    for activation in schemes(256) {
        check(&device, &x, &Treatment::FakeQuantized(quantizer(activation)), Compute::F32);
        check(&device, &x, &Treatment::Exact(quantizer(activation)), Compute::F32);
    }
}

#[test]
fn heads_have_scales_of_their_own_and_the_last_group_may_be_short() {
    for device in devices() {
        let (heads, head_dim) = (3, 40);
        let x = activations(heads * head_dim);
        let stored = Quantizer {
            scales: vec![0.01, 0.3, 2.0],
            ..quantizer(Activation {
                code: Code::E4m3,
                symmetric: true,
                sharing: ActivationSharing::Head,
                scale: ActivationScale::Static,
            })
        };
        let of_tensor = Quantizer {
            activation: Activation { sharing: ActivationSharing::Tensor, ..stored.activation },
            ..stored.clone()
        };
        let dynamic = |sharing| {
            let scale = ActivationScale::Dynamic;
            let symmetric = false;
            quantizer(Activation { code: Code::Int { bits: 8 }, scale, symmetric, sharing })
        };
        let head = dynamic(ActivationSharing::Head);
        let group = dynamic(ActivationSharing::Group { size: 50 });
        for quantizer in [&stored, &of_tensor, &head, &group] {
            let mut expected = x.clone();
            cpu::quantize::fake_quantize(Isa::detect(), &mut expected, quantizer, head_dim, &windows());
            let mut found = upload(&device, x.width, &x.values);
            fake_quantize(&device, &mut found, quantizer, head_dim, &windows()).expect("values");
            let found = found.download(&device).expect("a download");
            same_bits(&found, &expected.values, &format!("{quantizer:?}"));
        }
    }
}

#[test]
fn codes_times_local_scales_are_bf16_numbers() {
    let exact = |x: f32| assert_eq!(cpu::math::round_bf16(x).to_bits(), x.to_bits(), "{x:e}");
    let fp8 = || (0..=255).map(cpu::math::e4m3).filter(|code| !code.is_nan());
    for fp4 in (0..16).map(cpu::math::e2m1) {
        fp8().for_each(|scale| exact(fp4 * scale));
        // Products below the smallest bf16 number would need scales below the fp4 codes' own steps.
        (0..255).map(cpu::math::e8m0).for_each(|scale| exact(fp4 * scale));
    }
    for code in fp8() {
        // Products with smaller scales reach below the smallest bf16 number, 2^-133, and are rounded there.
        (4..255).map(cpu::math::e8m0).for_each(|scale| exact(code * scale));
    }
}
