//! Decompressed weights of every scheme against the CPU backend, bit by bit.

use super::*;
use crate::cpu::math::round_bf16;
use crate::cpu::{self, CpuMatrix, Isa};
use crate::cuda::elementwise::samples::{devices, same_bits};
use crate::cuda::emulated::{Emulated, Schedule};
use crate::cuda::matrix::packed::{group, integer, schemes, tiled};

/// Rows that begin at each atom of a tile, and end anywhere.
fn ranges(n: usize) -> [Range<usize>; 5] {
    [0..n, 16..n - 1, 48..130, 80..97, 33..34]
}

#[test]
fn looked_up_rows_have_the_bits_of_the_cpu() {
    let device = Emulated::new(Schedule::ALL[0]);
    for (seed, scheme) in schemes().into_iter().enumerate() {
        for (n, k) in [(150, 200), (149, 63), (131, 1)] {
            let matrix = tiled(n, k, scheme, seed as u64);
            for range in ranges(n) {
                let ids: Vec<u32> = (0..range.len() as u32).rev().step_by(7).collect();
                let expected =
                    cpu::weights::rows(Isa::detect(), &CpuMatrix::new(&matrix, range.clone()), &ids);
                let held = CudaMatrix::upload(&device, &matrix, range.clone()).expect("a matrix");
                let found = rows(&device, &held, &ids).expect("rows").download(&device).expect("values");
                same_bits(&found, &expected.values, &format!("{scheme:?}, {n} x {k}, rows {range:?}"));
            }
        }
    }
}

/// What the CPU's weights are as bf16 operands: [padded, stride], zeros outside.
fn expected_operands(matrix: &ctq_container::TiledMatrix, range: &Range<usize>, padded: usize) -> Vec<f32> {
    // Columns of operands stay in the order of the tiles.
    let matrix = ctq_container::TiledMatrix { permutation: None, ..matrix.clone() };
    let ids: Vec<u32> = (0..range.len() as u32).collect();
    let rows = cpu::weights::rows(Isa::detect(), &CpuMatrix::new(&matrix, range.clone()), &ids);
    let stride = matrix.k.next_multiple_of(TILE);
    let mut expected = vec![0.0; padded * stride];
    for (row, values) in rows.values.chunks_exact(matrix.k).enumerate() {
        for (column, value) in values.iter().enumerate() {
            expected[row * stride + column] = round_bf16(*value);
        }
    }
    expected
}

fn download_bf16(device: &Emulated, memory: &<Emulated as Device>::Memory, count: usize) -> Vec<f32> {
    let mut bytes = vec![0; count * 2];
    device.download(memory, 0, &mut bytes).expect("values");
    bytes.chunks_exact(2).map(|b| f32::from_bits(u32::from(b[0]) << 16 | u32::from(b[1]) << 24)).collect()
}

fn check_operand_rows(
    device: &Emulated,
    matrix: &ctq_container::TiledMatrix,
    range: Range<usize>,
    what: &str,
) {
    let padded = range.len().next_multiple_of(96);
    let held = CudaMatrix::upload(device, matrix, range.clone()).expect("a matrix");
    let count = padded * held.stride();
    let out = device.allocate(count * 2).expect("room");
    operand_rows(device, Queue::Decode, &held, 0..range.len(), padded, Emulated::address(&out))
        .expect("rows");
    let found = download_bf16(device, &out, count);
    same_bits(&found, &expected_operands(matrix, &range, padded), what);
}

#[test]
fn operands_have_the_bits_of_the_cpu_and_zeros_around_them() {
    let device = Emulated::new(Schedule::ALL[0]);
    for (seed, scheme) in schemes().into_iter().enumerate() {
        for (n, k) in [(150, 200), (149, 63)] {
            let matrix = tiled(n, k, scheme, seed as u64);
            for range in ranges(n) {
                let what = format!("{scheme:?}, {n} x {k}, rows {range:?}");
                check_operand_rows(&device, &matrix, range, &what);
            }
        }
    }
    // Several blocks along k.
    for (seed, scheme) in schemes().into_iter().enumerate() {
        let matrix = tiled(70, 1100, scheme, seed as u64);
        check_operand_rows(&device, &matrix, 16..69, &format!("{scheme:?}, 70 x 1100"));
    }
    let matrix = tiled(100, 130, integer(4, group(32)), 5);
    for device in devices() {
        check_operand_rows(&device, &matrix, 16..100, "every schedule");
    }
}

#[test]
fn part_of_the_rows_is_what_a_matrix_of_those_rows_holds() {
    let device = Emulated::new(Schedule::ALL[0]);
    for scheme in schemes() {
        let matrix = tiled(260, 96, scheme, 3);
        let held = CudaMatrix::upload(&device, &matrix, 48..250).expect("a matrix");
        let (part, padded) = (83..190, 128);
        let count = padded * held.stride();
        let out = device.allocate(count * 2).expect("room");
        operand_rows(&device, Queue::Decode, &held, part.clone(), padded, Emulated::address(&out))
            .expect("rows");
        let expected = expected_operands(&matrix, &(48 + part.start..48 + part.end), padded);
        same_bits(&download_bf16(&device, &out, count), &expected, &format!("{scheme:?}"));
    }
}
