//! Operands made in one pass, bit by bit against a norm or a gate and what comes after it.

use ctq_model::matrix::Code;
use ctq_model::scheme::{Activation, ActivationScale, ActivationSharing};

use super::*;
use crate::Compute;
use crate::backend::Quantizer;
use crate::cuda::buffer::OperandKind;
use crate::cuda::elementwise::samples::{devices, numbers, same_bits, upload};
use crate::cuda::emulated::{Emulated, EmulatedMemory, Schedule};

const ROWS: usize = 7;
const WINDOWS: [Range<usize>; 2] = [0..5, 5..ROWS];

type Operand = CudaOperand<EmulatedMemory>;

/// Everything that an operand is made of, as f32.
fn content(device: &Emulated, operand: &Operand) -> Vec<f32> {
    let read = |memory: &EmulatedMemory, bytes: usize| {
        let mut read = vec![0; bytes];
        device.download(memory, 0, &mut read).expect("a download");
        read
    };
    let floats = |bytes: &[u8]| -> Vec<f32> {
        bytes.as_chunks().0.iter().map(|bytes| f32::from_le_bytes(*bytes)).collect()
    };
    let (rows, k) = (operand.rows, operand.k);
    match &operand.kind {
        OperandKind::Bf16 | OperandKind::ScaledBf16 { .. } => {
            let bytes = read(&operand.values, rows * k.next_multiple_of(64) * 2);
            let wide = |bytes: &[u8; 2]| f32::from_bits(u32::from(u16::from_le_bytes(*bytes)) << 16);
            bytes.as_chunks().0.iter().map(wide).collect()
        }
        OperandKind::F32 | OperandKind::ScaledF32 { .. } => floats(&read(&operand.values, rows * k * 4)),
        OperandKind::Codes { activation, segment, scales, offsets, .. } => {
            let padded = k.next_multiple_of(64);
            let mut all: Vec<f32> = match activation.code {
                Code::Int { .. } => read(&operand.values, rows * padded).into_iter().map(f32::from).collect(),
                Code::E4m3 | Code::E2m1 | Code::Bf16 | Code::F16 | Code::F32 => {
                    let number = |bytes: &[u8; 2]| half::f16::from_le_bytes(*bytes).to_f32();
                    read(&operand.values, rows * padded * 2).as_chunks().0.iter().map(number).collect()
                }
            };
            for beside in std::iter::once(scales).chain(offsets) {
                all.extend(floats(&read(beside, rows * (k / segment) * 4)));
            }
            all
        }
    }
}

/// Rows that are ordinary, zero, tiny, huge, one-sided, or hold what is not a number.
fn activations(width: usize) -> Vec<f32> {
    let mut values = numbers(width as u64, ROWS * width);
    let mut rows: Vec<&mut [f32]> = values.chunks_exact_mut(width).collect();
    rows[1].fill(-0.0);
    rows[2].iter_mut().for_each(|value| *value = value.abs() * 1e-41);
    rows[3].iter_mut().for_each(|value| *value *= 1e30);
    rows[4][width / 2] = f32::NAN;
    rows[5][width - 1] = f32::INFINITY;
    values
}

/// Every kind of scale and every way to share it that rows of `width` can have.
fn treatments(width: usize) -> Vec<Treatment> {
    let groups = [5, 16, 40, 128].into_iter().filter(|size| width.is_multiple_of(*size));
    let sharings: Vec<ActivationSharing> = [ActivationSharing::Tensor, ActivationSharing::Token]
        .into_iter()
        .chain(groups.map(|size| ActivationSharing::Group { size }))
        .collect();
    let mut all = vec![Treatment::Plain];
    let mut add = |code, symmetric, sharing, scale, exact| {
        let activation = Activation { code, symmetric, sharing, scale };
        let quantizer = Quantizer { activation, scales: vec![0.037], zero: 3.0, global_scale: 217.5 };
        all.push(Treatment::FakeQuantized(quantizer.clone()));
        if exact {
            all.push(Treatment::Exact(quantizer));
        }
    };
    for sharing in sharings {
        for (code, symmetric) in
            [(Code::Int { bits: 8 }, true), (Code::Int { bits: 8 }, false), (Code::E4m3, true)]
        {
            for scale in [ActivationScale::Static, ActivationScale::Dynamic] {
                add(code, symmetric, sharing, scale, true);
            }
        }
        for scale in [ActivationScale::Local, ActivationScale::PowerOfTwo] {
            add(Code::E2m1, true, sharing, scale, true);
        }
    }
    all
}

