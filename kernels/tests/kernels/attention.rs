//! Attention against a softmax in f64 written from its definition: grouped queries, sliding windows, lengths around the
//! tiles of 64 keys.

use std::ops::Range;

use ctq_kernels::cpu::Cpu;
use ctq_kernels::{AttentionShape, Backend, Compute, Span};

use crate::plain::{Random, on_every_isa, relative, same_bits, to_bf16};

/// Lengths below, at and above a tile of keys and a block of queries.
const LENGTHS: [usize; 7] = [1, 7, 63, 64, 65, 130, 25];

const SLIDING: [Option<usize>; 6] = [None, Some(1), Some(16), Some(64), Some(65), Some(100)];

fn windows() -> Vec<Range<usize>> {
    let mut end = 0;
    let range = |length: &usize| {
        end += length;
        end - length..end
    };
    LENGTHS.iter().map(range).collect()
}

/// q, k and v of all windows.
fn values(shape: &AttentionShape) -> [Vec<f32>; 3] {
    let mut random = Random::new(shape.head_dim as u64);
    let rows: usize = LENGTHS.iter().sum();
    [shape.heads, shape.kv_heads, shape.kv_heads].map(|heads| {
        random.floats(rows * heads * shape.head_dim).into_iter().map(|value| value * 3.0).collect()
    })
}

/// What one query head of one position sees: softmax of scaled scores, times the values.
fn definition([q, k, v]: &[Vec<f64>; 3], shape: &AttentionShape) -> Vec<f64> {
    let dim = shape.head_dim;
    let rows: usize = LENGTHS.iter().sum();
    let mut output = vec![0.0; rows * shape.heads * dim];
    for window in windows() {
        for row in window.clone() {
            let oldest =
                shape.window.map_or(window.start, |seen| (row + 1).saturating_sub(seen).max(window.start));
            for head in 0..shape.heads {
                let kv = head / (shape.heads / shape.kv_heads);
                let query = &q[(row * shape.heads + head) * dim..][..dim];
                let key = |row: usize| &k[(row * shape.kv_heads + kv) * dim..][..dim];
                let value = |row: usize| &v[(row * shape.kv_heads + kv) * dim..][..dim];
                let score =
                    |row| query.iter().zip(key(row)).map(|(q, k)| q * k).sum::<f64>() / (dim as f64).sqrt();
                let scores: Vec<f64> = (oldest..=row).map(score).collect();
                let largest = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
                let powers: Vec<f64> = scores.iter().map(|score| (score - largest).exp()).collect();
                let total: f64 = powers.iter().sum();
                let out = &mut output[(row * shape.heads + head) * dim..][..dim];
                for (power, seen) in powers.iter().zip(oldest..=row) {
                    out.iter_mut().zip(value(seen)).for_each(|(out, value)| *out += power / total * value);
                }
            }
        }
    }
    output
}

/// The columns of some heads, of values of all query heads.
fn columns(values: &[f32], shape: &AttentionShape, heads: &Range<usize>) -> Vec<f32> {
    let dim = shape.head_dim;
    let rows = values.chunks_exact(shape.heads * dim);
    rows.flat_map(|row| &row[heads.start * dim..heads.end * dim]).copied().collect()
}

fn attend(
    cpu: &Cpu,
    values: &[Vec<f32>; 3],
    shape: &AttentionShape,
    heads: Range<usize>,
    compute: Compute,
) -> Vec<f32> {
    let [q, k, v] = values;
    let (wide, narrow) = (heads.len() * shape.head_dim, shape.kv_heads * shape.head_dim);
    let (q, k, v) = (
        cpu.upload(wide, &columns(q, shape, &heads)).expect("room"),
        cpu.upload(narrow, k).expect("room"),
        cpu.upload(narrow, v).expect("room"),
    );
    let (windows, queries) = (windows(), Span::whole(&windows()));
    cpu.download(&cpu.attend(&q, &k, &v, shape, heads, compute, &queries, &windows).expect("room"))
        .expect("room")
}

fn shapes() -> Vec<AttentionShape> {
    let heads = [(32, 6, 2), (48, 4, 1), (64, 2, 2), (80, 3, 1), (128, 4, 2)];
    let shape = |(head_dim, heads, kv_heads), window| AttentionShape { heads, kv_heads, head_dim, window };
    heads.into_iter().flat_map(|of| SLIDING.map(|window| shape(of, window))).collect()
}

#[test]
fn attention_is_the_softmax_of_the_definition() {
    for shape in shapes() {
        let values = values(&shape);
        let found = on_every_isa(|cpu| attend(cpu, &values, &shape, 0..shape.heads, Compute::F32));
        let wide = values.each_ref().map(|values| values.iter().copied().map(f64::from).collect());
        let distance = relative(&found, &definition(&wide, &shape));
        assert!(distance <= 2e-6, "{shape:?}: {distance:e}");
    }
}

/// With bf16 the probabilities are rounded too, by at most one part in 512 each; the operands' rounding is the
/// definition's.
#[test]
fn bf16_attention_is_the_definition_on_rounded_operands() {
    for shape in shapes() {
        let values = values(&shape);
        let found = on_every_isa(|cpu| attend(cpu, &values, &shape, 0..shape.heads, Compute::Bf16));
        let rounded = values.each_ref().map(|values| values.iter().map(|value| to_bf16(*value)).collect());
        let distance = relative(&found, &definition(&rounded, &shape));
        assert!(distance <= 2.0_f64.powi(-9), "{shape:?}: {distance:e}");
    }
}

