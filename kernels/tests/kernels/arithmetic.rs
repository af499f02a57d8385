//! Products of values: `x * W^T` on packed weights of every kind against f64 sums of the decompressed weights. What a
//! decompressed weight is, is another test's business: here it is what [`Backend::embed`] says.

use ctq_kernels::cpu::Cpu;
use ctq_kernels::{Backend, Compute, Pieces, Treatment};
use ctq_model::DType;
use ctq_model::matrix::{Code, Formula, Sharing};

use crate::plain::{Packed, Random, on_every_isa, relative, same_bits, to_bf16};

const ROWS: usize = 101;

/// One matrix for each way a weight is stored, none a whole number of tiles.
fn matrices() -> Vec<Packed> {
    let mut random = Random::new(3);
    let (n, k) = (83, 224);
    let bf16 = |values: Vec<f32>| -> Vec<u8> {
        values.iter().flat_map(|value| value.to_bits().to_le_bytes()[2..].to_vec()).collect()
    };
    let scale = |random: &mut Random| 0.01 + random.float().abs() / 32.0;
    let mut quantized = |code: Code, formula: Formula, dtype: DType, sharing: Sharing, zero: Option<i8>| {
        let (rows, columns) = sharing.shape(n, k);
        let scales: Vec<f32> = (0..rows * columns).map(|_| scale(&mut random)).collect();
        let scales = match dtype {
            DType::BF16 => bf16(scales),
            DType::U8 => random.codes(scales.len(), |exponent| (118..124).contains(&exponent)),
            DType::F8E4M3 => random.codes(scales.len(), |code| (0x20..0x60).contains(&code)),
            _ => scales.iter().flat_map(|scale| scale.to_le_bytes()).collect(),
        };
        let codes = match code {
            Code::Int { bits } => random.codes(n * k, |code| usize::from(code) < 1 << bits),
            Code::E2m1 => random.codes(n * k, |code| code < 16),
            _ => random.codes(n * k, |code| code & 0x7f != 0x7f),
        };
        let zeros = zero.map(|width| {
            let zero = |random: &mut Random| (random.next() % 256) as u8 as i8 % width;
            (0..rows * columns).map(|_| zero(&mut random)).collect()
        });
        let global_scale = (formula == Formula::Nvfp4).then_some(3_701.0);
        Packed { n, k, code, formula, codes, scales: Some((dtype, sharing, scales)), zeros, global_scale }
    };
    let group = |size| Sharing::Group { size };
    let block = Sharing::Block { rows: 32, columns: 128 };
    let mut matrices = vec![
        quantized(Code::Int { bits: 4 }, Formula::Affine, DType::BF16, group(32), None),
        quantized(Code::Int { bits: 4 }, Formula::Affine, DType::F32, group(32), Some(8)),
        quantized(Code::Int { bits: 3 }, Formula::Affine, DType::BF16, Sharing::Channel, None),
        quantized(Code::Int { bits: 8 }, Formula::Affine, DType::BF16, Sharing::Channel, Some(100)),
        quantized(Code::Int { bits: 8 }, Formula::Affine, DType::F32, Sharing::Tensor, None),
        quantized(Code::E4m3, Formula::Affine, DType::BF16, Sharing::Channel, None),
        quantized(Code::E4m3, Formula::Affine, DType::F32, block, None),
        quantized(Code::E4m3, Formula::Mx, DType::U8, group(32), None),
        quantized(Code::E2m1, Formula::Mx, DType::U8, group(32), None),
        quantized(Code::E2m1, Formula::Nvfp4, DType::F8E4M3, group(16), None),
    ];
    let values = random.floats(n * k);
    let half = |value: &f32| half::f16::from_f32(*value).to_le_bytes();
    for (code, codes) in [
        (Code::F32, values.iter().flat_map(|value| value.to_le_bytes()).collect()),
        (Code::F16, values.iter().flat_map(half).collect()),
        (Code::Bf16, bf16(values.clone())),
    ] {
        let formula = Formula::Dense;
        matrices.push(Packed { n, k, code, formula, codes, scales: None, zeros: None, global_scale: None });
    }
    matrices
}

/// Inputs whose rows differ in size by orders of magnitude.
fn inputs(k: usize) -> Vec<f32> {
    let mut random = Random::new(5);
    (0..ROWS)
        .flat_map(|row| random.floats(k).into_iter().map(move |x| x * 4.0_f32.powi(row as i32 % 7 - 3)))
        .collect()
}

fn operand(packed: &Packed) -> Vec<f32> {
    let rows: Vec<u32> = (0..packed.n as u32).collect();
    let tiled = packed.tiled();
    on_every_isa(|cpu| {
        let matrix = cpu.matrix(&tiled, 0..packed.n, Pieces::Atoms).expect("room");
        cpu.download(&cpu.embed(&matrix, &rows).expect("room")).expect("room")
    })
}