fn normed(device: &Emulated, width: usize, treatment: &Treatment, compute: Compute) {
    let (x, weight) = (upload(device, width, &activations(width)), numbers(3, width));
    let found = normed_operand(device, &x, (&weight, 1e-5), treatment, compute, &WINDOWS);
    let between = norm::norm(device, &x, &weight, 1e-5).expect("a norm");
    let expected = quantize::prepare(device, &between, treatment, compute, &WINDOWS).expect("operands");
    let found = content(device, &found.expect("operands").0);
    same_bits(&found, &content(device, &expected), &format!("norm of {width}, {treatment:?}, {compute}"));
}

fn gated(device: &Emulated, width: usize, treatment: &Treatment, compute: Compute) {
    let values = activations(width);
    let (gate, up) = (|| upload(device, width, &values), upload(device, width, &numbers(9, ROWS * width)));
    let found = gated_operand(device, gate(), &up, treatment, compute, &WINDOWS).expect("operands");
    let between = elementwise::gate(device, gate(), &up).expect("a gate");
    let expected = quantize::prepare(device, &between, treatment, compute, &WINDOWS).expect("operands");
    let found = content(device, &found);
    same_bits(&found, &content(device, &expected), &format!("gate of {width}, {treatment:?}, {compute}"));
}

#[test]
fn every_treatment_after_a_norm_and_after_a_gate() {
    for (device, width) in devices().zip([80, 640, 80, 640, 1280, 128]) {
        for treatment in treatments(width) {
            for compute in [Compute::F32, Compute::Bf16] {
                normed(&device, width, &treatment, compute);
                gated(&device, width, &treatment, compute);
            }
        }
    }
}

#[test]
fn norms_of_every_length_around_lines_and_steps() {
    for device in devices() {
        for width in [4, 8, 12, 28, 32, 36, 64, 100, 508, 512, 516, 544, 1024, 4608, 1100] {
            normed(&device, width, &Treatment::Plain, Compute::Bf16);
            normed(&device, width, &Treatment::Plain, Compute::F32);
        }
    }
}

#[test]
fn rows_of_every_room_and_beyond() {
    let device = Emulated::new(Schedule::ALL[1]);
    let token = |code| {
        let sharing = ActivationSharing::Token;
        let activation = Activation { code, symmetric: true, sharing, scale: ActivationScale::Dynamic };
        Treatment::FakeQuantized(Quantizer { activation, scales: vec![], zero: 0.0, global_scale: 1.0 })
    };
    for width in [4096, 4100, 8192, 8196, 16_384, 16_388] {
        for treatment in [Treatment::Plain, token(Code::E4m3)] {
            normed(&device, width, &treatment, Compute::Bf16);
            gated(&device, width, &treatment, Compute::Bf16);
        }
    }
}

#[test]
fn gates_of_more_runs_than_a_block_has_room_for() {
    let device = Emulated::new(Schedule::ALL[4]);
    for (width, size) in [(8200, 40), (12_288, 128), (4125, 5)] {
        let sharing = ActivationSharing::Group { size };
        let (code, scale) = (Code::E4m3, ActivationScale::Dynamic);
        let activation = Activation { code, symmetric: true, sharing, scale };
        let quantizer = Quantizer { activation, scales: vec![], zero: 0.0, global_scale: 1.0 };
        for treatment in [Treatment::FakeQuantized(quantizer.clone()), Treatment::Exact(quantizer)] {
            gated(&device, width, &treatment, Compute::Bf16);
        }
    }
}

#[test]
fn odd_widths_take_the_long_way() {
    let device = Emulated::new(Schedule::ALL[0]);
    for width in [1, 3, 35, 1030] {
        for compute in [Compute::F32, Compute::Bf16] {
            normed(&device, width, &Treatment::Plain, compute);
            gated(&device, width, &Treatment::Plain, compute);
        }
    }
    // A norm over parts of a row.
    let x = upload(&device, 80, &activations(80));
    let weight = numbers(3, 16);
    let found = normed_operand(&device, &x, (&weight, 1e-5), &Treatment::Plain, Compute::F32, &WINDOWS);
    let expected = norm::norm(&device, &x, &weight, 1e-5).expect("a norm");
    let expected = expected.download(&device).expect("a download");
    same_bits(&content(&device, &found.expect("operands").0), &expected, "a norm of heads");
}

/// Launches and rows: what is one pass stays one.
#[test]
fn what_fits_takes_one_pass() {
    for width in [4, 4096, 8192, 16_384] {
        assert!(takes_norm(width, Runs::Plain) && takes_norm(width, Runs::Of(128)));
        assert!(takes_gate(width, Runs::Plain) && takes_gate(width, Runs::Of(width)));
    }
    assert!(takes_gate(28_672, Runs::Plain) && takes_gate(28_672, Runs::Of(16)));
    assert!(!takes_norm(16_388, Runs::Plain) && !takes_gate(28_672, Runs::Of(28_672)));
    assert!(!takes_norm(4096, Runs::BeyondRows) && !takes_gate(4096, Runs::BeyondRows));
}
