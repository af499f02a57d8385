//! Attention on the emulated device against the CPU backend and against plain loops in f64.

#[path = "attend_hopper.rs"]
mod hopper;

use super::*;
use crate::cpu::math::round_bf16;
use crate::cpu::{CpuBuffer, Isa};
use crate::cuda::emulated::{Emulated, Schedule, Warpgroups};

/// Uniform numbers of at most `size`.
fn random(count: usize, size: f32, seed: u32) -> Vec<f32> {
    let mut state = seed;
    let mut next = || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        size * ((state >> 8) as f32 / 8_388_608.0 - 1.0)
    };
    (0..count).map(|_| next()).collect()
}

/// Queries, keys and values of a few windows, and which heads are asked for.
struct Case {
    shape: AttentionShape,
    heads: Range<usize>,
    windows: Vec<Range<usize>>,
    /// Which positions are asked for.
    queries: Vec<Span>,
    /// Queries, keys, values.
    inputs: [Vec<f32>; 3],
}

impl Case {
    /// Heads and key heads; scores of a few units, so that a few keys matter most.
    fn new(
        (heads, kv_heads, head_dim): (usize, usize, usize),
        window: Option<usize>,
        lengths: &[usize],
    ) -> Case {
        let mut windows = Vec::new();
        let mut rows = 0;
        for length in lengths {
            windows.push(rows..rows + length);
            rows += length;
        }
        let size = 3.0 * (head_dim as f32).powf(-0.25) * 3.0_f32.sqrt().sqrt();
        let inputs = [
            random(rows * heads * head_dim, size, 1),
            random(rows * kv_heads * head_dim, size, 2),
            random(rows * kv_heads * head_dim, 1.0, 3),
        ];
        let (shape, queries) = (AttentionShape { heads, kv_heads, head_dim, window }, Span::whole(&windows));
        Case { shape, heads: 0..heads, windows, queries, inputs }
    }

    fn heads(self, heads: Range<usize>) -> Case {
        Case { heads, ..self }
    }

    /// One of the windows by itself.
    fn alone(&self, window: usize) -> Case {
        let rows = self.windows[window].clone();
        let part = |values: &Vec<f32>, heads: usize| {
            let width = heads * self.shape.head_dim;
            values[rows.start * width..rows.end * width].to_vec()
        };
        let [q, k, v] = &self.inputs;
        let (heads, kv_heads) = (self.shape.heads, self.shape.kv_heads);
        Case {
            shape: self.shape,
            heads: self.heads.clone(),
            windows: std::iter::once(0..rows.len()).collect(),
            queries: vec![Span { rows: 0..rows.len(), first: 0 }],
            inputs: [part(q, heads), part(k, kv_heads), part(v, kv_heads)],
        }
    }

    /// What the operation takes: queries of the heads that are asked for, all keys and values.
    fn of_heads(&self) -> [Vec<f32>; 3] {
        let dim = self.shape.head_dim;
        let columns = self.heads.start * dim..self.heads.end * dim;
        let [q, k, v] = self.inputs.clone();
        let rows = q.chunks_exact(self.shape.heads * dim);
        [rows.flat_map(|row| &row[columns.clone()]).copied().collect(), k, v]
    }

