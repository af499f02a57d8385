//! RMS norm against the CPU backend, bit by bit.

use super::*;
use crate::cpu::{self, CpuBuffer, Isa};

use crate::cuda::elementwise::samples::{devices, numbers, same_bits, upload};

fn check(device: &crate::cuda::emulated::Emulated, rows: usize, runs: usize, length: usize) {
    let width = runs * length;
    let x = CpuBuffer { width, values: numbers(length as u64, rows * width) };
    let weight = numbers(3, length);
    let found = norm(device, &upload(device, width, &x.values), &weight, 1e-5).expect("a norm");
    assert_eq!((found.rows, found.width), (rows, width));
    let expected = cpu::elementwise::norm(Isa::detect(), &x, &weight, 1e-5);
    same_bits(&found.download(device).expect("a download"), &expected.values, &format!("runs of {length}"));
}

#[test]
fn every_length_around_lines_and_levels() {
    for device in devices() {
        // Rests of a line, whole lines of eight, steps of a level (16 lines of 32), the next level (256 lines).
        let steps = [511, 512, 513, 520, 551, 1024, 1031, 4096];
        for length in (1..=41).chain([63, 64, 65, 96, 128]).chain(steps) {
            check(&device, 2, 1, length);
        }
        check(&device, 11, 3, 24);
        check(&device, 1, 9, 128);
    }
}

#[test]
fn long_rows_reach_every_level() {
    for device in devices().take(1) {
        for length in [8191, 8192, 8192 + 512 + 37, 131_072, 131_072 + 8192 + 3 * 512 + 25] {
            check(&device, 8, 1, length);
        }
    }
}

#[test]
fn rows_that_are_not_finite_or_tiny() {
    for device in devices() {
        let mut values = vec![0.0; 5 * 40];
        values[40] = f32::NAN;
        values[80] = f32::INFINITY;
        values[120..160].fill(1e-30);
        values[160..].fill(-1e-42);
        let x = CpuBuffer { width: 40, values };
        let weight = vec![-1.5; 40];
        for epsilon in [0.0, 1e-6] {
            let found = norm(&device, &upload(&device, 40, &x.values), &weight, epsilon).expect("a norm");
            let expected = cpu::elementwise::norm(Isa::detect(), &x, &weight, epsilon);
            same_bits(&found.download(&device).expect("a download"), &expected.values, "a norm");
        }
    }
}