/// Values of 1 show what the probabilities add up to: those that are rounded to bf16 and multiplied, over those that
/// are not and make the denominator.
#[test]
fn bf16_probabilities_are_rounded_and_their_denominator_is_not() {
    // One tile of keys: the running maximum is the maximum by the time anything is rounded.
    let (rows, dim) = (64, 32);
    // The second has no rows.
    let windows = [0..rows, rows..rows];
    let shape = AttentionShape { heads: 1, kv_heads: 1, head_dim: dim, window: None };
    let mut random = Random::new(11);
    let (q, k) = (random.floats(rows * dim), random.floats(rows * dim));
    let found = on_every_isa(|cpu| {
        let [q, k, v] = [&q, &k, &vec![1.0; rows * dim]].map(|values| cpu.upload(dim, values).expect("room"));
        cpu.download(
            &cpu.attend(&q, &k, &v, &shape, 0..1, Compute::Bf16, &Span::whole(&windows), &windows)
                .expect("room"),
        )
        .expect("room")
    });
    let round = |values: &[f32]| values.iter().map(|value| to_bf16(*value)).collect::<Vec<f64>>();
    let (q, k) = (round(&q), round(&k));
    let (mut distance, mut size) = (0.0, 0.0);
    for (row, found) in found.chunks_exact(dim).enumerate() {
        let dot = |key: usize| (0..dim).map(|d| q[row * dim + d] * k[key * dim + d]).sum::<f64>();
        let scores: Vec<f64> = (0..=row).map(|key| dot(key) / (dim as f64).sqrt()).collect();
        let largest = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        let powers: Vec<f64> = scores.iter().map(|score| (score - largest).exp()).collect();
        let rounded: f64 = powers.iter().map(|power| to_bf16(*power as f32)).sum();
        // How far from 1 the sum is: small, but far above the noise of f32.
        let excess = rounded / powers.iter().sum::<f64>() - 1.0;
        distance += (f64::from(found[0]) - 1.0 - excess).powi(2);
        size += excess.powi(2);
    }
    assert!((distance / size).sqrt() < 0.05, "{:e} of {:e}", distance.sqrt(), size.sqrt());
}

#[test]
fn some_heads_give_the_bits_of_all() {
    let shape = AttentionShape { heads: 6, kv_heads: 2, head_dim: 32, window: Some(100) };
    let values = values(&shape);
    for compute in [Compute::F32, Compute::Bf16] {
        let cpu = Cpu::detect();
        let all = attend(&cpu, &values, &shape, 0..6, compute);
        for heads in [0..1, 2..5, 5..6, 3..3] {
            let expected = columns(&all, &shape, &heads);
            assert!(
                same_bits(&attend(&cpu, &values, &shape, heads.clone(), compute), &expected),
                "{heads:?}"
            );
        }
    }
}

/// Runs of queries that begin and end inside blocks, and none at all.
#[test]
fn some_positions_give_the_bits_of_all() {
    for window in SLIDING {
        let shape = AttentionShape { heads: 4, kv_heads: 2, head_dim: 48, window };
        let values = values(&shape);
        let windows = windows();
        let asked = [0..1, 3..5, 0..0, 63..64, 20..61, 25..130, 0..25];
        let rows = |values: &[f32]| -> Vec<f32> {
            let rows = windows.iter().zip(&asked);
            let rows = rows.map(|(window, asked)| window.start + asked.start..window.start + asked.end);
            rows.flat_map(|rows| &values[rows.start * 4 * 48..rows.end * 4 * 48]).copied().collect()
        };
        let mut end = 0;
        let span = |asked: &Range<usize>| {
            end += asked.len();
            Span { rows: end - asked.len()..end, first: asked.start }
        };
        let queries: Vec<Span> = asked.iter().map(span).collect();
        for compute in [Compute::F32, Compute::Bf16] {
            let found = on_every_isa(|cpu| {
                let q = cpu.upload(4 * 48, &rows(&values[0])).expect("room");
                let [k, v] = [&values[1], &values[2]].map(|values| cpu.upload(2 * 48, values).expect("room"));
                let found = cpu.attend(&q, &k, &v, &shape, 0..4, compute, &queries, &windows);
                cpu.download(&found.expect("room")).expect("room")
            });
            let all = attend(&Cpu::detect(), &values, &shape, 0..4, compute);
            assert!(same_bits(&found, &rows(&all)), "{window:?} {compute:?}");
        }
    }
}

/// A window's result depends on nothing outside it.
#[test]
fn a_window_gives_the_bits_that_it_gives_alone() {
    let shape = AttentionShape { heads: 4, kv_heads: 2, head_dim: 48, window: Some(64) };
    let values = values(&shape);
    let cpu = Cpu::detect();
    let together = attend(&cpu, &values, &shape, 0..4, Compute::Bf16);
    for window in windows() {
        let rows = |values: &[f32], width: usize| values[window.start * width..window.end * width].to_vec();
        let (wide, narrow) = (4 * 48, 2 * 48);
        let [q, k, v] = [(&values[0], wide), (&values[1], narrow), (&values[2], narrow)]
            .map(|(values, width)| cpu.upload(width, &rows(values, width)).expect("room"));
        let alone = 0..window.len();
        let whole = std::slice::from_ref(&alone);
        let queries = Span::whole(whole);
        let alone = cpu.attend(&q, &k, &v, &shape, 0..4, Compute::Bf16, &queries, whole).expect("room");
        assert!(same_bits(&cpu.download(&alone).expect("room"), &rows(&together, wide)), "{window:?}");
    }
}
