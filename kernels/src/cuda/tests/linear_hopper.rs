//! Linears on warpgroups: the operand's bits for every code and scale, against the fused kernels bit by bit (in the
//! emulation both sum alike), and cuts that must not show.

use ctq_container::{Bytes, ScaleTable, TiledMatrix, Tiling};
use ctq_model::matrix::{Code, Formula};

use super::*;
use crate::backend::{Backend, GatePair, Treatment};
use crate::cpu::math::round_bf16;
use crate::cpu::{self, CpuBuffer, CpuMatrix, CpuOperand, Isa};
use crate::cuda::Cuda;
use crate::cuda::buffer::{CudaBuffer, CudaOperand, OperandKind};
use crate::cuda::elementwise::samples::{devices, same_bits};
use crate::cuda::emulated::{Dense, Emulated, EmulatedMemory, Schedule, Warpgroups};
use crate::cuda::linear::format::Format;
use crate::cuda::linear::{Bf16Path, LinearPath, gated, linear, linear_add, path};
use crate::cuda::matrix::Worth;
use crate::cuda::matrix::packed::{
    MXFP4, MXFP8, NVFP4, Random, Scheme, affine, dense, group, integer, operand, schemes, tiled,
};
use crate::{Compute, composed};

fn on_warpgroups(device: Emulated, path: LinearPath) -> Cuda<Emulated> {
    Cuda::new(device.with_warpgroups(Warpgroups::Present)).with_linears(Some(path))
}

fn hopper() -> Cuda<Emulated> {
    on_warpgroups(Emulated::new(Schedule::ALL[0]), LinearPath::Hopper)
}

fn treated(rows: usize, k: usize, treatment: &Treatment) -> CpuOperand {
    let values = Random::new(7).floats(rows * k);
    prepared(CpuBuffer { width: k, values }, rows, treatment)
}

fn prepared(x: CpuBuffer, rows: usize, treatment: &Treatment) -> CpuOperand {
    cpu::quantize::prepare(Isa::detect(), &x, treatment, Compute::Bf16, std::slice::from_ref(&(0..rows)))
}

fn multiply(cuda: &Cuda<Emulated>, x: &CpuOperand, matrix: &TiledMatrix, rows: Range<usize>) -> Vec<f32> {
    let device = cuda.device();
    let held = CudaMatrix::upload(device, matrix, rows).expect("a matrix");
    let y = linear(cuda, &operand(device, x, Compute::Bf16), &held, None, Compute::Bf16);
    y.expect("a product").download(device).expect("values")
}

/// Each group of a matrix of 64 k or more holds every code of its width in turn, and has the next of `scales`.
fn systematic(n: usize, k: usize, scheme: Scheme, scales: &[Vec<u8>], zeros: &[i8]) -> TiledMatrix {
    let (dtype, sharing) = scheme.scales.expect("a scheme with scales");
    let (rows, columns) = sharing.shape(n, k);
    let turn = |index: usize| &scales[index % scales.len()];
    let stored: Vec<u8> = (0..rows * columns).flat_map(|index| turn(index).clone()).collect();
    let zeros: Option<Bytes> = (!zeros.is_empty()).then(|| {
        let zeros: Vec<u8> =
            (0..rows * columns).map(|index| zeros[index / 3 % zeros.len()].cast_unsigned()).collect();
        ScaleTable::arrange(sharing, n, k, 1, &zeros).into()
    });
    let code = |index: usize| match scheme.code {
        Code::E4m3 if index % 128 == 127 => 0,
        Code::E4m3 => (index % 256) as u8,
        Code::Int { bits } => (index % (1 << bits)) as u8,
        _ => (index % 16) as u8,
    };
    let codes: Vec<u8> = (0..n * k).map(|index| code(index % k)).collect();
    TiledMatrix {
        n,
        k,
        code: scheme.code,
        formula: scheme.formula,
        codes: Tiling::new(n, k, scheme.code.tile_bits()).tile(&codes).into(),
        scales: Some(ScaleTable {
            dtype,
            sharing,
            bytes: ScaleTable::arrange(sharing, n, k, dtype.bytes(), &stored).into(),
        }),
        zeros,
        global_scale: (scheme.formula == Formula::Nvfp4).then(|| (2_688.0_f32 / 0.731).to_bits()),
        permutation: None,
    }
}

