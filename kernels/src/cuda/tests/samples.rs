//! Numbers that tests feed to kernels, and the comparison of bits.

use crate::cuda::CudaBuffer;
use crate::cuda::emulated::{Emulated, EmulatedMemory, Schedule};

/// One device for each schedule.
pub(crate) fn devices() -> impl Iterator<Item = Emulated> {
    Schedule::ALL.into_iter().map(Emulated::new)
}

/// Numbers of mixed magnitude and sign.
pub(crate) fn numbers(seed: u64, count: usize) -> Vec<f32> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut next = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 40) as f32 / (1 << 24) as f32
    };
    (0..count)
        .map(|_| {
            let (magnitude, sign) = (next(), next() - 0.5);
            sign * (magnitude * 12.0 - 6.0).exp2()
        })
        .collect()
}

pub(crate) fn upload(device: &Emulated, width: usize, values: &[f32]) -> CudaBuffer<EmulatedMemory> {
    CudaBuffer::upload(device, width, values).expect("an upload")
}

/// Whether bits are equal; which NaN a device makes of an operation is its own affair.
pub(crate) fn same_bits(found: &[f32], expected: &[f32], what: &str) {
    assert_eq!(found.len(), expected.len(), "{what}");
    for (index, (found, expected)) in found.iter().zip(expected).enumerate() {
        let same = found.to_bits() == expected.to_bits() || (found.is_nan() && expected.is_nan());
        assert!(same, "{what}: element {index} is {found:e}, expected {expected:e}");
    }
}
