//! Norms, rotation, gates, sums and log-sum-exps against their definitions in f64.

use ctq_kernels::cpu::Cpu;
use ctq_kernels::{Backend, Compute, Pieces, Rotation, Span, Treatment, VOCABULARY_TILE};
use ctq_model::matrix::{Code, Formula};
use ctq_model::rope::{Rope, RopeScaling};

use crate::plain::{Packed, Random, on_every_isa, relative};

const ROWS: usize = 37;

fn wide(values: &[f32]) -> Vec<f64> {
    values.iter().copied().map(f64::from).collect()
}

#[test]
fn a_norm_divides_by_the_root_of_the_mean_square() {
    // The whole of a row, or each head of it.
    for (width, length) in [(128, 128), (96, 32), (77, 77)] {
        let mut random = Random::new(1);
        let (x, weight) = (random.floats(ROWS * width), random.floats(length));
        let epsilon = 1e-5;
        let found = on_every_isa(|cpu| {
            cpu.download(&cpu.norm(&cpu.upload(width, &x).expect("room"), &weight, epsilon).expect("room"))
                .expect("room")
        });
        let expected: Vec<f64> = x
            .chunks_exact(length)
            .flat_map(|run| {
                let mean = wide(run).iter().map(|x| x * x).sum::<f64>() / length as f64;
                let root = (mean + f64::from(epsilon)).sqrt();
                run.iter().zip(&weight).map(move |(x, weight)| f64::from(*x) / root * f64::from(*weight))
            })
            .collect();
        let distance = relative(&found, &expected);
        assert!(distance <= 1e-7, "{width} by {length}: {distance:e}");
    }
}

#[test]
fn a_rotation_turns_pairs_half_a_head_apart() {
    for head_dim in [32, 48, 80, 128] {
        let (theta, width, half) = (10_000.0, 3 * head_dim, head_dim / 2);
        let rope = Rope { theta, scaling: RopeScaling::Default };
        let rotation = Rotation::new(&rope, head_dim, 2_000);
        let x = Random::new(2).floats(2_100 * width);
        // Positions start anew in each window.
        let windows = [0..100, 100..2_100];
        let found = on_every_isa(|cpu| {
            let mut x = cpu.upload(width, &x).expect("room");
            cpu.rotate(&mut x, &rotation, &Span::whole(&windows)).expect("room");
            cpu.download(&x).expect("room")
        });
        let expected: Vec<f64> = (0..x.len())
            .map(|at| {
                let (row, place) = (at / width, at % head_dim);
                let position = if row < 100 { row } else { row - 100 };
                // Exponents, powers, frequencies and angles are f32 in transformers.
                let exponent = (2 * (place % half)) as f32 / head_dim as f32;
                let frequency = 1.0 / (theta.powf(f64::from(exponent)) as f32);
                let angle = f64::from(position as f32 * frequency);
                let (here, there) = if place < half { (x[at], -x[at + half]) } else { (x[at], x[at - half]) };
                f64::from(here) * angle.cos() + f64::from(there) * angle.sin()
            })
            .collect();
        let distance = relative(&found, &expected);
        assert!(distance <= 1e-6, "{head_dim}: {distance:e}");
    }
}

#[test]
fn a_gate_is_silu_times_up() {
    let mut random = Random::new(4);
    let gate: Vec<f32> = random.floats(ROWS * 96).iter().map(|x| x * 40.0).collect();
    let up = random.floats(ROWS * 96);
    let found = on_every_isa(|cpu| {
        cpu.download(
            &cpu.gate(cpu.upload(96, &gate).expect("room"), &cpu.upload(96, &up).expect("room"))
                .expect("room"),
        )
        .expect("room")
    });
    for ((found, gate), up) in found.iter().zip(wide(&gate)).zip(wide(&up)) {
        let expected = gate / (1.0 + (-gate).exp()) * up;
        assert!(
            (f64::from(*found) - expected).abs() <= 4e-7 * expected.abs() + 1e-30,
            "{gate}: {found} {expected}"
        );
    }
}