/// Multiplies with the unit matrix: what comes out are the weights, each beside zeros.
fn check_operands(matrix: &TiledMatrix, what: &str) {
    let (n, k) = (matrix.n, matrix.k);
    let values = (0..k * k).map(|index| f32::from(u8::from(index / k == index % k))).collect();
    let unit = prepared(CpuBuffer { width: k, values }, k, &Treatment::Plain);
    let ids: Vec<u32> = (0..n as u32).collect();
    let weights = cpu::weights::rows(Isa::detect(), &CpuMatrix::new(matrix, 0..n), &ids);
    for path in [LinearPath::Hopper, LinearPath::Fused] {
        let cuda = on_warpgroups(Emulated::new(Schedule::ALL[0]), path);
        check_transposed(
            &multiply(&cuda, &unit, matrix, 0..n),
            &weights.values,
            n,
            &format!("{what}, {path}"),
        );
    }
}

fn check_transposed(found: &[f32], weights: &[f32], n: usize, what: &str) {
    let k = weights.len() / n;
    for (index, found) in found.iter().enumerate() {
        let (column, row) = (index / n, index % n);
        let expected = round_bf16(weights[row * k + column]);
        // A sum of zeros has no sign.
        assert!(
            found.to_bits() == expected.to_bits() || (*found == 0.0 && expected == 0.0),
            "{what}: row {row}, column {column}: {found:e}, expected {expected:e}"
        );
    }
}

/// Scales of bf16 from the smallest subnormal one on, of both signs, whose products with a code stay finite.
fn many_bf16() -> Vec<Vec<u8>> {
    let step = 29;
    (1..0x7b00_u16).step_by(step).map(|bits| (bits | (bits % 2) << 15).to_le_bytes().to_vec()).collect()
}

fn many_f32() -> Vec<Vec<u8>> {
    let of = |index: u32| f32::from_bits(0x2f00_0000 + index * 0x0001_2345);
    (0..1024).map(|index| of(index).to_le_bytes().to_vec()).collect()
}

#[test]
fn operands_of_fp4_have_the_bits_of_the_cpu_for_every_code_and_scale() {
    let bytes = |all: &mut dyn Iterator<Item = u8>| all.map(|byte| vec![byte]).collect::<Vec<_>>();
    let e4m3 = bytes(&mut (0..=255).filter(|byte| byte % 128 != 127));
    check_operands(&systematic(64, 64, NVFP4, &e4m3, &[]), "nvfp4");
    // 6 * 2^(250 - 127) is the last that other k do not meet as an infinity.
    let e8m0 = bytes(&mut (0..=250));
    check_operands(&systematic(128, 64, MXFP4, &e8m0, &[]), "mxfp4");
    check_operands(&systematic(300, 256, MXFP8, &bytes(&mut (0..=245)), &[]), "mxfp8");
}

#[test]
fn operands_of_integers_have_the_bits_of_the_cpu_for_many_scales() {
    for bits in 2..=4 {
        check_operands(&systematic(600, 64, integer(bits, group(32)), &many_bf16(), &[]), "int4");
    }
    let zeros: Vec<i8> = (-8..8).collect();
    check_operands(&systematic(600, 64, integer(4, group(16)), &many_bf16(), &zeros), "int4 with zeros");
    let wide: Vec<i8> = (-128..=127).collect();
    check_operands(&systematic(600, 64, integer(4, group(16)), &many_bf16(), &wide), "int4 with wide zeros");
    for bits in 5..=8 {
        let scheme = integer(bits, Sharing::Channel);
        check_operands(&systematic(300, 256, scheme, &many_bf16()[40..], &[]), "int8");
    }
    let scheme = integer(8, Sharing::Channel);
    check_operands(&systematic(300, 256, scheme, &many_bf16()[40..], &wide), "int8 with zeros");
    for bits in [4, 8] {
        let scheme = affine(Code::Int { bits }, DType::F32, group(64));
        check_operands(&systematic(300, 256, scheme, &many_f32(), &[]), "f32 scales");
    }
}