    fn asked(&self) -> Asked<'_> {
        Asked { queries: &self.queries, windows: &self.windows }
    }

    fn rows(&self) -> usize {
        self.windows.iter().map(ExactSizeIterator::len).sum()
    }

    fn run(
        &self,
        schedule: Schedule,
        operation: impl Fn(
            &Emulated,
            [&CudaBuffer<<Emulated as Device>::Memory>; 3],
        ) -> CudaBuffer<<Emulated as Device>::Memory>,
    ) -> Vec<f32> {
        let device = Emulated::new(schedule).with_warpgroups(Warpgroups::Present);
        let buffers = self
            .of_heads()
            .map(|values| CudaBuffer::upload(&device, values.len() / self.rows(), &values).expect("room"));
        operation(&device, buffers.each_ref()).download(&device).expect("a result")
    }

    fn attend(&self, schedule: Schedule, compute: Compute) -> Vec<f32> {
        self.run(schedule, |device, inputs| {
            let heads = self.heads.clone();
            attend(device, inputs, &self.shape, heads, compute, None, self.asked()).expect("attention")
        })
    }

    /// With bf16 operands.
    fn by(&self, path: AttentionPath, schedule: Schedule, extras: Extras<'_>) -> Vec<f32> {
        self.run(schedule, |device, inputs| {
            bf16(device, inputs, &self.shape, self.heads.clone(), path, self.asked(), extras)
                .expect("attention")
        })
    }

    fn with_extras(&self, schedule: Schedule, extras: Extras<'_>) -> Vec<f32> {
        self.by(AttentionPath::Mma, schedule, extras)
    }

    fn on_the_cpu(&self, compute: Compute) -> Vec<f32> {
        let buffers = self.of_heads().map(|values| CpuBuffer { width: values.len() / self.rows(), values });
        let (shape, heads) = (&self.shape, self.heads.clone());
        let (isa, inputs) = (Isa::detect(), buffers.each_ref());
        crate::cpu::attend::attend(isa, inputs, shape, heads, compute, &self.queries, &self.windows)
            .values
            .clone()
    }

    /// Outputs of operands rounded to bf16 in f64, and the sums of the magnitudes that each is a sum of.
    fn plain(&self, extras: Extras<'_>) -> Vec<(f64, f64)> {
        let dim = self.shape.head_dim;
        let [q, k, v] = self
            .inputs
            .each_ref()
            .map(|values| -> Vec<f64> { values.iter().map(|value| f64::from(round_bf16(*value))).collect() });
        let mut outputs = Vec::new();
        for (window, row) in
            self.windows.iter().flat_map(|window| window.clone().map(move |row| (window, row)))
        {
            for head in self.heads.clone() {
                let kv_head = head / (self.shape.heads / self.shape.kv_heads);
                let at = |row: usize| (row * self.shape.kv_heads + kv_head) * dim;
                let query = &q[(row * self.shape.heads + head) * dim..][..dim];
                let first = self.shape.window.map_or(0, |seen| (row + 1).saturating_sub(seen));
                let keys = first.max(window.start)..row + 1;
                let score = |row: usize| {
                    let product: f64 = query.iter().zip(&k[at(row)..]).map(|(q, k)| q * k).sum();
                    let score = product / (dim as f64).sqrt();
                    extras.softcap.map_or(score, |cap| f64::from(cap) * libm::tanh(score / f64::from(cap)))
                };
                let weights: Vec<f64> = keys.clone().map(|row| libm::exp(score(row))).collect();
                let sink = extras.sinks.map_or(0.0, |sinks| libm::exp(f64::from(sinks[head])));
                let total = weights.iter().sum::<f64>() + sink;
                for d in 0..dim {
                    let terms =
                        keys.clone().zip(&weights).map(|(row, weight)| weight / total * v[at(row) + d]);
                    outputs.push(terms.fold((0.0, 0.0), |(sum, size), term| (sum + term, size + term.abs())));
                }
            }
        }
        outputs
    }
}

fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|value| value.to_bits()).collect()
}

/// What rounding a probability to bf16 explains, as a part of the magnitudes summed: half a unit in the last of eight
/// places. What f32 arithmetic adds is below a hundredth of that.
const ROUNDING: f64 = 1.01 / 256.0;

fn assert_close(case: &Case, found: &[f32], extras: Extras<'_>) {
    let expected = case.plain(extras);
    assert_eq!(found.len(), expected.len());
    let mut squares = 0.0;
    for (index, (found, (value, size))) in found.iter().zip(&expected).enumerate() {
        let error = (f64::from(*found) - value).abs() / size;
        assert!(error <= ROUNDING, "{:?}: element {index} is {found}, not {value}: {error:e}", case.shape);
        squares += error * error;
    }
    let root_mean_square = (squares / expected.len() as f64).sqrt();
    // Most roundings cancel.
    assert!(root_mean_square < ROUNDING / 3.0, "{:?}: {root_mean_square:e}", case.shape);
}

const LENGTHS: [usize; 5] = [1, 63, 64, 65, 130];

#[test]
fn f32_has_the_bits_of_the_cpu() {
    for (heads, dim, window, lengths) in [
        ((4, 2), 64, None, &LENGTHS[..]),
        ((4, 1), 16, Some(5), &LENGTHS),
        ((4, 2), 80, Some(70), &[130, 3]),
        ((2, 2), 96, None, &[65, 24]),
        ((2, 1), 128, Some(70), &[1, 200]),
        ((1, 1), 256, None, &[100]),
        ((1, 1), 33, None, &[193]),
        ((2, 1), 8, None, &[385, 400]),
        ((1, 1), 300, Some(1), &[70]),
    ] {
        let case = Case::new((heads.0, heads.1, dim), window, lengths);
        let expected = bits(&case.on_the_cpu(Compute::F32));
        for schedule in Schedule::ALL {
            assert!(bits(&case.attend(schedule, Compute::F32)) == expected, "{:?} {schedule:?}", case.shape);
        }
    }
}

