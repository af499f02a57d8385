//! Routing against the definition, bit by bit, and its exponential against the `libm` crate.

use bytemuck::NoUninit;

use super::*;
use crate::cuda::emulated::{Emulated, Schedule};

use crate::cuda::elementwise::samples::{devices, numbers, same_bits, upload};

fn check(device: &Emulated, logits: &[f32], experts: usize, top_k: usize) {
    let what = format!("{top_k} of {experts} experts");
    for renormalize in [Renormalize::Chosen, Renormalize::All] {
        let expected = crate::route::route(logits, experts, top_k, renormalize);
        let found = route(device, &upload(device, experts, logits), top_k, renormalize).expect("a route");
        assert_eq!(found.len(), expected.len(), "{what}");
        for (found, expected) in found.iter().zip(&expected) {
            assert_eq!(found.rows, expected.rows, "{what}");
            same_bits(&found.weights, &expected.weights, &what);
        }
    }
}

#[test]
fn experts_and_weights_of_every_size() {
    for device in devices() {
        for (experts, top_k) in
            [(1, 1), (8, 2), (31, 31), (32, 4), (33, 1), (60, 4), (128, 8), (200, 40), (4, 9)]
        {
            check(&device, &numbers(experts as u64, 19 * experts), experts, top_k);
        }
        check(&device, &[], 8, 2);
    }
}

#[test]
fn ties_zeros_of_both_signs_and_what_is_not_finite() {
    for device in devices() {
        let mut logits = vec![0.25; 8 * 40];
        let mut rows: Vec<&mut [f32]> = logits.chunks_exact_mut(40).collect();
        rows[1].iter_mut().step_by(3).for_each(|logit| *logit = -0.0);
        rows[1].iter_mut().skip(1).step_by(3).for_each(|logit| *logit = 0.0);
        rows[2].fill(-0.0);
        rows[3][7] = f32::NAN;
        rows[4][39] = f32::INFINITY;
        rows[5].fill(f32::NEG_INFINITY);
        rows[6].iter_mut().zip(numbers(1, 40)).for_each(|(logit, number)| *logit = number * 40.0);
        rows[7][0] = -f32::NAN;
        for top_k in [1, 5, 33, 40] {
            check(&device, &logits, 40, top_k);
        }
    }
}

/// `ExponentialArgs`.
#[derive(Clone, Copy, NoUninit)]
#[repr(C)]
struct ExponentialArgs {
    x: Address,
    out: Address,
    count: u64,
}

// SAFETY: as the structure of that name in route.cu.
unsafe impl Arguments for ExponentialArgs {}

#[test]
fn the_exponential_has_the_bits_of_the_libm_crate() {
    let device = Emulated::new(Schedule::ALL[0]);
    let limits = [
        0.0,
        -0.0,
        709.782_712_893_384,
        709.782_712_893_383_9,
        -745.133_219_101_941_2,
        -745.133_219_101_941_1,
        f64::MAX,
        f64::MIN,
        f64::MIN_POSITIVE,
        -5e-324,
        f64::INFINITY,
        f64::NEG_INFINITY,
        f64::NAN,
    ];
    // Where the reduction of the argument changes.
    let beside = |high: u64| (0..4096).map(move |i| f64::from_bits(high << 32 | i << 20));
    let changes =
        [0x3fd6_2e42, 0x3fd6_2e43, 0x3ff0_a2b1, 0x3ff0_a2b2, 0x3e30_0000].into_iter().flat_map(beside);
    let steps = (-160_000..160_000).map(|i| f64::from(i) * 0.004_679_3);
    let near_zero = (0..40_000).map(|i| -(f64::from(i) * -0.001).exp2());
    let wide = numbers(9, 100_000).into_iter().map(|x| f64::from(-x.abs()));
    let x: Vec<f64> = limits.into_iter().chain(changes).chain(steps).chain(near_zero).chain(wide).collect();
    let x: Vec<f64> = x.iter().flat_map(|x| [*x, -x]).collect();
    let bytes: Vec<u8> = x.iter().flat_map(|x| x.to_le_bytes()).collect();
    let (input, output) =
        (device.upload(&bytes).expect("memory"), device.allocate(bytes.len()).expect("memory"));
    let args = ExponentialArgs {
        x: Emulated::address(&input),
        out: Emulated::address(&output),
        count: x.len() as u64,
    };
    device.launch(Queue::Compute, "exponentials", [x.len().div_ceil(256), 1, 1], &args).expect("a launch");
    let mut found = vec![0; bytes.len()];
    device.download(&output, 0, &mut found).expect("a download");
    for (x, found) in x.iter().zip(found.chunks_exact(8)) {
        let found = f64::from_le_bytes(found.try_into().expect("eight bytes"));
        let expected = libm::exp(*x);
        let same = found.to_bits() == expected.to_bits() || (found.is_nan() && expected.is_nan());
        assert!(same, "e^{x:e} is {found:e}, expected {expected:e}");
    }
}