#[test]
fn operands_of_fp8_have_the_bits_of_the_cpu_for_every_code() {
    let bf16 = affine(Code::E4m3, DType::BF16, Sharing::Channel);
    // The largest code is 448.
    let scales: Vec<Vec<u8>> = many_bf16().into_iter().take(1050).collect();
    check_operands(&systematic(400, 256, bf16, &scales[..400], &[]), "small bf16 scales");
    check_operands(&systematic(400, 256, bf16, &scales[650..], &[]), "large bf16 scales");
    let block = Sharing::Block { rows: 48, columns: 64 };
    check_operands(&systematic(300, 256, affine(Code::E4m3, DType::F32, block), &many_f32(), &[]), "blocks");
}

#[test]
fn products_of_every_scheme_have_the_bits_of_the_fused_kernels() {
    let warpgroups: Vec<_> = devices().map(|device| on_warpgroups(device, LinearPath::Hopper)).collect();
    let fused = on_warpgroups(Emulated::new(Schedule::ALL[0]), LinearPath::Fused);
    for (seed, scheme) in schemes().into_iter().enumerate() {
        let (n, k) = [(150, 200), (70, 63), (203, 450)][seed % 3];
        let matrix = tiled(n, k, scheme, seed as u64);
        let x = treated(20, k, &Treatment::Plain);
        let rows = [0..n, 16..n, 48..n - 3][seed % 3].clone();
        let found = multiply(&warpgroups[seed % warpgroups.len()], &x, &matrix, rows.clone());
        same_bits(&found, &multiply(&fused, &x, &matrix, rows), &format!("{scheme:?}"));
    }
}

#[test]
fn formats_are_those_of_the_scheme() {
    let device = Emulated::new(Schedule::ALL[0]);
    let of = |scheme: Scheme| {
        let matrix = tiled(64, 256, scheme, 1);
        format(&CudaMatrix::upload(&device, &matrix, 0..64).expect("a matrix"), Worth::Operand)
    };
    let int4 = Code::Int { bits: 4 };
    assert_eq!(of(integer(3, group(128))), Some(Format::Int4));
    assert_eq!(of(integer(4, group(32)).with_zeros()), Some(Format::Int4));
    assert_eq!(of(affine(int4, DType::F32, Sharing::Tensor)), Some(Format::Int4F32));
    assert_eq!(of(affine(int4, DType::F16, group(32))), None);
    assert_eq!(of(integer(4, group(48))), None);
    assert_eq!(of(integer(4, group(8))), None);
    assert_eq!(
        (of(NVFP4), of(MXFP4), of(MXFP8)),
        (Some(Format::E2m1), Some(Format::E2m1), Some(Format::E4m3F32))
    );
    assert_eq!(of(integer(8, Sharing::Channel)), Some(Format::Int8));
    assert_eq!(of(integer(8, Sharing::Channel).with_zeros()), Some(Format::Int8F32));
    assert_eq!(of(affine(Code::E4m3, DType::BF16, Sharing::Tensor)), Some(Format::E4m3));
    assert_eq!((of(dense(Code::Bf16)), of(dense(Code::F32))), (Some(Format::Bf16), None));
}

