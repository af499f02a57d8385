//! Attention bit for bit against its definition in NUMERICS.md, written one number at a time; softcaps and sinks also
//! against plain sums in f64.

use half::bf16;

use super::*;
use crate::cpu::math::{exp, exp_fast};
use crate::random::Random;

/// Queries, keys and values of a few windows, and which of the queries and heads are asked for.
struct Case {
    shape: AttentionShape,
    heads: Range<usize>,
    windows: Vec<Range<usize>>,
    queries: Vec<Span>,
    /// Queries, keys, values; of the queries the asked rows and columns alone.
    inputs: [CpuBuffer; 3],
    softcap: Option<f32>,
    sinks: Option<Vec<f32>>,
}

impl Case {
    /// All queries of the heads `heads`; scores of a few units, so that a few keys matter most.
    fn new(shape: AttentionShape, heads: Range<usize>, lengths: &[usize]) -> Case {
        let (mut windows, mut rows) = (Vec::new(), 0);
        for length in lengths {
            windows.push(rows..rows + length);
            rows += length;
        }
        let positions: Vec<Range<usize>> = lengths.iter().map(|length| 0..*length).collect();
        let mut random = Random::new(shape.head_dim as u64);
        let mut buffer = |heads: usize, size: f32| {
            let width = heads * shape.head_dim;
            let values = random.floats(rows * width).into_iter().map(|value| size * value).collect();
            CpuBuffer { width, values }
        };
        let size = 4.0 * (shape.head_dim as f32).powf(-0.25);
        let inputs = [buffer(heads.len(), size), buffer(shape.kv_heads, size), buffer(shape.kv_heads, 1.0)];
        let case = Case { shape, heads, windows, queries: Vec::new(), inputs, softcap: None, sinks: None };
        let queries = Span::whole(&case.windows);
        Case { queries, ..case }.asked(&positions)
    }

    /// Some positions of each window.
    fn asked(mut self, positions: &[Range<usize>]) -> Case {
        let (mut queries, mut values, mut end) = (Vec::new(), Vec::new(), 0);
        let q = &self.inputs[0];
        for (window, positions) in self.windows.iter().zip(positions) {
            let rows = window.start + positions.start..window.start + positions.end;
            values.extend_from_slice(&q.values[rows.start * q.width..rows.end * q.width]);
            queries.push(Span { rows: end..end + rows.len(), first: positions.start });
            end += rows.len();
        }
        self.inputs[0] = CpuBuffer { width: q.width, values };
        self.queries = queries;
        self
    }

    fn run(&self, isa: Isa, compute: Compute) -> Vec<f32> {
        let extras = Extras { softcap: self.softcap, sinks: self.sinks.as_deref() };
        let asked = Asked { queries: &self.queries, windows: &self.windows, extras };
        attend_with(isa, self.inputs.each_ref(), &self.shape, self.heads.clone(), compute, asked)
            .values
            .clone()
    }

    /// What `row` makes of each query head of each row that is asked for.
    fn each(&self, row: impl Fn(Query<'_>) -> Vec<f64>) -> Vec<f64> {
        let dim = self.shape.head_dim;
        let mut outputs = Vec::new();
        for (span, window) in self.queries.iter().zip(&self.windows) {
            for (at, position) in span.rows.clone().zip(span.positions()) {
                for head in self.heads.clone() {
                    let kv_head = head / (self.shape.heads / self.shape.kv_heads);
                    let [q, k, v] = self.inputs.each_ref();
                    let column = (head - self.heads.start) * dim;
                    let of_key = |x: &'_ CpuBuffer, key: usize| {
                        x.values[(window.start + key) * x.width + kv_head * dim..][..dim].to_vec()
                    };
                    let seen = self.shape.window.map_or(0, |seen| (position + 1).saturating_sub(seen));
                    outputs.extend(row(Query {
                        query: &q.values[at * q.width + column..][..dim],
                        keys: (0..window.len()).map(|key| of_key(k, key)).collect(),
                        values: (0..window.len()).map(|key| of_key(v, key)).collect(),
                        seen: seen..position + 1,
                        softcap: self.softcap,
                        sink: self.sinks.as_ref().map(|sinks| sinks[head]),
                    }));
                }
            }
        }
        outputs
    }
}

/// One query head of one position.
struct Query<'a> {
    query: &'a [f32],
    /// Of the whole window.
    keys: Vec<Vec<f32>>,
    values: Vec<Vec<f32>>,
    seen: Range<usize>,
    softcap: Option<f32>,
    sink: Option<f32>,
}