fn product(packed: &Packed, x: &[f32], bias: Option<&[f32]>, compute: Compute) -> Vec<f32> {
    let tiled = packed.tiled();
    on_every_isa(|cpu| {
        let x = cpu
            .prepare(&cpu.upload(packed.k, x).expect("room"), &Treatment::Plain, compute, &[0..40, 40..ROWS])
            .expect("room");
        let matrix = cpu.matrix(&tiled, 0..packed.n, Pieces::Atoms).expect("room");
        cpu.download(&cpu.linear(&x, &matrix, bias, compute).expect("plain operands have products"))
            .expect("room")
    })
}

/// `x * W^T` in f64, and beside each sum the sum of the magnitudes.
fn sums(packed: &Packed, x: &[f64], w: &[f64]) -> Vec<(f64, f64)> {
    let row = |x: &[f64], w: &[f64]| {
        let terms = x.iter().zip(w).map(|(x, w)| x * w);
        terms.fold((0.0, 0.0), |(sum, size), term| (sum + term, size + f64::abs(term)))
    };
    x.chunks_exact(packed.k).flat_map(|x| w.chunks_exact(packed.k).map(move |w| row(x, w))).collect()
}

#[test]
fn f32_products_are_within_the_rounding_of_their_sums() {
    for packed in matrices() {
        let x = inputs(packed.k);
        let w: Vec<f64> = operand(&packed).into_iter().map(f64::from).collect();
        let wide: Vec<f64> = x.iter().copied().map(f64::from).collect();
        // Each step of a chain rounds once, by at most half a unit in the last place of a partial sum.
        let bound = (packed.k + 1) as f64 * 2.0_f64.powi(-24);
        let found = product(&packed, &x, None, Compute::F32);
        for (found, (sum, size)) in found.iter().zip(sums(&packed, &wide, &w)) {
            assert!((f64::from(*found) - sum).abs() <= bound * size, "{:?}: {found} {sum}", packed.code);
        }
    }
}

#[test]
fn bf16_products_are_those_of_rounded_operands() {
    for packed in matrices() {
        let x = inputs(packed.k);
        let round = |values: &[f32]| values.iter().map(|value| to_bf16(*value)).collect::<Vec<f64>>();
        let expected = sums(&packed, &round(&x), &round(&operand(&packed)));
        let expected: Vec<f64> = expected.into_iter().map(|(sum, _)| sum).collect();
        let found = product(&packed, &x, None, Compute::Bf16);
        let distance = relative(&found, &expected);
        assert!(distance <= 1e-6, "{:?} {:?}: {distance:e}", packed.code, packed.formula);
        // The bound can tell: without the rounding of the inputs the sums are elsewhere.
        let unrounded = product(&packed, &x, None, Compute::F32);
        assert!(relative(&unrounded, &expected) > 1e-4, "{:?}", packed.code);
    }
}

#[test]
fn a_bias_is_added_to_the_whole_sum() {
    for packed in matrices() {
        let x = inputs(packed.k);
        let bias = Random::new(9).floats(packed.n);
        let without = product(&packed, &x, None, Compute::F32);
        let with = product(&packed, &x, Some(&bias), Compute::F32);
        let expected: Vec<f32> =
            without.iter().enumerate().map(|(at, sum)| sum + bias[at % packed.n]).collect();
        assert!(same_bits(&with, &expected), "{:?}", packed.code);
    }
}

#[test]
fn a_range_of_rows_gives_the_bits_of_the_whole() {
    let cpu = Cpu::detect();
    for packed in matrices() {
        let (x, tiled) = (inputs(packed.k), packed.tiled());
        let whole = product(&packed, &x, None, Compute::Bf16);
        let x = cpu.upload(packed.k, &x).expect("room");
        let x = cpu
            .prepare(&x, &Treatment::Plain, Compute::Bf16, std::slice::from_ref(&(0..ROWS)))
            .expect("room");
        for rows in [0..16, 16..83, 48..64, 64..64, 32..80] {
            let part = cpu.matrix(&tiled, rows.clone(), Pieces::Atoms).expect("room");
            assert_eq!(cpu.rows(&part), rows.len());
            let found =
                cpu.download(&cpu.linear(&x, &part, None, Compute::Bf16).expect("a product")).expect("room");
            let expected: Vec<f32> =
                whole.chunks_exact(packed.n).flat_map(|row| &row[rows.clone()]).copied().collect();
            assert!(same_bits(&found, &expected), "{:?} rows {rows:?}", packed.code);
        }
    }
}