/// Two blocks of tokens, and more tiles than blocks.
#[test]
fn cuts_of_tokens_and_rows_do_not_show() {
    let (n, k, m) = (203, 130, 300);
    let kinds = [integer(4, group(32)), NVFP4, integer(8, Sharing::Channel), dense(Code::Bf16), MXFP8, MXFP4];
    for (device, scheme) in Schedule::ALL.map(Emulated::new).into_iter().zip(kinds) {
        let cuda = on_warpgroups(device, LinearPath::Hopper);
        let matrix = tiled(n, k, scheme, 31);
        let x = treated(m, k, &Treatment::Plain);
        let whole = multiply(&cuda, &x, &matrix, 0..n);
        for (tokens, rows) in [(0..1, 0..16), (1..130, 16..80), (130..m, 80..n), (40..m, 0..n)] {
            let part = x.with_values(Isa::detect(), &x.values()[tokens.start * k..tokens.end * k]);
            let found = multiply(&cuda, &part, &matrix, rows.clone());
            let expected: Vec<f32> =
                tokens.clone().flat_map(|row| whole[row * n..][rows.clone()].to_vec()).collect();
            same_bits(&found, &expected, &format!("{scheme:?}: tokens {tokens:?}, rows {rows:?}"));
        }
    }
}

/// Results in runs of 16 bytes and in single numbers.
#[test]
fn a_bias_and_a_sum_are_added_with_the_bits_of_two_passes() {
    for (device, (n, rows)) in devices().zip([(208, 0..208), (203, 16..203), (208, 16..208), (64, 0..64)]) {
        let cuda = on_warpgroups(device, LinearPath::Hopper);
        let device = cuda.device();
        let (k, m) = (96, 40);
        let matrix = tiled(n, k, integer(4, group(32)), 3);
        let x = treated(m, k, &Treatment::Plain);
        let bias = Random::new(5).floats(rows.len());
        let sum = Random::new(6).floats(m * rows.len());
        let product = multiply(&cuda, &x, &matrix, rows.clone());
        let biased: Vec<f32> =
            product.iter().enumerate().map(|(index, value)| value + bias[index % bias.len()]).collect();
        let held = CudaMatrix::upload(device, &matrix, rows.clone()).expect("a matrix");
        let x = operand(device, &x, Compute::Bf16);
        let found = linear(&cuda, &x, &held, Some(&bias), Compute::Bf16).expect("a product");
        same_bits(&found.download(device).expect("values"), &biased, "a bias");
        let mut total = CudaBuffer::upload(device, rows.len(), &sum).expect("room");
        linear_add(&cuda, &mut total, &x, &held, Some(&bias), Compute::Bf16).expect("a sum");
        let expected: Vec<f32> = sum.iter().zip(&biased).map(|(sum, value)| sum + value).collect();
        same_bits(&total.download(device).expect("values"), &expected, "a sum");
    }
}

#[test]
fn scaled_codes_are_divided_at_the_end() {
    use ctq_model::scheme::{Activation, ActivationScale, ActivationSharing};
    let sharing = |size| ActivationSharing::Group { size };
    let fused = on_warpgroups(Emulated::new(Schedule::ALL[0]), LinearPath::Fused);
    for (scheme, size, scale) in
        [(NVFP4, 16, ActivationScale::Local), (MXFP4, 32, ActivationScale::PowerOfTwo)]
    {
        let activation = Activation { code: Code::E2m1, symmetric: true, sharing: sharing(size), scale };
        let quantizer = crate::backend::Quantizer {
            activation,
            scales: vec![0.031],
            zero: 17.0,
            global_scale: 2_688.0 / 11.7,
        };
        let x = treated(11, 192, &Treatment::Exact(quantizer));
        let matrix = tiled(70, 192, scheme, 9);
        let found = multiply(&hopper(), &x, &matrix, 16..70);
        same_bits(&found, &multiply(&fused, &x, &matrix, 16..70), &format!("{scheme:?}"));
    }
}