impl Query<'_> {
    fn capped(&self, score: f32) -> f32 {
        self.softcap.map_or(score, |cap| cap * tanh_fast(score * (1.0 / cap)))
    }

    fn scale(&self) -> f32 {
        1.0 / (self.query.len() as f32).sqrt()
    }

    /// `--compute f32`.
    fn whole(&self) -> Vec<f64> {
        let score = |key: usize| {
            let terms = self.query.iter().zip(&self.keys[key]);
            self.capped(terms.fold(0.0_f32, |sum, (q, k)| q.mul_add(*k, sum)) * self.scale())
        };
        let scores: Vec<f32> = self.seen.clone().map(score).collect();
        let largest = scores.iter().copied().chain(self.sink).fold(f32::NEG_INFINITY, f32::max);
        let mut chains = [0.0_f32; 16];
        let powers: Vec<f32> = scores.iter().map(|score| exp(score - largest)).collect();
        for (key, power) in self.seen.clone().zip(&powers) {
            chains[key % 16] += power;
        }
        for width in [8, 4, 2, 1] {
            for lane in 0..width {
                chains[lane] += chains[lane + width];
            }
        }
        let total = self.sink.map_or(chains[0], |sink| chains[0] + exp(sink - largest));
        let reciprocal = 1.0 / total;
        let block = match self.keys.len() {
            rows @ ..=192 => rows,
            rows @ 193..=384 => rows.div_ceil(2),
            385.. => 192,
        };
        let output = |d: usize| {
            let mut sums = vec![0.0_f32; self.keys.len().div_ceil(block)];
            for (key, power) in self.seen.clone().zip(&powers) {
                let sum = &mut sums[key / block];
                *sum = (power * reciprocal).mul_add(self.values[key][d], *sum);
            }
            f64::from(sums.into_iter().fold(0.0_f32, |output, sum| output + sum))
        };
        (0..self.query.len()).map(output).collect()
    }

    /// `--compute bf16`.
    fn running(&self) -> Vec<f64> {
        let round = |value: f32| bf16::from_f32(value).to_f32();
        let dim = self.query.len();
        let score = |key: usize| {
            let sum = in_pairs(0..dim)
                .fold(0.0_f32, |sum, d| round(self.query[d]).mul_add(round(self.keys[key][d]), sum));
            self.capped(sum * self.scale())
        };
        let (mut largest, mut total) = self.sink.map_or((f32::NEG_INFINITY, 0.0), |sink| (sink, 1.0));
        let mut sums = vec![0.0_f32; dim];
        for tile in (0..self.seen.end).step_by(64) {
            let keys = tile.max(self.seen.start)..self.seen.end.min(tile + 64);
            if keys.is_empty() {
                continue;
            }
            let scores: Vec<f32> = keys.clone().map(score).collect();
            let new = scores.iter().copied().fold(largest, f32::max);
            let shrink = exp_fast(largest - new);
            largest = new;
            let mut powers = [0.0_f32; 64];
            keys.clone().zip(scores).for_each(|(key, score)| powers[key - tile] = exp_fast(score - new));
            let chain = |lane: usize| (0..4).fold(0.0_f32, |sum, line| sum + powers[16 * line + lane]);
            let sum = (1..16).fold(chain(0), |sum, lane| sum + chain(lane));
            total = total * shrink + sum;
            for (d, sum) in sums.iter_mut().enumerate() {
                *sum *= shrink;
                for key in in_pairs(tile..self.keys.len().min(tile + 64)).filter(|key| keys.contains(key)) {
                    *sum = round(powers[key - tile]).mul_add(round(self.values[key][d]), *sum);
                }
            }
        }
        sums.into_iter().map(|sum| f64::from(sum / total)).collect()
    }

    /// Softmax in f64 of operands that `round` has rounded.
    fn plain(&self, round: fn(f32) -> f64) -> Vec<f64> {
        let score = |key: usize| {
            let terms = self.query.iter().zip(&self.keys[key]);
            let score =
                terms.map(|(q, k)| round(*q) * round(*k)).sum::<f64>() / (self.query.len() as f64).sqrt();
            self.softcap.map_or(score, |cap| f64::from(cap) * libm::tanh(score / f64::from(cap)))
        };
        let powers: Vec<f64> = self.seen.clone().map(|key| libm::exp(score(key))).collect();
        let total = powers.iter().sum::<f64>() + self.sink.map_or(0.0, |sink| libm::exp(f64::from(sink)));
        let keys = || self.seen.clone().zip(&powers);
        (0..self.query.len())
            .map(|d| keys().map(|(key, power)| power / total * round(self.values[key][d])).sum())
            .collect()
    }
}

/// Pairs ascending, the odd one of a pair first; a lone last comes last.
fn in_pairs(range: Range<usize>) -> impl Iterator<Item = usize> {
    let end = range.end;
    range.step_by(2).flat_map(move |even| [even + 1, even]).filter(move |index| *index < end)
}

