//! Operations without a product of matrices against the CPU backend, bit by bit.

use std::ops::Range;

use crate::backend::Span;
use ctq_model::rope::{Rope, RopeScaling};

use super::*;
use crate::Rotation;
use crate::cpu::{self, CpuBuffer, Isa};
use crate::cuda::Cuda;
use crate::cuda::rotate::rotate;

use crate::cuda::elementwise::samples::{devices, numbers, same_bits, upload};

/// Rows and widths: single elements, less and more than a block of columns, no multiples of a warp.
const SHAPES: [(usize, usize); 5] = [(1, 1), (3, 17), (5, 64), (2, 1025), (70, 33)];

#[test]
fn sums_gates_and_biases() {
    for (device, (rows, width)) in devices().flat_map(|device| SHAPES.map(|shape| (device.clone(), shape))) {
        let mut x = numbers(1, rows * width);
        let y = numbers(2, rows * width);
        for (at, value) in [f32::NAN, f32::INFINITY, -0.0, f32::NEG_INFINITY, 1e-40].into_iter().enumerate() {
            let index = at * 7 % x.len();
            x[index] = value;
        }
        let bias = numbers(3, width);
        let cpu_x = CpuBuffer { width, values: x.clone() };
        let cpu_y = CpuBuffer { width, values: y.clone() };
        let (mut device_x, device_y) = (upload(&device, width, &x), upload(&device, width, &y));

        let gated = gate(&device, upload(&device, width, &x), &device_y).expect("a gate");
        let gated = gated.download(&device).expect("a download");
        same_bits(&gated, &cpu::elementwise::gate(Isa::detect(), cpu_x.clone(), &cpu_y).values, "gate");
        same_bits(&device_y.download(&device).expect("a download"), &y, "a gate leaves its factor");

        let mut expected = cpu_x.clone();
        cpu::elementwise::add(Isa::detect(), &mut expected, &cpu_y);
        add(&device, &mut device_x, &device_y).expect("a sum");
        same_bits(&device_x.download(&device).expect("a download"), &expected.values, "add");

        cpu::elementwise::add_bias(Isa::detect(), &mut expected, &bias);
        add_bias(&device, &device_x, &bias).expect("a bias");
        same_bits(&device_x.download(&device).expect("a download"), &expected.values, "add_bias");
    }
}

#[test]
fn rows_are_gathered_and_added_where_they_came_from() {
    for (device, (rows, width)) in devices().flat_map(|device| SHAPES.map(|shape| (device.clone(), shape))) {
        let x = CpuBuffer { width, values: numbers(4, rows * width) };
        let chosen: Vec<u32> = (0..rows as u32).rev().step_by(2).collect();
        let weights = numbers(5, chosen.len());
        let device_x = upload(&device, width, &x.values);
        let y = gather(&device, &device_x, &chosen).expect("a gather");
        let expected_y = cpu::elementwise::gather(&x, &chosen);
        assert_eq!((y.rows, y.width), (chosen.len(), width));
        same_bits(&y.download(&device).expect("a download"), &expected_y.values, "gather");

        let mut expected = CpuBuffer { width, values: numbers(6, rows * width) };
        let mut sums = upload(&device, width, &expected.values);
        scatter_add(&device, &mut sums, &y, &chosen, &weights).expect("a sum");
        cpu::elementwise::scatter_add(Isa::detect(), &mut expected, &expected_y, &chosen, &weights);
        same_bits(&sums.download(&device).expect("a download"), &expected.values, "scatter_add");

        let none = gather(&device, &device_x, &[]).expect("a gather");
        assert_eq!((none.rows, none.width), (0, width));
        scatter_add(&device, &mut sums, &none, &[], &[]).expect("a sum of nothing");
    }
}

#[test]
fn columns_of_parts_lie_side_by_side() {
    for device in devices() {
        for widths in [&[1_usize][..], &[5, 1030, 64], &[16, 0, 3]] {
            let rows = 3;
            let part = |(index, width): (usize, &usize)| CpuBuffer {
                width: *width,
                values: numbers(index as u64, rows * width),
            };
            let parts: Vec<CpuBuffer> = widths.iter().enumerate().map(part).collect();
            let on_device: Vec<_> =
                parts.iter().map(|part| upload(&device, part.width, &part.values)).collect();
            let present: Vec<&CpuBuffer> = parts.iter().filter(|part| part.width > 0).collect();
            let found = concatenate(&device, &on_device.iter().collect::<Vec<_>>()).expect("a copy");
            assert_eq!((found.rows, found.width), (rows, widths.iter().sum()));
            let expected = cpu::elementwise::concatenate(&present);
            same_bits(&found.download(&device).expect("a download"), &expected.values, "concatenate");
        }
    }
}

#[test]
fn the_first_row_that_is_not_finite_is_found() {
    // The second shape takes more elements than all blocks have threads.
    for (device, (rows, width)) in devices().zip([(9, 7), (300, 1001), (1, 1), (40, 512)]) {
        let mut values = numbers(7, rows * width);
        values[0] = f32::MAX;
        let find = |values: &[f32]| {
            let asked = watch(&device, &upload(&device, width, values)).expect("a question");
            let found = seen(&device, asked).expect("an answer");
            let cpu = CpuBuffer { width, values: values.to_vec() };
            assert_eq!(found, cpu::elementwise::first_non_finite(Isa::detect(), &cpu));
            found
        };
        assert_eq!(find(&values), None);
        for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            values[rows * width - 1] = bad;
            assert_eq!(find(&values), Some(rows - 1));
            let middle = rows / 2 * width + width / 2;
            let before = std::mem::replace(&mut values[middle], bad);
            assert_eq!(find(&values), Some(rows / 2));
            values[middle] = before;
        }
        assert_eq!(find(&[]), None);
    }
}

#[test]
fn heads_are_rotated_by_their_position_in_the_window() {
    let rope = Rope { theta: 10_000.0, scaling: RopeScaling::Default };
    for device in devices() {
        for (head_dim, heads) in [(2, 1), (6, 5), (64, 3), (128, 9)] {
            let span = |rows: Range<usize>, first: usize| Span { rows, first };
            let spans = [span(0..1, 0), span(1..12, 0), span(12..12, 3), span(12..19, 4)];
            let rotation = Rotation::new(&rope, head_dim, 11);
            let mut expected =
                CpuBuffer { width: heads * head_dim, values: numbers(8, 19 * heads * head_dim) };
            let mut x = upload(&device, expected.width, &expected.values);
            let cuda = Cuda::new(device.clone());
            rotate(&cuda, &mut x, &rotation, &spans).expect("a rotation");
            cpu::elementwise::rotate(Isa::detect(), &mut expected, &rotation, &spans);
            same_bits(&x.download(&device).expect("a download"), &expected.values, "rotate");
        }
    }
}