#[test]
fn f32_of_some_heads_and_with_few_blocks_has_the_bits_of_the_cpu() {
    let case = Case::new((6, 3, 16), Some(70), &[300, 1, 150]).heads(1..5);
    let expected = bits(&case.on_the_cpu(Compute::F32));
    assert!(bits(&case.attend(Schedule::ALL[0], Compute::F32)) == expected);
    // 84 pieces of work for 16 blocks.
    let few = case.run(Schedule::ALL[3], |device, inputs| {
        f32(device, inputs, &case.shape, case.heads.clone(), case.asked(), 0).expect("attention")
    });
    assert!(bits(&few) == expected);
}

#[test]
fn f32_hands_on_what_is_not_finite() {
    let nan = |values: Vec<f32>| -> Vec<Option<u32>> {
        values.iter().map(|value| (!value.is_nan()).then_some(value.to_bits())).collect()
    };
    for window in [None, Some(5)] {
        let mut case = Case::new((1, 1, 16), window, &[60]);
        case.inputs[2][40 * 16 + 3] = f32::INFINITY;
        let found = nan(case.attend(Schedule::ALL[0], Compute::F32));
        assert!(found.contains(&None));
        assert_eq!(found, nan(case.on_the_cpu(Compute::F32)), "{window:?}");
    }
}

#[test]
fn bf16_is_as_close_to_f64_as_rounding_allows() {
    for (heads, dim, window, lengths) in [
        ((4, 2), 64, None, &LENGTHS[..]),
        ((4, 1), 16, Some(5), &LENGTHS),
        ((2, 1), 80, Some(70), &[130, 3]),
        ((2, 2), 96, None, &[65, 24]),
        ((2, 1), 128, Some(70), &[1, 150]),
        ((1, 1), 256, None, &[100]),
        ((1, 1), 33, None, &[70]),
        ((1, 1), 72, Some(64), &[129]),
        ((1, 1), 192, Some(65), &[129]),
        ((1, 1), 248, None, &[64]),
    ] {
        let case = Case::new((heads.0, heads.1, dim), window, lengths);
        let found = case.attend(Schedule::ALL[0], Compute::Bf16);
        assert_close(&case, &found, Extras::default());
        for schedule in &Schedule::ALL[1..] {
            assert!(bits(&case.attend(*schedule, Compute::Bf16)) == bits(&found), "{schedule:?}");
        }
    }
}

#[test]
fn bf16_differs_from_the_cpu_in_the_order_of_sums_alone() {
    for (dim, window) in [(64, None), (128, Some(70))] {
        let case = Case::new((4, 2, dim), window, &[1, 130, 200]);
        let found = case.attend(Schedule::ALL[0], Compute::Bf16);
        let expected = case.on_the_cpu(Compute::Bf16);
        let mut errors: Vec<f64> = found
            .iter()
            .zip(&expected)
            .zip(case.plain(Extras::default()))
            .map(|((found, expected), (_, size))| f64::from((found - expected).abs()) / size)
            .collect();
        errors.sort_unstable_by(f64::total_cmp);
        let at = |part: f64| errors[(part * (errors.len() - 1) as f64) as usize];
        // Another last bit of a probability may round the other way, which is seldom.
        assert!(
            at(0.5) < 1e-8 && at(0.99) < 2e-7 && at(1.0) < 1e-6,
            "{:e} {:e} {:e}",
            at(0.5),
            at(0.99),
            at(1.0)
        );
    }
}

#[test]
fn softcaps_and_sinks_are_those_of_plain_loops() {
    let sinks = random(4, 4.0, 9);
    for (softcap, sinks) in [(Some(2.0), None), (None, Some(&sinks[..])), (Some(30.0), Some(&sinks[..]))] {
        let extras = Extras { softcap, sinks };
        for (dim, window) in [(16, None), (64, Some(5)), (256, Some(70))] {
            let case = Case::new((4, 2, dim), window, &[3, 80]).heads(1..3);
            assert_close(&case, &case.with_extras(Schedule::ALL[3], extras), extras);
        }
    }
}