fn isas() -> impl Iterator<Item = Isa> {
    Isa::here()
}

fn shape(heads: usize, kv_heads: usize, head_dim: usize, window: Option<usize>) -> AttentionShape {
    AttentionShape { heads, kv_heads, head_dim, window }
}

/// Sizes of heads, windows of positions, groups of heads, lengths of windows; parts of heads and of positions.
fn cases() -> Vec<Case> {
    vec![
        Case::new(shape(4, 2, 64, None), 0..4, &[1, 63, 64, 65, 230]),
        Case::new(shape(2, 1, 8, None), 0..2, &[385, 400]),
        Case::new(shape(1, 1, 33, Some(70)), 0..1, &[193, 7]),
        Case::new(shape(3, 1, 80, Some(100)), 1..3, &[240]),
        Case::new(shape(4, 2, 128, Some(64)), 1..3, &[97, 130]),
        Case::new(shape(1, 1, 192, Some(1)), 0..1, &[100]),
        Case::new(shape(2, 2, 16, Some(5)), 0..2, &[300]),
        Case::new(shape(1, 1, 1, None), 0..1, &[70]),
        Case::new(shape(2, 1, 64, None), 0..2, &[300, 70, 20]).asked(&[250..290, 0..0, 3..17]),
        Case::new(shape(2, 1, 80, Some(65)), 0..2, &[300, 1]).asked(&[95..97, 0..1]),
    ]
}

#[test]
fn every_instruction_set_gives_the_bits_of_the_definition() {
    for case in cases() {
        for compute in [Compute::F32, Compute::Bf16] {
            let expected = case.each(|query| match compute {
                Compute::F32 => query.whole(),
                Compute::Bf16 => query.running(),
            });
            for isa in isas() {
                let found = case.run(isa, compute);
                assert_eq!(found.len(), expected.len());
                let other =
                    found.iter().zip(&expected).position(|(found, expected)| f64::from(*found) != *expected);
                assert_eq!(other, None, "{isa:?} {compute:?} {:?}: first other element", case.shape);
            }
        }
    }
}

#[test]
fn softcaps_and_sinks_have_the_bits_of_the_definition_and_are_those_of_plain_sums() {
    let sinks = vec![2.0, -1.0, 30.0, f32::NEG_INFINITY];
    for (softcap, sinks) in [(Some(2.0), None), (None, Some(sinks.clone())), (Some(30.0), Some(sinks))] {
        for (dim, window) in [(16, None), (64, Some(5)), (96, Some(70))] {
            let case = Case::new(shape(4, 2, dim, window), 0..4, &[3, 130]);
            let case = Case { softcap, sinks: sinks.clone(), ..case };
            for (compute, bound) in [(Compute::F32, 2e-6), (Compute::Bf16, 2.0_f64.powi(-9))] {
                let (bits, plain) = match compute {
                    Compute::F32 => {
                        (case.each(|query| query.whole()), case.each(|query| query.plain(f64::from)))
                    }
                    Compute::Bf16 => {
                        let round = |value: f32| bf16::from_f32(value).to_f64();
                        (case.each(|query| query.running()), case.each(|query| query.plain(round)))
                    }
                };
                let square = |values: &mut dyn Iterator<Item = f64>| values.map(|x| x * x).sum::<f64>();
                let distance = square(&mut bits.iter().zip(&plain).map(|(a, b)| a - b));
                let error = (distance / square(&mut plain.iter().copied())).sqrt();
                assert!(error <= bound, "{compute:?} {:?} {softcap:?}: {error:e}", case.shape);
                for isa in isas() {
                    let found: Vec<f64> = case.run(isa, compute).into_iter().map(f64::from).collect();
                    assert!(found == bits, "{isa:?} {compute:?} {:?} {softcap:?}", case.shape);
                }
            }
        }
    }
}

/// What a position does not see may be anything, as long as it shares no tile with what it sees.
#[test]
fn what_is_not_finite_reaches_no_query_before_its_tile() {
    let mut case = Case::new(shape(1, 1, 32, None), 0..1, &[300]);
    let clean = |isa, compute| Case::new(shape(1, 1, 32, None), 0..1, &[300]).run(isa, compute);
    for buffer in &mut case.inputs[1..] {
        buffer.values[192 * 32 + 5] = f32::NAN;
    }
    for (isa, compute) in isas().flat_map(|isa| [(isa, Compute::F32), (isa, Compute::Bf16)]) {
        let (found, clean) = (case.run(isa, compute), clean(isa, compute));
        assert_eq!(found[..168 * 32], clean[..168 * 32], "{isa:?} {compute:?}");
        assert!(found[192 * 32..].iter().all(|value| value.is_nan()), "{isa:?} {compute:?}");
    }
}
