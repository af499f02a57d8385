//! Attention on warpgroups on the emulated device: the bits of the kernel that runs everywhere, which other tests hold
//! against the CPU and against plain loops. The emulation sums a product of 16 k alike for both.

use super::*;
use crate::cpu::math::exp_fast;
use crate::cuda::Cuda;

/// Both kernels, under every schedule, must give the same bits.
fn assert_same_bits(case: &Case, extras: Extras<'_>) {
    let expected = bits(&case.by(AttentionPath::Mma, Schedule::ALL[0], extras));
    for schedule in Schedule::ALL {
        let found = bits(&case.by(AttentionPath::Hopper, schedule, extras));
        let windows = &case.windows;
        assert!(found == expected, "{:?}, {:?}, windows {windows:?}, {schedule:?}", case.shape, case.heads);
    }
}

#[test]
fn every_size_of_heads_has_the_bits_of_the_other_kernel() {
    for (heads, dim, window, lengths) in [
        ((4, 2), 64, None, &LENGTHS[..]),
        ((4, 1), 16, Some(5), &LENGTHS),
        ((2, 1), 80, Some(70), &[130, 3]),
        ((2, 2), 96, None, &[65, 24]),
        ((2, 1), 128, Some(70), &[1, 150]),
        ((1, 1), 72, Some(64), &[129]),
        ((3, 1), 120, None, &[193]),
        ((1, 1), 8, Some(1), &[70]),
    ] {
        assert_same_bits(&Case::new((heads.0, heads.1, dim), window, lengths), Extras::default());
    }
}

/// More tiles than the rings hold, and more pieces than blocks.
#[test]
fn long_windows_go_around_the_rings() {
    for (dim, window, lengths) in
        [(64, None, &[700, 5][..]), (128, Some(300), &[600, 300]), (64, Some(129), &[64, 640])]
    {
        assert_same_bits(&Case::new((2, 1, dim), window, lengths), Extras::default());
    }
}

#[test]
fn softcaps_sinks_and_parts_of_heads_have_the_bits_of_the_other_kernel() {
    let sinks = random(4, 4.0, 9);
    for (softcap, sinks) in [(Some(2.0), None), (None, Some(&sinks[..])), (Some(30.0), Some(&sinks[..]))] {
        let case = Case::new((4, 2, 64), Some(70), &[3, 140]).heads(1..3);
        assert_same_bits(&case, Extras { softcap, sinks });
    }
}

/// As close to the CPU backend as the other kernel is held to.
#[test]
fn it_is_as_close_to_f64_as_rounding_allows() {
    let case = Case::new((2, 1, 128), None, &[1, 200]);
    assert_close(
        &case,
        &case.by(AttentionPath::Hopper, Schedule::ALL[3], Extras::default()),
        Extras::default(),
    );
}

/// Runs of queries that begin and end inside blocks and inside what one warpgroup takes, one of no query at all.
#[test]
fn some_positions_have_the_bits_of_all() {
    let asked = [60..65, 0..0, 70..130, 100..163, 0..1, 190..260];
    for window in [None, Some(70)] {
        let mut case = Case::new((4, 2, 64), window, &[65, 3, 130, 200, 300, 260]);
        let all = case.by(AttentionPath::Hopper, Schedule::ALL[1], Extras::default());
        let width = 4 * 64;
        let pick = |values: &[f32]| -> Vec<f32> {
            let rows = case.windows.iter().zip(&asked);
            let rows = rows.map(|(window, asked)| window.start + asked.start..window.start + asked.end);
            rows.flat_map(|rows| &values[rows.start * width..rows.end * width]).copied().collect()
        };
        let (expected, queries) = (pick(&all), pick(&case.inputs[0]));
        let mut end = 0;
        let span = |asked: &Range<usize>| {
            end += asked.len();
            Span { rows: end - asked.len()..end, first: asked.start }
        };
        case.queries = asked.iter().map(span).collect();
        for schedule in Schedule::ALL {
            let device = Emulated::new(schedule).with_warpgroups(Warpgroups::Present);
            let upload =
                |heads: usize, values: &[f32]| CudaBuffer::upload(&device, heads * 64, values).expect("room");
            let (q, k, v) = (upload(4, &queries), upload(2, &case.inputs[1]), upload(2, &case.inputs[2]));
            let found = attend(
                &device,
                [&q, &k, &v],
                &case.shape,
                0..4,
                Compute::Bf16,
                Some(AttentionPath::Hopper),
                case.asked(),
            );
            let found = found.expect("attention").download(&device).expect("a result");
            assert!(bits(&found) == bits(&expected), "{window:?} {schedule:?}");
        }
    }
}