#[test]
fn neither_other_windows_nor_other_heads_show() {
    for (compute, window) in
        [(Compute::Bf16, None), (Compute::Bf16, Some(70)), (Compute::F32, None), (Compute::F32, Some(70))]
    {
        let case = Case::new((4, 2, 32), window, &[65, 130, 1, 63]);
        let width = 4 * 32;
        let all = case.attend(Schedule::ALL[2], compute);
        for (index, window) in case.windows.iter().enumerate() {
            let alone = case.alone(index).attend(Schedule::ALL[1], compute);
            assert!(bits(&alone) == bits(&all[window.start * width..window.end * width]), "window {index}");
        }
        for heads in [0..1, 1..3, 3..4] {
            let columns = heads.start * 32..heads.end * 32;
            let part: Vec<f32> =
                all.chunks_exact(width).flat_map(|row| row[columns.clone()].iter().copied()).collect();
            let case = Case::new((4, 2, 32), window, &[65, 130, 1, 63]).heads(heads);
            assert!(bits(&case.attend(Schedule::ALL[0], compute)) == bits(&part));
        }
    }
}

/// Runs of queries that begin and end inside blocks, one of no query at all.
#[test]
fn some_positions_have_the_bits_of_all() {
    let asked = [60..65, 0..0, 29..130, 100..163];
    for compute in [Compute::Bf16, Compute::F32] {
        for window in [None, Some(70)] {
            let mut case = Case::new((4, 2, 32), window, &[65, 3, 130, 200]);
            let all = case.attend(Schedule::ALL[1], compute);
            let pick = |values: &[f32]| -> Vec<f32> {
                let rows = case.windows.iter().zip(&asked);
                let rows = rows.map(|(window, asked)| window.start + asked.start..window.start + asked.end);
                rows.flat_map(|rows| &values[rows.start * 4 * 32..rows.end * 4 * 32]).copied().collect()
            };
            let (expected, queries) = (pick(&all), pick(&case.inputs[0]));
            let mut end = 0;
            let span = |asked: &Range<usize>| {
                end += asked.len();
                Span { rows: end - asked.len()..end, first: asked.start }
            };
            case.queries = asked.iter().map(span).collect();
            let device = Emulated::new(Schedule::ALL[2]);
            let upload =
                |heads: usize, values: &[f32]| CudaBuffer::upload(&device, heads * 32, values).expect("room");
            let (q, k, v) = (upload(4, &queries), upload(2, &case.inputs[1]), upload(2, &case.inputs[2]));
            let found = attend(&device, [&q, &k, &v], &case.shape, 0..4, compute, None, case.asked());
            let found = found.expect("attention").download(&device).expect("a result");
            assert!(bits(&found) == bits(&expected), "{compute:?} {window:?}");
        }
    }
}

#[test]
fn nothing_to_do_is_done() {
    let device = Emulated::new(Schedule::ALL[0]);
    let nothing = Asked { queries: &[], windows: &[] };
    let (three, one) = ([0..3, 3..3], [0..1, 1..1]);
    let shape = AttentionShape { heads: 2, kv_heads: 1, head_dim: 16, window: None };
    let buffer = |rows: usize, width: usize| {
        CudaBuffer::upload(&device, width, &vec![1.0; rows * width]).expect("room")
    };
    for compute in [Compute::Bf16, Compute::F32] {
        let (q, kv) = (buffer(3, 0), buffer(3, 16));
        let none = attend(
            &device,
            [&q, &kv, &kv],
            &shape,
            1..1,
            compute,
            None,
            Asked { queries: &Span::whole(&three), windows: &three },
        );
        assert_eq!(none.expect("nothing").len(), 0);
        let (q, kv) = (buffer(0, 32), buffer(0, 16));
        assert_eq!(
            attend(&device, [&q, &kv, &kv], &shape, 0..2, compute, None, nothing).expect("nothing").len(),
            0
        );
    }
    let shape = AttentionShape { heads: 1, kv_heads: 1, head_dim: 264, window: None };
    let x = buffer(1, 264);
    let error = attend(
        &device,
        [&x, &x, &x],
        &shape,
        0..1,
        Compute::Bf16,
        None,
        Asked { queries: &Span::whole(&one), windows: &one },
    );
    assert!(error.expect_err("too many dimensions").to_string().contains("at most 256"));
}