/// What is asked for serves where the device can, and is part of how a number was made.
#[test]
fn a_path_that_is_asked_for_serves_and_is_named() {
    assert_eq!(LinearPath::asked_for(None), Ok(None));
    for path in [LinearPath::Library, LinearPath::Hopper, LinearPath::Fused, LinearPath::Fp8] {
        assert_eq!(LinearPath::asked_for(Some(&path.to_string())), Ok(Some(path)));
    }
    assert!(LinearPath::asked_for(Some("fast")).is_err_and(|error| error.contains("CTQ_LINEAR=fast")));
    let plain = || Emulated::new(Schedule::ALL[0]);
    let of = |device: Emulated, asked: Option<LinearPath>| {
        let cuda = Cuda::new(device).with_linears(asked);
        let matrix = tiled(64, 64, integer(4, group(32)), 1);
        let held = CudaMatrix::upload(cuda.device(), &matrix, 0..64).expect("a matrix");
        (path(&cuda.another_rank(), &OperandKind::Bf16, &held), cuda.identity().isa)
    };
    let warpgroups = || plain().with_warpgroups(Warpgroups::Present);
    let library = || plain().with_dense_product(Dense::Present);
    assert_eq!(of(warpgroups(), None), (Bf16Path::Fused, "emulated".to_owned()));
    let hopper = of(warpgroups(), Some(LinearPath::Hopper));
    assert_eq!(hopper, (Bf16Path::Hopper, "emulated, linears by hopper".to_owned()));
    let fp8 = of(warpgroups(), Some(LinearPath::Fp8));
    assert_eq!(fp8, (Bf16Path::Fused, "emulated, linears by fp8".to_owned()));
    assert_eq!(of(plain(), Some(LinearPath::Hopper)).0, Bf16Path::Fused);
    assert_eq!(of(library(), Some(LinearPath::Library)).0, Bf16Path::Library);
    assert_eq!(of(plain(), Some(LinearPath::Library)).0, Bf16Path::Fused);
}

#[test]
fn no_rows_and_no_tokens_have_no_product() {
    let matrix = tiled(40, 70, integer(4, group(32)), 1);
    assert!(multiply(&hopper(), &treated(3, 70, &Treatment::Plain), &matrix, 16..16).is_empty());
    assert!(multiply(&hopper(), &treated(0, 70, &Treatment::Plain), &matrix, 0..40).is_empty());
}

/// Both linears, the gate and the operand in one launch against one after the other.
#[test]
fn a_gated_pair_has_the_bits_of_its_parts() {
    let kinds = [integer(4, group(32)), NVFP4, dense(Code::Bf16), integer(8, Sharing::Channel).with_zeros()];
    for ((device, scheme), n) in devices().zip(kinds).zip([203, 64, 130, 200]) {
        let cuda = on_warpgroups(device, LinearPath::Hopper);
        let (k, m) = (130, 300);
        let [gate, up] = [1, 2].map(|seed| tiled(n, k, scheme, seed));
        let upload =
            |matrix: &TiledMatrix| CudaMatrix::upload(cuda.device(), matrix, 0..n).expect("a matrix");
        let (gate, up) = (upload(&gate), upload(&up));
        let biases = [Random::new(8).floats(n), Random::new(9).floats(n)];
        let biases = [Some(biases[0].as_slice()), (n > 100).then_some(biases[1].as_slice())];
        let pair = GatePair { gate: &gate, up: &up, biases };
        let x = operand(cuda.device(), &treated(m, k, &Treatment::Plain), Compute::Bf16);
        let together = gated(&cuda, &x, pair).expect("a product").expect("a launch");
        let all = 0..m;
        let windows = std::slice::from_ref(&all);
        let parts =
            composed::gated(&cuda, &x, pair, &Treatment::Plain, Compute::Bf16, windows).expect("products");
        assert_eq!((together.rows, together.k), (parts.rows, parts.k));
        let bytes = |operand: &CudaOperand<EmulatedMemory>| {
            let mut bytes = vec![0; m * n.next_multiple_of(TILE) * 2];
            cuda.device().download(&operand.values, 0, &mut bytes).expect("values");
            bytes
        };
        assert!(bytes(&together) == bytes(&parts), "{scheme:?}");
    }
}