/// Whatever stands in other windows, in heads beside it, or before what a sliding window sees.
#[test]
fn nothing_outside_a_window_shows_not_even_nan() {
    for window in [None, Some(64)] {
        let case = Case::new((2, 2, 64), window, &[70, 65, 130]);
        let poisoned = |rows: Range<usize>| {
            let mut poisoned = Case::new((2, 2, 64), window, &[70, 65, 130]);
            for input in &mut poisoned.inputs[1..] {
                input[rows.start * 128..rows.end * 128].fill(f32::NAN);
            }
            poisoned.by(AttentionPath::Hopper, Schedule::ALL[3], Extras::default())
        };
        let sound = case.by(AttentionPath::Hopper, Schedule::ALL[0], Extras::default());
        let around = [poisoned(0..70), poisoned(135..265)];
        for found in &around {
            assert!(bits(&found[70 * 128..135 * 128]) == bits(&sound[70 * 128..135 * 128]), "{window:?}");
            assert!(found.iter().any(|value| value.is_nan()));
        }
    }
}

/// What is no number in a key or a value makes the rows that see it NaN, as with the other kernel.
#[test]
fn what_is_not_finite_is_handed_on() {
    let nan = |values: Vec<f32>| -> Vec<Option<u32>> {
        values.iter().map(|value| (!value.is_nan()).then_some(value.to_bits())).collect()
    };
    for (input, value) in
        [(0, f32::NAN), (1, f32::NAN), (1, f32::INFINITY), (2, f32::INFINITY), (2, f32::NAN)]
    {
        let mut case = Case::new((1, 1, 64), None, &[150]);
        case.inputs[input][70 * 64 + 3] = value;
        let found = nan(case.by(AttentionPath::Hopper, Schedule::ALL[0], Extras::default()));
        assert!(found[64 * 64..].contains(&None) && !found[..64 * 64].contains(&None));
        assert_eq!(found, nan(case.by(AttentionPath::Mma, Schedule::ALL[0], Extras::default())));
        // A weight of 0 times a value that is infinite is NaN here alone.
        if input < 2 {
            let rows = |values: Vec<Option<u32>>| -> Vec<bool> {
                values.chunks_exact(64).map(|row| row.contains(&None)).collect()
            };
            assert_eq!(rows(found), rows(nan(case.on_the_cpu(Compute::Bf16))), "{input} {value}");
        }
    }
}

/// One key, whose score is 0, beside a sink: what is written is a value divided by a denominator known to the last bit.
#[test]
fn quotients_are_rounded_once_however_large() {
    let sinks = [-0.7, -3.3];
    for largest_exponent in [3, 120] {
        let mut case = Case::new((2, 1, 128), None, &[1, 1, 1, 1]);
        case.inputs[0].fill(0.0);
        let exponents = random(4 * 128, largest_exponent as f32, 5);
        for (value, exponent) in case.inputs[2].iter_mut().zip(&exponents) {
            *value *= exponent.exp2();
        }
        // One that is divided by itself, as a zero is.
        case.inputs[2][3 * 128] = 0.0;
        let extras = Extras { softcap: None, sinks: Some(&sinks) };
        for path in [AttentionPath::Mma, AttentionPath::Hopper] {
            let found = case.by(path, Schedule::ALL[0], extras);
            for (index, found) in found.iter().enumerate() {
                let (row, head, d) = (index / 256, index / 128 % 2, index % 128);
                let total = exp_fast(sinks[head]) + 1.0;
                let expected = round_bf16(case.inputs[2][row * 128 + d]) / total;
                assert_eq!(
                    found.to_bits(),
                    expected.to_bits(),
                    "{path}, row {row}, head {head}, {d}: {found}"
                );
            }
        }
    }
}

#[test]
fn the_path_serves_where_it_can_and_is_named() {
    use crate::backend::Backend;
    let with = Emulated::new(Schedule::ALL[0]).with_warpgroups(Warpgroups::Present);
    let without = Emulated::new(Schedule::ALL[0]);
    let shape = |head_dim| AttentionShape { heads: 1, kv_heads: 1, head_dim, window: None };
    for (device, asked_for, head_dim, expected) in [
        (&with, None, 128, AttentionPath::Mma),
        (&with, Some(AttentionPath::Mma), 128, AttentionPath::Mma),
        (&with, Some(AttentionPath::Hopper), 128, AttentionPath::Hopper),
        (&with, Some(AttentionPath::Hopper), 136, AttentionPath::Mma),
        (&with, Some(AttentionPath::Hopper), 33, AttentionPath::Mma),
        (&without, Some(AttentionPath::Hopper), 128, AttentionPath::Mma),
    ] {
        assert_eq!(path::path(device, asked_for, &shape(head_dim)), expected, "{asked_for:?} {head_dim}");
    }
    let cuda = Cuda::new(with).with_attention(Some(AttentionPath::Hopper));
    assert_eq!(cuda.identity().isa, "emulated, attention by hopper");
    assert_eq!(cuda.another_rank().identity(), cuda.identity());
}