#[test]
fn rows_are_gathered_scattered_and_put_side_by_side() {
    let cpu = Cpu::detect();
    let x = cpu.upload(2, &[1.0, 2.0, 3.0, 4.0, 5.0, 6.0]).expect("room");
    assert_eq!(
        cpu.download(&cpu.gather(&x, &[2, 0, 2]).expect("room")).expect("room"),
        [5.0, 6.0, 1.0, 2.0, 5.0, 6.0]
    );
    let mut sum = cpu.upload(2, &[0.0; 6]).expect("room");
    cpu.scatter_add(&mut sum, &x, &[1, 1, 0], &[0.5, 2.0, -1.0]).expect("room");
    assert_eq!(cpu.download(&sum).expect("room"), [-5.0, -6.0, 6.5, 9.0, 0.0, 0.0]);
    cpu.add(&mut sum, &x).expect("room");
    assert_eq!(cpu.download(&sum).expect("room"), [-4.0, -4.0, 9.5, 13.0, 5.0, 6.0]);
    let y = cpu.upload(1, &[7.0, 8.0, 9.0]).expect("room");
    assert_eq!(
        cpu.download(&cpu.concatenate(&[&x, &y]).expect("room")).expect("room"),
        [1.0, 2.0, 7.0, 3.0, 4.0, 8.0, 5.0, 6.0, 9.0]
    );
}

#[test]
fn the_first_row_that_is_not_finite_is_found() {
    let cpu = Cpu::detect();
    let mut values = Random::new(6).floats(ROWS * 8);
    assert_eq!(cpu.first_non_finite(&cpu.upload(8, &values).expect("room")).expect("room"), None);
    values[30 * 8 + 1] = f32::NAN;
    values[29 * 8 + 7] = f32::NEG_INFINITY;
    assert_eq!(cpu.first_non_finite(&cpu.upload(8, &values).expect("room")).expect("room"), Some(29));
}

/// A vocabulary that is no whole number of tiles, asked for in two runs: partial sums join to the log-sum-exp of all.
#[test]
fn partial_sums_of_the_vocabulary_join_to_its_log_sum_exp() {
    let (vocabulary, k) = (3 * VOCABULARY_TILE + 17, 64);
    let mut random = Random::new(8);
    let head: Vec<f32> = random.floats(vocabulary * k).iter().map(|x| x * 2.0).collect();
    let x = random.floats(ROWS * k);
    let packed = Packed {
        n: vocabulary,
        k,
        code: Code::F32,
        formula: Formula::Dense,
        codes: head.iter().flat_map(|value| value.to_le_bytes()).collect(),
        scales: None,
        zeros: None,
        global_scale: None,
    };
    let tiled = packed.tiled();
    let targets: Vec<Option<u32>> = (0..ROWS).map(|row| Some((row * 11 % vocabulary) as u32)).collect();
    let cut = 2 * VOCABULARY_TILE;
    let found = on_every_isa(|cpu| {
        let x = cpu.upload(k, &x).expect("room");
        let x =
            cpu.prepare(&x, &Treatment::Plain, Compute::F32, std::slice::from_ref(&(0..ROWS))).expect("room");
        let matrix = cpu.matrix(&tiled, 0..vocabulary, Pieces::VocabularyTiles).expect("room");
        let runs = [0..cut, cut..vocabulary]
            .map(|run| cpu.head(&x, &matrix, run, &targets, Compute::F32).expect("logits"));
        let nll = |row: usize| {
            let partials = runs.iter().flat_map(|run| &run.partials[row * run.tiles..(row + 1) * run.tiles]);
            let sum: f64 = partials.map(|(largest, sum)| f64::from(*largest).exp() * sum).sum();
            let target =
                runs.iter().find_map(|run| run.targets[row]).expect("the target is in one of the runs");
            (sum.ln() - f64::from(target)) as f32
        };
        (0..ROWS).map(nll).collect()
    });
    let (x, head) = (wide(&x), wide(&head));
    for (row, found) in found.iter().enumerate() {
        let logit = |id: usize| (0..k).map(|k_at| x[row * k + k_at] * head[id * k + k_at]).sum::<f64>();
        let total: f64 = (0..vocabulary).map(|id| logit(id).exp()).sum();
        let expected = total.ln() - logit(row * 11 % vocabulary);
        assert!((f64::from(*found) - expected).abs() < 1e-5, "row {row}: {found} {expected}");
    }
}
